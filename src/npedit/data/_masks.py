"""Masks: pictures that are white where an edit may change the photo, and black where the photo must stay."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from npedit.data._photos import BadImage, crop_to_fill, read_photo, read_photo_size

MAX_DIFFERENCE = 0.02  # of the logarithms of both aspect ratios: a scaled mask's sides are rounded


def load_keep_mask(mask: Path | bytes, photo: Path | bytes, size: tuple[int, int]) -> Tensor:
    """A mask as (1, H, W) in [0, 1], 1 where the photo must stay: cropped and scaled to `size` = (H, W) exactly as
    `load_photo` does it with its photo. A pixel at the border of the region has the share of its area that must stay.

    Raises:
        BadImage: the mask cannot be read, or has another shape than the photo.
    """
    image = read_photo(mask).convert("L")
    height, width = read_photo_size(photo)
    if abs(math.log(image.width / image.height) - math.log(width / height)) > MAX_DIFFERENCE:
        raise BadImage(
            f"expected a mask in the shape of its photo, {width} x {height} pixels (width x height); got "
            f"{image.width} x {image.height}"
        )
    pixels = np.array(crop_to_fill(image, size, Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(1 - pixels[None] / np.float32(255))
