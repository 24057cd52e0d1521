"""Photos as training wants them: upright, 8-bit RGB, cut to one size, every pixel from the picture.

Deviation from the reimplementation, which resizes the short side and pads with black: a cut here always fills its size.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_PIL_ERRORS = (  # what Pillow raises on broken files
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error, zlib.error, MemoryError,
    Image.DecompressionBombError,
)  # fmt: skip


class BadImage(Exception):
    """A picture that cannot be trained on; the message is the reason."""


def read_photo_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(H, W) of a photo as it is shown, read from its header.

    Raises:
        BadImage: missing, not an image, zero-sized, too large, or broken as far as the header tells.
    """
    try:
        if not path.is_file():
            raise BadImage("no such file")
        if not path.stat().st_size:
            raise BadImage("an empty file")
        with Image.open(path) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise BadImage(f"zero-sized: {width} x {height}")
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
            # A PNG's orientation may stand behind its pixels and is not worth decoding them: any cut fills its bucket.
            exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
            turned = exif.get(0x0112, 1) in (5, 6, 7, 8)
            image.verify()
    except _PIL_ERRORS as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return (width, height) if turned else (height, width)


def flatten(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: transparency on white, 16-bit values scaled.

    Raises:
        ValueError: floating-point or 32-bit pixels, whose range is unknown.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("expected values of 8 or 16 bits; got 32-bit ones")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("expected values of 8 or 16 bits; got floating-point ones")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred cut of the shape `size` = (H, W), scaled to it. Every pixel comes from the picture."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, image.width), min(top + height * scale, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def open_photo(path: Path, size: tuple[int, int]) -> Tensor:
    """A photo as (3, H, W) in [0, 1], turned upright, in RGB, cut to `size` = (H, W).

    Raises:
        BadImage: it cannot be decoded.
    """
    try:
        if not path.is_file():
            raise BadImage("no such file")
        with Image.open(path) as image:
            image.draft(None, (2 * max(size), 2 * max(size)))  # JPEG alone: decode a large photo at a fraction of it
            pixels = np.array(cover(flatten(ImageOps.exif_transpose(image)), size))
    except _PIL_ERRORS as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def open_whole(path: Path, max_pixels: int = 80_000_000) -> Image.Image:
    """A picture at its own size, turned upright, in RGB.

    Raises:
        BadImage: missing, too large, or it cannot be decoded.
    """
    read_photo_size(path, max_pixels)
    try:
        with Image.open(path) as image:
            return flatten(ImageOps.exif_transpose(image))
    except _PIL_ERRORS as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error
