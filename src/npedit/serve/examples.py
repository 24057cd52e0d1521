"""Examples for the page of an editor of the toy world: scenes, and instructions that the toy knows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from npedit.data._photos import to_pil
from npedit.toy.edits import sample_edit
from npedit.toy.world import render

EDIT_TYPES = ("recolour", "background", "add", "replace", "style")
ENLARGED = 10  # how much larger a scene is than the toy draws it


def write_examples(folder: Path, edit_types: Sequence[str] = EDIT_TYPES) -> list[list[str]]:
    """Write one scene for each edit type; returns (file, instruction) of each. The same scenes each time."""
    rows = []
    for edit_type in edit_types:
        edit = sample_edit(random.Random(f"page/{edit_type}"), edit_type)
        scene = to_pil(render([edit.reference])[0])
        size = (scene.width * ENLARGED, scene.height * ENLARGED)
        file = folder / f"{edit_type}.png"
        scene.resize(size, Image.Resampling.NEAREST).save(file)
        rows.append([str(file), edit.instruction])
    return rows
