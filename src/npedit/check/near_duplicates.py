"""Photos that are in training and among the held-out rows at the same time, or nearly so, as `npedit prepare` groups
them (`prepare/duplicates.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from npedit.prepare.duplicates import group_near_duplicates, similarity_facts

SHOWN_SIDE = 32  # pixels


@dataclass(frozen=True)
class HashedPhoto:
    """A photo's name, its `similarity_facts`, and a thumbnail (32, 32, 3) in [0, 1] for the report."""

    name: str
    facts: Mapping[str, str]
    thumbnail: np.ndarray


def hash_photo(name: str, picture: Image.Image) -> HashedPhoto:
    """The facts and the thumbnail of a picture."""
    rgb = picture.convert("RGB")
    small = rgb.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR)
    return HashedPhoto(name, similarity_facts(rgb), np.asarray(small, dtype=np.float32) / 255)


def find_near_duplicates(
    held_out: Sequence[HashedPhoto], training: Sequence[HashedPhoto]
) -> list[tuple[HashedPhoto, HashedPhoto]]:
    """(held-out photo, training photo) for each held-out photo that is in a group with one of training."""
    photos = [*held_out, *training]
    rows = [{"id": str(i), "name": f"{i:09d}", **photo.facts} for i, photo in enumerate(photos)]
    groups = group_near_duplicates(rows)
    of_training: dict[str, HashedPhoto] = {}
    for i, photo in enumerate(training, len(held_out)):
        of_training.setdefault(groups[str(i)], photo)
    pairs = ((photo, of_training.get(groups[str(i)])) for i, photo in enumerate(held_out))
    return [(photo, same) for photo, same in pairs if same is not None]
