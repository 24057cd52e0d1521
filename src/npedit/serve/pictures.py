"""Edited pictures as the bytes of a file."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from npedit.data._photos import srgb_profile

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
OPTIONS: dict[str, dict[str, Any]] = {"png": {"compress_level": 4}, "jpeg": {"quality": 95}, "webp": {"quality": 95}}


def encode_picture(picture: Image.Image, output_format: str, editor: str) -> bytes:
    """The file of an edited picture, with metadata that say that the editor of this name made it with AI.
    `output_format` is one of `MEDIA_TYPES`."""
    out = io.BytesIO()
    picture.save(out, output_format.upper(), icc_profile=srgb_profile(), **OPTIONS[output_format])
    return out.getvalue()
