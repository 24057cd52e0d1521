"""Read the pictures that a person gives to an editor; what is wrong with one is said in a message for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npedit.data._photos import BadImage, decoding, open_image, refuse_animation, to_srgb
from npedit.errors import UserError

MAX_PIXELS = 100_000_000
MAX_SIDE_RATIO = 64


def open_picture(path: Path) -> Image.Image:
    """Read a picture completely and check it before any work is done.

    Raises:
        UserError: it is missing, a folder, empty, not a picture, truncated, an animation, or too large.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"expected a picture; {path} is a folder. Name the pictures in it.")
    if not os.path.exists(path):
        raise UserError(
            f"expected a picture; there is no file {str(path)!r}. An instruction of several words needs quotes: "
            'npedit edit picture.png "make it night"'
        )
    try:
        with decoding():
            if path.stat().st_size == 0:
                raise UserError(f"expected a picture; {path} is empty (0 bytes).")
            with open_image(path) as image:
                check_size(image, str(path))
                refuse_animation(image)
                return to_srgb(image, keep_alpha=True)
    except BadImage as error:
        if isinstance(error.__cause__, Image.UnidentifiedImageError):
            raise UserError(
                f"expected a picture (PNG, JPEG, WebP, ...); {path} is not one, or its format is unknown here."
            ) from None
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise UserError(
                f"expected at most {MAX_PIXELS // 10**6} megapixels; {path} has more. Scale it down first."
            ) from None
        fault = "is broken or truncated" if error.__cause__ else "cannot be used"  # the cause: a decoder's error
        raise UserError(f"expected a readable picture; {path} {fault}: {error}.") from None


def colour_conversion(path: Path) -> str:
    """Why the colours of a picture that `open_picture` returns differ from those in the file: "colour profile",
    "CMYK", "16 bits a channel"; "" if they are the same."""
    with decoding(), open_image(path) as image:
        reasons = {
            "16 bits a channel": image.mode.startswith("I") or ";16" in str(image.tile),
            "CMYK": image.mode == "CMYK",
            "colour profile": image.mode != "CMYK" and _profile_changes_colours(image, str(path)),
        }
        return ", ".join(reason for reason, applies in reasons.items() if applies)


def _profile_changes_colours(image: Image.Image, name: str) -> bool:
    """Whether a picture's colour profile changes any of the colours of a grid."""
    if not (icc := image.info.get("icc_profile")):
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    is_grey = image.mode.startswith(("1", "L", "I"))
    grid = steps[None] if is_grey else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    probe: Any = Image.fromarray(grid)
    probe.info["icc_profile"], probe.filename = icc, name
    return to_srgb(probe).tobytes() != Image.fromarray(grid).convert("RGB").tobytes()


def check_size(image: Image.Image, name: str) -> None:
    """Check the size of a picture, whose pixels need not be decoded yet. `name` is what the message calls it.

    Raises:
        UserError: it has no pixels, more than `MAX_PIXELS`, or sides that are not within 1:`MAX_SIDE_RATIO`.
    """
    w, h = image.size
    if w < 1 or h < 1:
        raise UserError(f"expected a picture with pixels; {name} is {w}x{h}.")
    if w * h > MAX_PIXELS:
        raise UserError(f"expected at most {MAX_PIXELS // 10**6} megapixels; {name} is {w}x{h}. Scale it down first.")
    if max(w, h) > MAX_SIDE_RATIO * min(w, h):
        raise UserError(f"expected sides within 1:{MAX_SIDE_RATIO}; {name} is {w}x{h}. Crop it first.")


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB picture in sRGB: see `to_srgb`; transparent parts become white.

    Raises:
        UserError: it has no pixels, is too large, or holds floating-point values.
    """
    check_size(image, "the picture")
    try:
        return to_srgb(image)
    except BadImage as error:
        raise UserError(
            f"expected a readable picture of 8 or 16 bits a channel; got: {error}. Save it as a PNG or JPEG"
        ) from None
