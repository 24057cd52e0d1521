"""Which picture size a photo is cropped to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npedit.data._photos import BadImage, crop_and_scale
from npedit.data._scan import Facts

Size = tuple[int, int]  # (H, W)


def assign_sizes(
    facts: Facts, sizes: Sequence[Size], min_kept_share: float, max_enlargement: float
) -> tuple[np.ndarray, dict[int, str]]:
    """(the number of each photo's size in `sizes`, -1 for none; the reason for each photo that has none)."""
    pairs, kind = np.unique(facts.values["height"].astype(np.int64) << 32 | facts.values["width"], return_inverse=True)
    found, reasons = np.full(len(pairs), -1, np.int32), [""] * len(pairs)
    for k, pair in enumerate(pairs.tolist()):
        if pair:
            try:
                photo = (pair >> 32, pair & 0xFFFFFFFF)
                found[k] = sizes.index(choose_size(photo, sizes, min_kept_share, max_enlargement))
            except BadImage as error:
                reasons[k] = str(error)
    found = found[kind]
    bad = np.flatnonzero(found < 0).tolist()
    return found, {number: facts.reasons.get(number) or reasons[kind[number]] for number in bad}


def choose_size(photo: Size, sizes: Sequence[Size], min_kept_share: float, max_enlargement: float) -> Size:
    """The size of the aspect nearest to the photo's.

    Raises:
        BadImage: the crop to it would keep too little of the photo, or would have to be enlarged too much.
    """
    aspect = math.log(photo[1] / photo[0])
    size = min(sizes, key=lambda s: abs(math.log(s[1] / s[0]) - aspect))
    kept, enlargement = crop_and_scale(photo, size)
    got = f"a photo of {photo[1]} x {photo[0]} pixels, width x height, cropped to {size[1]} x {size[0]}"
    if kept < min_kept_share:
        raise BadImage(f"{got}, keeps {kept:.1%} of itself, less than data.min_kept_share = {min_kept_share:.1%}")
    if enlargement > max_enlargement * (1 + 1e-9):
        raise BadImage(
            f"{got}, is enlarged {enlargement:.3g} times, more than data.max_enlargement = {max_enlargement:g}"
        )
    return size
