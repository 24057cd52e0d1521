"""The parts of all pages: text is escaped, pictures are inside the page, sheets put each cell in its place."""

import base64
import io
import re

import numpy as np
from PIL import Image
from rich.console import Console

from npedit.report import page_parts as parts
from npedit.report.page_parts import Html, element
from npedit.report.sheets import SheetCell, draw_sheet, fit_side, split_rows
from npedit.scoring.tables import TextTable, format_estimate, markdown_table, rich_table

NASTY = '<script>&"[red]'
ESCAPED = "&lt;script&gt;&amp;&quot;[red]"


def nasty_table():
    table = TextTable(NASTY, ("name", NASTY), left=("name",), caption=NASTY)
    table.add_row("one", NASTY)
    table.add_row("all", 12, is_bold=True, begins_section=True)
    return table


def test_no_text_becomes_html():
    made = parts.document(NASTY, [element("p", NASTY, Html("<b>"), kind=NASTY), parts.details(NASTY, NASTY)])
    assert "<script" not in made and made.count(ESCAPED) == 5 and made.count("<b>") == 1
    assert "<script" not in parts.text_table(nasty_table()) + parts.figure(Html(""), NASTY)
    assert parts.picture(Image.new("RGB", (3, 2)), NASTY).endswith(f'width="3" height="2" alt="{ESCAPED}">')


def test_one_table_for_terminal_page_and_markdown():
    table = nasty_table()
    rows = re.findall(r"<tr.*?</tr>", parts.text_table(table))
    assert rows == [
        f'<tr><th class="left">name</th><th>{ESCAPED}</th></tr>',
        f'<tr><td class="left">one</td><td>{ESCAPED}</td></tr>',
        '<tr class="bold section"><td class="left">all</td><td>12</td></tr>',
    ]
    console = Console(file=io.StringIO(), width=60)
    console.print(rich_table(table))
    said = console.file.getvalue()
    assert said.count(NASTY) == 4 and re.search(r"│ all  │ +12 │", said)
    assert markdown_table(("a", "b"), [(1, "x|y")]) == ["| a | b |", "| --- | --- |", "| 1 | x\\|y |"]
    assert format_estimate(0.5, (0.25, 0.75), 2) == "0.50 [0.25, 0.75]" and format_estimate(0.5, None) == "0.5000"


def test_a_thumbnail_shows_the_pixels_of_a_small_picture_and_less_of_a_large_one():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    made = parts.thumbnail(Image.fromarray(pixels), "a")
    assert 'width="160" height="80"' in made
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", made)[1]))))
    assert found.shape == (160, 320, 3) and (found[5::10, 5::10] == pixels).all()
    large = parts.thumbnail(Image.new("RGB", (4000, 1000)), "a")
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", large)[1])))
    assert shown.size == (640, 160) and 'width="160" height="40"' in large


def test_a_sheet_puts_each_picture_in_its_place_and_cuts_long_texts():
    colours = ["red", "blue", "lime", "cyan", "gray"]
    pictures = [fit_side(Image.new("RGB", (4, 2), colour), 40) for colour in colours]
    cells = [SheetCell((pictures[0], pictures[1]), "a " * 60, "note"), SheetCell((pictures[2],), "b")]
    rows = [*split_rows(cells, 2), [SheetCell((pictures[3], pictures[4]), "\u4e2d")]]
    sheet = np.asarray(draw_sheet(rows, 40, text_lines=2))
    height = 40 + 8 + 3 * 18 + 12
    assert sheet.shape == (12 + 2 * height, 3 * 52 + 2 * 12, 3)
    lefts, tops = (12, 64, 128, 12, 64), (12, 12, 12, 12 + height, 12 + height)
    for colour, left, top in zip(colours, lefts, tops):
        expected = np.asarray(Image.new("RGB", (40, 20), colour))
        assert (sheet[top : top + 20, left : left + 40] == expected).all()
    text = (sheet != 255).any(-1)
    assert text[52:106, 12:104].any() and not text[52 : 12 + height, 104:128].any()  # the long text stays in its cell


def test_a_very_long_text_is_drawn_as_its_beginning():
    """A sheet's time must not grow with the square of a text's length."""
    picture = Image.new("RGB", (40, 40))
    short, long = (draw_sheet([[SheetCell((picture,), "word " * count)]], 40, text_lines=2) for count in (500, 100_000))
    assert (np.asarray(short) == np.asarray(long)).all()
