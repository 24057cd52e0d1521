"""Pictures of the report: rows of images with text under each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from npedit.data._photos import to_pil
from npedit.report.sheets import SheetCell, draw_sheet, fit_side

SIDE, TEXT_LINES = 128, 4  # pixels of a picture's longer side; lines of text


def draw_grid(rows: Sequence[Sequence[tuple[str, Tensor]]]) -> Image.Image:
    """Rows of (text, image (3, H, W) in [0, 1]) as one picture. Images are scaled to `SIDE`; rows may differ in
    length."""
    cells = [[SheetCell((fit_side(to_pil(image), SIDE),), text) for text, image in row] for row in rows]
    return draw_sheet(cells, SIDE, TEXT_LINES)
