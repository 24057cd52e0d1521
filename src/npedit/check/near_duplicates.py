"""Photos that are in training and among the held-out rows at the same time, or nearly so: perceptual hashes.

A hash of 64 bits (pHash, package imagehash) finds candidates; then the two thumbnails are compared pixel by pixel, as
simple pictures have similar hashes. Scaled and recompressed copies are found; crops and mirrored copies are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

LARGEST_DISTANCE = 8  # bits of 64 that the hashes of near-duplicates differ in at most
LARGEST_DIFFERENCE = 0.1  # of the full range: the mean absolute difference in the cell of the thumbnails with most
THUMBNAIL, CELL = 32, 4  # sides in pixels


@dataclass(frozen=True)
class HashedPhoto:
    """A photo's name, its hash as 64 bits, and its thumbnail (32, 32, 3) in [0, 1]."""

    name: str
    bits: np.ndarray
    thumbnail: np.ndarray


def hash_photo(name: str, picture: Image.Image) -> HashedPhoto:
    """The hash and the thumbnail of a picture."""
    small = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return HashedPhoto(name, imagehash.phash(picture).hash.flatten(), np.asarray(small, dtype=np.float32) / 255)


def find_near_duplicates(
    held_out: Sequence[HashedPhoto], training: Sequence[HashedPhoto]
) -> list[tuple[HashedPhoto, HashedPhoto]]:
    """(held-out photo, training photo) for each held-out photo that is nearly the same as one of training."""
    if not held_out or not training:
        return []
    bits = np.stack([photo.bits for photo in training])
    found = []
    for photo in held_out:
        distance = (bits != photo.bits).sum(1)
        for number in np.argsort(distance, kind="stable"):
            if distance[number] > LARGEST_DISTANCE:
                break
            if _largest_difference(training[number].thumbnail, photo.thumbnail) <= LARGEST_DIFFERENCE:
                found.append((photo, training[number]))
                break
    return found


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """See `LARGEST_DIFFERENCE`."""
    count = THUMBNAIL // CELL
    return float(np.abs(a - b).reshape(count, CELL, count, CELL, 3).mean((1, 3, 4)).max())
