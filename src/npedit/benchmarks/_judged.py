"""The results folder of a judged benchmark: settings, edited pictures, rows, headlines.

    rows.jsonl      one row an item, see `_scorer.py`
    summary.json    {headline: {"value": number or null, "n", "coverage", "ci95", "bounds"}}
    settings.json   protocol, judge, editor, counts of outcomes: what the numbers depend on
    answers.jsonl   every answer in full (judges/cache.py); a resumed run asks no question twice
    official/       pictures and scores in the layout of the benchmark's own scripts

`coverage` is the share of the benchmark's items that have the score. Below the required coverage `value` is null. The
`bounds` are the headlines that would result if every missing score were the lowest, and the highest, of the scale.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.benchmarks._headlines import Row
from npedit.benchmarks._outputs import (
    ProgressCallback,
    edit_cache_key,
    find_picture_any_format,
    has_cache_key,
    make_opener,
    save_png,
)
from npedit.benchmarks._scorer import Item
from npedit.errors import UserError, explain_write_errors
from npedit.judges.base import OK
from npedit.judges.cache import hash_json
from npedit.runs.checkpoint import write_text
from npedit.runs.files import read_json_object
from npedit.scoring import results
from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from npedit.scoring.lpips import Lpips
from npedit.scoring.metrics import feature_metrics, perceptual_metrics, pixel_metrics
from npedit.scoring.tables import TextTable

ROWS, SUMMARY, FACTS, ANSWERS = "rows.jsonl", "summary.json", "settings.json", "answers.jsonl"
LATER_FACTS = ("data_hash", "language", "scores_hash")  # settings.json of earlier versions lacks these
CHUNK = 16  # pictures edited at a time
EditFn = Callable[[list[Image.Image], list[str]], list[Image.Image]]  # RGB pictures and instructions -> results


def sample_across_tasks(items: Sequence[Item], n: int | None) -> list[Item]:
    """The first `n` items when the tasks take turns. Without `n`, all items in their order."""
    if not n:
        return list(items)
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    in_turn = sorted((k, i, item) for i, group in enumerate(by_task.values()) for k, item in enumerate(group))
    return [item for _, _, item in in_turn][:n]


def results_table(
    title: str, rows: Sequence[Row], all_items: Sequence[Item], summary: Mapping[str, Mapping[str, Any]]
) -> TextTable:
    """A table for people: each task's means over its scored items, then the headlines, macro and micro."""
    names = list(rows[0]["scores"])
    table = TextTable(title, ("", "items", "scored", *names), left=("",))
    for task, size in Counter(i.task for i in all_items).items():
        scores = [r["scores"] for r in rows if r["task"] == task]
        values = [[s[n] for s in scores if s[n] is not None] for n in names]
        cells = [f"{statistics.fmean(v):.3f}" if v else "-" for v in values]
        table.add_row(task, size, len(values[-1]), *cells)
    for group in dict.fromkeys(key.rpartition("/")[0] for key in summary):
        _add_headlines(table, group, [[summary[f"{group}/{n}{end}"] for n in names] for end in ("", "_micro")])
    return table


def _add_headlines(table: TextTable, group: str, headlines: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Add the headlines of a group: the figures of the macro row and of the micro row."""
    for kind, figures in zip(("macro", "micro"), headlines, strict=True):
        n, coverage = figures[-1]["n"], figures[-1]["coverage"]
        cells = ["none" if f["value"] is None else f"{f['value']:.3f}" for f in figures]
        counts = str(round(n / coverage)) if n else "-", f"{n} = {coverage:.1%}"
        is_macro = kind == "macro"
        table.add_row(f"{group} {kind}", *counts, *cells, is_bold=is_macro, begins_section=is_macro)


# ----------------------------------------------------------------------------------------------------------- pictures


def edit_missing_items(
    edit: EditFn, items: Sequence[Item], on_progress: ProgressCallback, editor: Mapping[str, Any]
) -> None:
    """Edit every item that has no picture yet, or one that was made from another source, instruction or `editor`
    (facts: weights, seed, steps)."""
    keys = {item.id: edit_cache_key(item.source(), item.instruction, editor) for item in items}
    missing = [item for item in items if not has_cache_key(item.edited, keys[item.id])]
    done = len(items) - len(missing)
    on_progress(done, len(items))
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        edited = edit([item.source() for item in chunk], [item.instruction for item in chunk])
        for item, picture in zip(chunk, edited):
            save_png(picture, item.edited, keys[item.id])
        on_progress(done + start + len(chunk), len(items))


def score_preservation(
    items: Sequence[Item],
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    lpips: Lpips | None,
    on_progress: ProgressCallback,
) -> list[results.Row]:
    """How similar each edited picture is to its source, without a judge. An item without a picture has no scores."""
    rows = []
    for item in items:
        source, edited = cache(item.source), make_opener(find_picture_any_format(item.edited), "edited picture")
        metrics = {**pixel_metrics(source, edited), **feature_metrics(source, edited, dino, clip)}
        metrics |= perceptual_metrics(source, edited, lpips) if lpips else {}
        rows.append(results.Row.from_metrics(item.id, item.task, metrics))
        on_progress(len(rows), len(items))
    return rows


# -------------------------------------------------------------------------------------------------------------- files


def hash_items(items: Sequence[Item]) -> str:
    """A hash of everything that the data say of these items: ids, instructions, source pictures and further fields."""
    return hash_json([[i.id, i.instruction, i.source.file_hash(), dict(i.more)] for i in items])[:16]


def hash_file(path: Path) -> str:
    """A hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write_initial_settings(folder: Path, facts: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write settings.json before the first question about `items`. Where the file is there, compare it instead.

    Raises:
        UserError: the folder holds results, finished or not, of other settings; or a finished result of more items.
    """
    path = folder / FACTS
    if path.is_file():
        _require_same_settings(folder, _read_settings(path), json.loads(json.dumps(facts)))
        _require_all_rows(folder, {item.id for item in items})
        return
    write_text(path, json.dumps({"state": "under way", **facts}, indent=1, ensure_ascii=False) + "\n")


def _require_same_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    compared = {k: v for k, v in new.items() if k in old or k not in LATER_FACTS}
    other = [f"{k} {old.get(k)!r}" for k, v in compared.items() if old.get(k) != v]
    if other:
        raise UserError(
            f"expected a new folder, or one of the same evaluation; {folder} is of another: {'; '.join(other)}; "
            "choose another --out, or give --fresh"
        )


def _require_all_rows(folder: Path, ids: set[str]) -> None:
    """Check that every item of a finished result is among `ids`, so that no row of it is lost."""
    if not (folder / ROWS).is_file():
        return
    rows = results.Results.read(folder).rows
    lost = [row.id for row in rows if row.id not in ids]
    if lost:
        raise UserError(
            f"expected all {len(rows)} items of the finished result in {folder}; got {len(ids)} items, without "
            f"{len(lost)} of them, such as {lost[0]}; choose another --out, raise --items, or give --fresh"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"expected a JSON object in {path}; got: {error}; delete it, or give --fresh") from None


def write_results(folder: Path, rows: Iterable[Row], summary: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl, summary.json and settings.json, each completely or not at all."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ROWS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def count_outcomes(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Score -> outcome -> number of items."""
    return {n: dict(Counter(r["why"].get(n, OK) for r in rows)) for n in (rows[0]["scores"] if rows else ())}
