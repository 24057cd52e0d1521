"""Write pictures: sRGB with its profile, whole or not at all, within what the file format can hold. `xmp` is a packet
of metadata for the file, b"" for none."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from npedit.data._photos import composite_on_white, srgb_profile
from npedit.errors import UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ALPHA = {".png", ".webp"}  # the suffixes of formats with transparency
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}  # of Pillow, by format
LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383}  # in pixels, by the formats' own specifications
STRIP_ROWS = 256  # of a picture whose transparency is restored at a time


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try a file there, so that a bad place is reported before the work.

    Raises:
        UserError: the file cannot be written.
    """
    if os.path.isdir(path):
        raise UserError(f"expected a file to write; {path} is a folder. Give a file name in it.")
    probe = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"expected a place that can be written; got {path}: {error.strerror or error}. Give another path"
        ) from None


def require_size(size: tuple[int, int], path: Path) -> None:
    """Check that a picture of this (width, height) can be written to `path`.

    Raises:
        UserError: a side is longer than the file format allows.
    """
    kind = FORMATS.get(path.suffix.lower(), "")
    longest = LONGEST_SIDE.get(kind)
    if longest and max(size) > longest:
        raise UserError(
            f"expected at most {longest} pixels a side for {kind}; the result for {path} has {size[0]}x{size[1]}. "
            "Write a .png instead."
        )


def restore_transparency(edited: Image.Image, original: Image.Image) -> Image.Image:
    """The RGBA picture that looks on white like `edited`, an RGB edit of the RGBA `original` on white. It has the
    original's alpha channel, and the original's colours where nothing changed. It is made in strips of bounded memory.
    """
    out = Image.new("RGBA", original.size)
    for top in range(0, out.height, STRIP_ROWS):
        box = (0, top, out.width, min(top + STRIP_ROWS, out.height))
        out.paste(_restore_strip(edited.crop(box), original.crop(box)), (0, top))
    return out


def _restore_strip(edited: Image.Image, original: Image.Image) -> Image.Image:
    before, after = np.asarray(original), np.asarray(edited)
    is_unchanged = (after == np.asarray(composite_on_white(original))).all(-1, keepdims=True)
    alpha = before[..., 3:].astype(np.float32) / 255
    colours = (after - 255 * (1 - alpha)) / np.maximum(alpha, 1 / 255)  # inverts c = a x + 255 (1 - a)
    colours = np.where(is_unchanged | (alpha == 0), before[..., :3], colours.clip(0, 255).round())
    return Image.fromarray(np.concatenate([colours.astype(np.uint8), before[..., 3:]], -1))


def save_picture(picture: Image.Image, path: Path, overwrite: bool = True, xmp: bytes = b"") -> None:
    """Write a picture to a temporary file and rename it, so that the file is whole whenever it is there.

    Raises:
        UserError: it cannot be written, its suffix is unknown, or the file exists and `overwrite` is false.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"expected a name ending in {', '.join(FORMATS)}; got {path}. Change the ending.")
    require_size(picture.size, path)
    aside = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(picture, aside, kind, xmp)
        if not overwrite and os.path.lexists(path):
            raise UserError(
                f"expected a new file; {path} was made meanwhile. Choose another place, or use --overwrite."
            )
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"expected to write {path}; got: {error.strerror or error}. Choose another place.") from None
    finally:
        aside.unlink(missing_ok=True)


def encode_picture(picture: Image.Image, kind: str, xmp: bytes = b"") -> bytes:
    """The bytes of a picture's file; `kind` is one of the values of `FORMATS`."""
    buffer = io.BytesIO()
    _save(picture, buffer, kind, xmp)
    return buffer.getvalue()


def write_to_stdout(picture: Image.Image, xmp: bytes = b"") -> None:
    """Write a picture to standard output as PNG."""
    sys.stdout.buffer.write(encode_picture(picture, "PNG", xmp))
    sys.stdout.buffer.flush()


def _save(picture: Image.Image, target: Path | IO[bytes], kind: str, xmp: bytes) -> None:
    picture.save(target, kind, icc_profile=srgb_profile(), **OPTIONS.get(kind, {}), **_xmp_options(kind, xmp))


def _xmp_options(kind: str, xmp: bytes) -> dict[str, Any]:
    """Pillow's options to save a file of this kind with a packet of XMP."""
    if not xmp:
        return {}
    if kind != "PNG":
        return {"xmp": xmp}
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8"))
    return {"pnginfo": texts}


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
