"""The toy benchmark: held-out scenes and phrasings of the toy world, judged by an exact oracle without a network.

`applied`: the edit was carried out. `preserved`: everything else is as in the reference. `both`: the edit was applied
and the rest preserved, the success rate to quote. Each is a share of the items with a Wilson 95 % interval. `copy_rate`
is the share of outputs that show the same scene as the reference. `outside_change` is the mean absolute pixel change in
the cells that an edit must not change.

A scene edit (edit type `scene`: the subject of the reference, asked for in another scene) has other meanings of these
words: `applied` is "scene right", what the instruction asks of the scene is there; `preserved` is "subject kept", the
subject has the reference's colour, shape, pattern and size. It may change all else, so it has no `outside_change`.

Scenes are drawn from random streams named "held-out/SEED/INDEX", which training never uses. Instructions are drawn from
templates that training never uses.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from npedit.data._photos import to_pil
from npedit.runs.checkpoint import explain_write_errors, write_text
from npedit.scoring.tables import TextTable
from npedit.toy.edits import EDIT_TYPES, Edit
from npedit.toy.oracle import change_outside_edit, expected_reading, judge_edit, matches_caption, read_scene
from npedit.toy.scene_edits import ALL_EDIT_TYPES, SCENE, sample_item
from npedit.toy.world import SIDE, render

EditFn = Callable[[Tensor, list[str]], Tensor]
METRICS = ("applied", "preserved", "both")
FAILURE_CAUSES = ("n", "right", "critic", "teacher", "student")
Z95 = 1.959964


class Rate(TypedDict):
    """A share in [0, 1] and its 95 % interval [low, high]."""

    value: float
    ci95: list[float]


class TypeScores(TypedDict):
    """The three rates of one edit type."""

    n: int
    applied: Rate
    preserved: Rate
    both: Rate


class Scores(TypedDict):
    """The result of `score`: numbers, ready for JSON. `outside_change` is in [0, 1] units of pixel value."""

    n: int
    applied: Rate
    preserved: Rate
    both: Rate
    by_type: dict[str, TypeScores]
    copy_rate: float
    outside_change: float
    not_finite: int


def sample_items(n: int, seed: int = 0, edit_types: Sequence[str] = EDIT_TYPES) -> list[Edit]:
    """`n` held-out edits. The edit types take turns, so that all have the same share.

    A longer list begins with the shorter one.

    Raises:
        ValueError: n is smaller than one.
    """
    if n < 1:
        raise ValueError(f"expected at least one item to evaluate; got {n}")
    return [
        sample_item(random.Random(f"held-out/{seed}/{i}"), edit_types[i % len(edit_types)], held_out=True)
        for i in range(n)
    ]


def wilson_interval(hits: float, n: int) -> Rate:
    """A share with its Wilson score interval (E. B. Wilson, 1927), which also holds near 0 and 1.

    `hits` may be the mean of several evaluations of the same n items.

    Raises:
        ValueError: n is smaller than one, or hits is not in [0, n].
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"expected 0 <= hits <= n and n >= 1; got hits {hits}, n {n}")
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return {"value": p, "ci95": [min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))]}


def evaluate(
    editor: Any,
    items: int = 900,
    seed: int = 1,
    steps: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    save_to: Path | None = None,
    save: int = 36,
    edit_types: Sequence[str] = EDIT_TYPES,
) -> Scores:
    """Return the scores of an `Editor` on `items` held-out toy scenes. Each item is edited with the noise of another
    seed.

    `seed` selects the scenes. `steps` None is the editor's own number of steps. `edit_types` are those of the items.
    See `score` for the other arguments.

    Raises:
        ValueError: no items.
    """
    noise_seeds = iter(range(seed * 1_000_003, seed * 1_000_003 + items))

    def edit_fn(references: Tensor, instructions: Sequence[str]) -> Tensor:
        return editor.edit_tensor(references, instructions, [next(noise_seeds) for _ in instructions], steps)

    edits = sample_items(items, seed, edit_types)
    return score(edit_fn, edits, on_progress=on_progress, save_to=save_to, save=save)


def score(
    edit_fn: EditFn,
    items: Sequence[Edit],
    *,
    chunk: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    on_outcome: Callable[[bool, bool], None] | None = None,
    save_to: Path | None = None,
    save: int = 36,
) -> Scores:
    """Edit the items' references and ask the oracle.

    `edit_fn(references (b, 3, 32, 32) in [0, 1], instructions)` returns images of the same shape; it gets at most
    `chunk` at a time. `on_progress(done, total)` is called after each chunk, and `on_outcome(applied, preserved)`
    for each item in turn. With `save_to`, the first `save` items are left there as pictures (`reference-000.png`,
    `000.png`, ...) with `items.json`.

    An output with a value that is not finite counts as neither applied nor preserved, and in `not_finite`.

    Raises:
        ValueError: no items, or `edit_fn` returned another shape.
    """
    if not items:
        raise ValueError("expected at least one item to evaluate; got none")
    rows: list[tuple[bool, bool]] = []
    copies, broken, outside = 0, 0, []
    kept: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(items), chunk):
        part = items[start : start + chunk]
        references = render([e.reference for e in part])
        edited = edit_fn(references, [e.instruction for e in part]).detach().float().cpu()
        if edited.shape != references.shape:
            raise ValueError(f"expected edited images {tuple(references.shape)}; got {tuple(edited.shape)}")
        finite = edited.flatten(1).isfinite().all(1).tolist()
        edited = torch.nan_to_num(edited, 0.0, 1.0, 0.0).clamp(0, 1)
        for e, fine, reading, image, reference in zip(part, finite, read_scene(edited), edited, references):
            rows.append(judge_edit(e, reading) if fine else (False, False))
            if on_outcome:
                on_outcome(*rows[-1])
            broken += not fine
            copies += fine and replace(reading, residual=0.0) == expected_reading(e.reference)
            change = change_outside_edit(e, image, reference) if fine else None
            outside += [] if change is None else [change]
        kept += list(zip(references, edited))[: max(0, save - len(kept))] if save_to else []
        if on_progress:
            on_progress(len(rows), len(items))
    if save_to:
        _save_pictures(save_to, items, rows, kept)
    kinds = [e.edit_type for e in items]
    return {
        **_success_rates(rows),
        "by_type": {
            t: _success_rates([r for r, k in zip(rows, kinds) if k == t]) for t in ALL_EDIT_TYPES if t in kinds
        },
        "copy_rate": copies / len(rows),
        "outside_change": sum(outside) / len(outside) if outside else 0.0,
        "not_finite": broken,
    }


def attribute_failures(
    items: Sequence[Edit], edited: Tensor, is_accepted: Sequence[bool], teacher_images: Tensor
) -> dict[str, dict[str, int]]:
    """The causes of wrong edits, as counts by edit type: `n`, `right` (applied and preserved), and for wrong edits

    critic    the critic accepts the wrong edit (all its answers are the wanted ones), so its loss is low already
    teacher   the critic rejects the edit, but the base model with the target caption generates something else
    student   the critic rejects the edit and the teacher can generate the target, but the student did not learn it

    `edited` and `teacher_images` are images (n, 3, 32, 32) of the editor and of the base model. `is_accepted` says for
    each edit whether the critic accepts it. The teacher has one sample for each item, so `teacher` includes chance.
    """
    counts: dict[str, dict[str, int]] = {
        t: dict.fromkeys(FAILURE_CAUSES, 0) for t in ALL_EDIT_TYPES if any(t == e.edit_type for e in items)
    }
    readings = read_scene(edited), read_scene(teacher_images)
    for e, student, teacher, accepted in zip(items, *readings, is_accepted, strict=True):
        teacher_is_right = matches_caption(e.target_caption, teacher)
        wrong = "critic" if accepted else "student" if teacher_is_right else "teacher"
        fault = "right" if all(judge_edit(e, student)) else wrong
        counts[e.edit_type][fault] += 1
        counts[e.edit_type]["n"] += 1
    return counts


def _success_rates(rows: Sequence[tuple[bool, bool]]) -> TypeScores:
    applied, preserved, both = sum(a for a, _ in rows), sum(p for _, p in rows), sum(a and p for a, p in rows)
    n = len(rows)
    return {
        "n": n,
        "applied": wilson_interval(applied, n),
        "preserved": wilson_interval(preserved, n),
        "both": wilson_interval(both, n),
    }


def _save_pictures(
    folder: Path, items: Sequence[Edit], rows: list[tuple[bool, bool]], kept: list[tuple[Tensor, Tensor]]
) -> None:
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for i, ((reference, edited), e, (applied, preserved)) in enumerate(zip(kept, items, rows)):
        names = {"file": f"{i:03d}.png", "reference": f"reference-{i:03d}.png"}
        for name, image in zip(names.values(), (edited, reference)):
            with explain_write_errors(folder / name):
                to_pil(image).save(folder / name)
        words = {"instruction": e.instruction, "edit_type": e.edit_type}
        listed.append({**names, **words, "applied": applied, "preserved": preserved})
    write_text(folder / "items.json", json.dumps(listed, indent=1))


def results_table(after: Scores, before: Scores | None = None, title: str = "") -> TextTable:
    """A table by edit type: `applied`, `preserved`, and `both` with 95 % intervals, before (if given) and after."""
    is_scene = set(after["by_type"]) == {SCENE}
    metrics = ("scene right", "subject kept") if is_scene else ("applied", "preserved")
    columns = (*metrics, "both") if before is None else ("both, before", *metrics, "both, after")
    table = TextTable(
        title or f"Edits on held-out scenes, judged by the oracle ({SIDE}x{SIDE}, n = {after['n']})",
        ("edit type", "n", *columns),
        left=("edit type",),
        caption=f"both = {' and '.join(metrics)}, with 95 % interval; copy rate {100 * after['copy_rate']:.1f} %"
        + ("" if is_scene else f", pixel change outside the edit {after['outside_change']:.3f}"),
    )
    for kind, row in [*after["by_type"].items(), ("all", after)]:
        cells = [kind, str(row["n"])]
        if before is not None:
            earlier = before if kind == "all" else before["by_type"].get(kind)
            cells.append(format_rate(earlier["both"]) if earlier else "-")
        cells += [f"{100 * row[m]['value']:.1f} %" for m in ("applied", "preserved")]
        table.add_row(*cells, format_rate(row["both"]), is_bold=kind == "all", begins_section=kind == "all")
    return table


def format_rate(rate: Rate) -> str:
    """A rate as text: "52.3 % [47.9, 56.6]"."""
    low, high = (100 * x for x in rate["ci95"])
    return f"{100 * rate['value']:.1f} % [{low:.1f}, {high:.1f}]"
