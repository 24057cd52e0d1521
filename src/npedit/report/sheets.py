"""Sheets of pictures: rows of cells in one picture, each cell with pictures side by side and text under them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

GAP, LINE_HEIGHT, FONT_SIZE = 12, 18, 14  # pixels
TEXT_COLOUR, NOTE_COLOUR = "#1c2330", "#8a919c"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
T = TypeVar("T")


@dataclass(frozen=True)
class SheetCell:
    """Pictures side by side. The text under them is wrapped; the note is one grey line under the text."""

    pictures: tuple[Image.Image, ...]
    text: str
    note: str = ""


def draw_sheet(rows: Sequence[Sequence[SheetCell]], side: int, text_lines: int = 1) -> Image.Image:
    """The cells as one picture. `side` is the space of each picture in pixels; larger pictures are cut, so scale them
    with `fit_side` first. Text beyond `text_lines` lines, and one more for notes, is cut."""
    has_notes = any(cell.note for row in rows for cell in row)
    height = side + 8 + LINE_HEIGHT * (text_lines + has_notes) + GAP
    width = max(sum(_cell_width(cell, side) for cell in row) for row in rows)
    sheet = Image.new("RGB", (width, GAP + len(rows) * height), "white")
    for number, row in enumerate(rows):
        left = 0
        for cell in row:
            _draw_cell(sheet, cell, (left + GAP, GAP + number * height), side, text_lines)
            left += _cell_width(cell, side)
    return sheet


def fit_side(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of `side` pixels. A smaller picture is enlarged in blocks, so that its pixels can
    be seen."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def split_rows(cells: Sequence[T], columns: int) -> list[Sequence[T]]:
    """The cells in rows of `columns`; the last row may be shorter."""
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def _cell_width(cell: SheetCell, side: int) -> int:
    return len(cell.pictures) * (side + GAP) + GAP


def _draw_cell(sheet: Image.Image, cell: SheetCell, corner: tuple[int, int], side: int, text_lines: int) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    for number, picture in enumerate(cell.pictures):
        shown = picture.crop((0, 0, min(side, picture.width), min(side, picture.height)))
        sheet.paste(shown, (left + number * (side + GAP), top))
    font, width = ImageFont.load_default(size=FONT_SIZE), _cell_width(cell, side) - 2 * GAP
    lines = list(_wrapped_lines(cell.text, font, width, text_lines))
    notes = list(_wrapped_lines(cell.note, font, width, 1))
    for number, line in enumerate([*lines, *notes]):
        colour = TEXT_COLOUR if number < len(lines) else NOTE_COLOUR
        draw.text((left, top + side + 4 + LINE_HEIGHT * number), line, fill=colour, font=font)


def _wrapped_lines(text: str, font: Font, width: int, most: int) -> Iterator[str]:
    """At most `most` lines of the text, none wider than `width` pixels; the last ends with "..." if text is left."""
    words = _drawable(text[: most * width + 1]).split()  # no character is narrower than a pixel
    for number in range(most):
        if not words:
            return
        count = max((k for k in range(1, len(words) + 1) if font.getlength(" ".join(words[:k])) <= width), default=1)
        is_cut = number + 1 == most and count < len(words)
        line, words = " ".join(words[:count]), words[count:]
        yield _cut(f"{line}..." if is_cut else line, font, width)


def _cut(line: str, font: Font, width: int) -> str:
    """The beginning of a line that is not wider than `width` pixels."""
    while len(line) > 4 and font.getlength(line) > width:
        line = f"{line[:-4]}..."
    return line


def _drawable(text: str) -> str:
    """The text in the characters that Pillow's own font has."""
    return text.encode("latin-1", "replace").decode("latin-1")
