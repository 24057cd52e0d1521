"""Edited pictures as the bytes of a file."""

from __future__ import annotations

from PIL import Image

from npedit import output_pictures
from npedit.provenance import xmp_packet

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode_picture(picture: Image.Image, output_format: str, editor: str) -> bytes:
    """The file of an edited picture, with metadata that say that the editor of this name made it with AI.
    `output_format` is one of `MEDIA_TYPES`."""
    return output_pictures.encode_picture(picture, output_format.upper(), xmp_packet(editor))
