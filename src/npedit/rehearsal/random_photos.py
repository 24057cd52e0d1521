"""A folder of random photos with instructions and captions, in the form that `imagefolder` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npedit.errors import explain_write_errors
from npedit.questions import EDIT_TYPES, IDENTITY_EDIT, SCENE

PER_SIZE = 8  # photos of each training size; more if these would not show all edit types
LARGER = 1.25  # a photo's sides, as a multiple of the training size's
PER_SUBJECT = 2  # photos of one subject
LOCAL_TYPES = tuple(t for t in EDIT_TYPES if t not in (IDENTITY_EDIT, SCENE))


def types_of_shares(shares: Mapping[str, float]) -> tuple[str, ...]:
    """The edit types of photos for a recipe with these `data.shares`: scenes only where the recipe has them, and no
    others where the shares add up to 1."""
    used = tuple(name for name, share in shares.items() if share > 0)
    return used if sum(shares.values()) > 1 - 1e-9 else tuple(dict.fromkeys((*LOCAL_TYPES, *used)))


def write_random_photos(
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    seed: int = 0,
    types: Sequence[str] = LOCAL_TYPES,
    with_masks: bool = False,
) -> Path:
    """Write JPEG photos of noise and `metadata.jsonl`; returns the folder. `sizes` are (H, W) in pixels. The edit types
    take turns, and all of them occur. Two photos that follow each other show one subject. With masks, the edit may
    change the left half of each photo.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    rng, per_size = np.random.default_rng(seed), max(PER_SIZE, math.ceil(len(types) / len(sizes)))
    rows = []
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for i, (height, width) in enumerate(size for size in sizes for _ in range(per_size)):
            name = f"{i:04d}.jpg"
            _random_photo(rng, round(height * LARGER), round(width * LARGER)).save(folder / name, quality=90)
            group = f"subject {i // PER_SUBJECT}"
            mask = _write_mask(folder, i, round(height * LARGER), round(width * LARGER)) if with_masks else {}
            rows.append({"file_name": name, "group": group, **_random_texts(types[i % len(types)], i), **mask})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _random_photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Coarse patches of colour with fine noise, so that JPEG files have about the size of photos."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8))


def _write_mask(folder: Path, number: int, height: int, width: int) -> dict[str, str]:
    """Write a mask that is white in its left half; returns the column that names it."""
    name = f"{number:04d}-mask.png"
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    mask.save(folder / name)
    return {"mask_file_name": name}


def _random_texts(edit_type: str, number: int) -> dict[str, Any]:
    thing = f"thing number {number}"
    return {
        "questions": [{"question": f"Is the {thing} changed? Look at part {i}.", "answer": "yes"} for i in range(3)],
        "instruction": f"change the {thing} in this photo as {edit_type} asks",
        "edit_type": edit_type,
        "object": thing,
        "source_caption": f"a photo of a room with a {thing} on a table beside a window",
        "target_caption": f"a photo of a room with a changed {thing} on a table beside a window",
    }
