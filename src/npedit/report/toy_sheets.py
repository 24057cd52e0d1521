"""Sheets of the toy world: its edits with their true results, and the results of an editor."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.data._photos import read_photo, to_pil
from npedit.report.sheets import SheetCell, draw_sheet, fit_side, split_rows
from npedit.toy.edits import EDIT_TYPES, sample_edit
from npedit.toy.scene_edits import SCENE
from npedit.toy.world import render

SIDE, COLUMNS = 160, 3


def draw_toy_sheet(seed: int = 0) -> Image.Image:
    """A picture for looking at the toy world: for each edit type a scene, its instruction and the true result."""
    edits = [sample_edit(random.Random(f"sheet/{seed}/{kind}"), kind) for kind in EDIT_TYPES]
    pairs = [tuple(to_pil(image) for image in render([e.reference, e.target])) for e in edits]
    return _draw([SheetCell(pair, e.instruction, e.edit_type) for pair, e in zip(pairs, edits)])


def draw_results_sheet(folder: Path) -> Image.Image:
    """What `benchmarks.toy.score` left in a folder: reference, result, instruction and the oracle's verdict."""
    cells = []
    for item in json.loads((folder / "items.json").read_text()):
        verdict = _verdict(item)
        pair = tuple(read_photo(folder / item[key]) for key in ("reference", "file"))
        cells.append(SheetCell(pair, item["instruction"], f"{item['edit_type']}: {verdict}"))
    return _draw(cells)


def _verdict(item: dict[str, Any]) -> str:
    """The oracle's verdict in words; those of a scene edit are others."""
    applied, preserved = ("" if item[key] else "not " for key in ("applied", "preserved"))
    if item["edit_type"] == SCENE:
        return f"scene {applied}right, subject {preserved}kept"
    return f"{applied}applied, {preserved}preserved"


def _draw(cells: Sequence[SheetCell]) -> Image.Image:
    scaled = [SheetCell(tuple(fit_side(p, SIDE) for p in c.pictures), c.text, c.note) for c in cells]
    return draw_sheet(split_rows(scaled, COLUMNS), SIDE)
