"""Pictures of the report: rows of images with a line of text above each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 128  # pixels of a picture's longer side
TEXT_WIDTH, LINE_HEIGHT, LINES, GAP = 22, 11, 4, 6  # characters a line, pixels, lines, pixels


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture of 8 bits."""
    pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)


def draw_grid(rows: Sequence[Sequence[tuple[str, Tensor]]]) -> Image.Image:
    """Rows of (text, image (3, H, W) in [0, 1]) as one picture. Images are scaled to `SIDE`; rows may differ in
    length."""
    height = SIDE + LINES * LINE_HEIGHT + GAP
    grid = Image.new("RGB", (max(len(row) for row in rows) * (SIDE + GAP) + GAP, len(rows) * height + GAP), "white")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        for k, (text, image) in enumerate(row):
            left, top = GAP + k * (SIDE + GAP), GAP + i * height
            for number, line in enumerate(textwrap.wrap(text, TEXT_WIDTH)[:LINES]):
                draw.text((left, top + number * LINE_HEIGHT), _drawable(line), "black")
            grid.paste(_scaled(to_picture(image)), (left, top + LINES * LINE_HEIGHT))
    return grid


def _drawable(line: str) -> str:
    """The text in the characters that Pillow's own font has."""
    return line.encode("latin-1", "replace").decode("latin-1")


def _scaled(picture: Image.Image) -> Image.Image:
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
