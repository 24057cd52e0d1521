"""Samples of a run: the same references, edited again and again while training goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from npedit.data import Batch, Example, collate
from npedit.data._photos import to_pil
from npedit.recipe.config import Recipe, find_module
from npedit.report.sheets import SheetCell, draw_sheet, fit_side, split_rows
from npedit.runs.checkpoint import explain_write_errors

LEAST_SIDE = 128  # pixels of the longer side of a picture in grid.png; smaller pictures are enlarged


def evaluation_batches(recipe: Recipe, data: Any, count: int) -> list[Batch]:
    """At most `count` examples to edit while training goes on, in batches of one picture size each.

    With the toy benchmark they are the benchmark's first items. Otherwise they are the rows that `data.held_out` keeps
    out of training. Without such rows they are the first training batch.
    """
    if recipe.trainer.benchmark == "toy":
        return [_toy_benchmark_batch(recipe, count)]
    return data.held_out_batches(count) or [data.batch(0, count)]


def benchmark_items(recipe: Recipe, count: int) -> list[Any]:
    """The first items of the recipe's benchmark, of the edit types that the recipe's data have."""
    kinds = {} if (found := getattr(recipe.data.settings, "edit_types", None)) is None else {"edit_types": found}
    return find_module("benchmarks", recipe.trainer.benchmark).sample_items(count, recipe.seed, **kinds)


def _toy_benchmark_batch(recipe: Recipe, count: int) -> Batch:
    from npedit.toy.world import render

    edits = benchmark_items(recipe, count)
    texts = [(e.instruction, e.edit_type, e.object, e.source_caption, e.target_caption) for e in edits]
    pictures = render([e.reference for e in edits])
    return collate([Example(str(i), picture, *text) for i, (picture, text) in enumerate(zip(pictures, texts))])


def samples_folder(run: Path, step: int) -> Path:
    """The folder of the samples after update `step`."""
    return run / "samples" / f"step-{step:06d}"


def write_samples(
    folder: Path, references: Sequence[Tensor], instructions: Sequence[str], edited: Sequence[Tensor]
) -> None:
    """Write `000.png` (edited), `reference-000.png`, ..., `items.json`, and `grid.png` with all of them.

    Images are (3, H, W) in [0, 1]; sizes may differ between items.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        pairs = [(to_pil(r), to_pil(e)) for r, e in zip(references, edited, strict=True)]
        listed = []
        for i, ((before, after), instruction) in enumerate(zip(pairs, instructions, strict=True)):
            files = {"file": f"{i:03d}.png", "reference": f"reference-{i:03d}.png"}
            after.save(folder / files["file"])
            before.save(folder / files["reference"])
            listed.append({**files, "instruction": instruction})
        (folder / "items.json").write_text(json.dumps(listed, indent=1))
        _draw_grid(pairs, instructions).save(folder / "grid.png")


def _draw_grid(pairs: Sequence[tuple[Image.Image, Image.Image]], instructions: Sequence[str]) -> Image.Image:
    """All pairs at full size, with their instructions."""
    shown = [tuple(map(_enlarge_small, pair)) for pair in pairs]
    side = max(max(picture.size) for pair in shown for picture in pair)
    cells = [SheetCell(pair, instruction) for pair, instruction in zip(shown, instructions, strict=True)]
    return draw_sheet(split_rows(cells, columns=2), side, text_lines=2)


def _enlarge_small(picture: Image.Image) -> Image.Image:
    return fit_side(picture, LEAST_SIDE) if max(picture.size) < LEAST_SIDE else picture
