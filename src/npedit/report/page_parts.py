"""The parts of all HTML pages: head and style, tables, figures, pictures inside the page. A page needs no other file.

Each function returns `Html`. Text that is not `Html` is escaped, so that no text of a person or a model becomes HTML.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from npedit.scoring.tables import TextTable

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6472; --paper: #fbfbfa; --card: #ffffff; --line: #e3e5e8;
  --good: #0a7d55; --bad: #b3402f; --warn: #96650a }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #9aa3b2; --paper: #14171c; --card: #1c2027;
  --line: #2e343d; --good: #4cc79a; --bad: #f08a76; --warn: #e0b050 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; margin: 0 0 .25rem } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem }
p { margin: .4rem 0 } .soft, caption, figcaption, th { color: var(--soft) }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.1rem }
.figures b { display: block; font-size: 1.6rem; line-height: 1.25 }
figure { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
figure img { display: block; max-width: 100%; height: auto } figcaption { font-size: .9rem; margin-top: .6rem }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; background: var(--card);
  border: 1px solid var(--line); font-size: .95rem }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; font-size: .85rem } th.left, td.left { text-align: left }
tr.bold td { font-weight: 700 } tr.section td { border-top: 2px solid var(--line) }
.words { white-space: normal; max-width: 15rem; text-align: left }
.pictures td, .pictures th { text-align: center } .pictures img { display: block; margin: 0 auto; border-radius: .3rem;
  image-rendering: pixelated }
.alarm { border: 2px solid var(--bad); border-radius: .6rem; padding: .8rem 1.1rem; margin: 1.4rem 0 }
.yes { color: var(--good) } .no { color: var(--bad) }
pre { padding: 1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  font-size: .85rem }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0 }
"""
ENLARGED_SIDE = 320  # pixels up to which a small picture is enlarged by whole numbers
THUMBNAIL_SIDE = 160  # CSS pixels of a picture's longer side


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Text as HTML; `Html` as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def join(parts: Iterable[object]) -> Html:
    """The parts one after the other."""
    return Html("".join(map(escape, parts)))


def element(tag: str, *content: object, kind: str = "", anchor: str = "") -> Html:
    """An element with its content. `kind` is its class in the style sheet, `anchor` its name in links (#anchor)."""
    attributes = "".join(f' {name}="{html.escape(v)}"' for name, v in (("class", kind), ("id", anchor)) if v)
    return Html(f"<{tag}{attributes}>{join(content)}</{tag}>")


def document(title: str, parts: Iterable[object], style: str = "") -> str:
    """The whole page; `style` is added to the common style sheet."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body>{join(parts)}</body></html>\n"
    )


def key_figures(figures: Iterable[tuple[object, object]]) -> Html:
    """Boxes with a (label, figure) each, the figure in large type; "" for no figures."""
    boxes = [element("div", element("b", figure), label) for label, figure in figures]
    return element("div", *boxes, kind="figures") if boxes else Html("")


def details(summary: str, text: str, is_open: bool = False) -> Html:
    """A text as it is, which a reader can fold."""
    return Html(f"<details{' open' if is_open else ''}>{element('summary', summary)}{element('pre', text)}</details>")


# ------------------------------------------------------------------------------------------------------------ tables


def text_table(table: TextTable) -> Html:
    """The table with its caption beneath it; its title is the page's to write."""
    left = [name in table.left for name in table.head]
    rows: list[Html] = []
    for row in table.rows:
        kinds = ["bold"] * row.is_bold + ["section"] * (row.begins_section and bool(rows))
        rows.append(element("tr", *_cells("td", row.cells, left), kind=" ".join(kinds)))
    caption = element("p", table.caption, kind="soft") if table.caption else ""
    return join([_scrollable_table([element("tr", *_cells("th", table.head, left)), *rows]), caption])


def picture_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose cells are pictures and texts, centred."""
    lines = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return _scrollable_table([element("tr", *(element("th", name) for name in head)), *lines], "pictures")


def _scrollable_table(rows: Sequence[Html], kind: str = "") -> Html:
    return element("div", element("table", *rows, kind=kind), kind="wide")


def _cells(tag: str, cells: Sequence[object], left: Sequence[bool]) -> list[Html]:
    return [element(tag, cell, kind="left" if is_left else "") for cell, is_left in zip(cells, left, strict=True)]


# ---------------------------------------------------------------------------------------------------------- pictures


def encode_png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as an address that holds the whole file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture(image: Image.Image, alt: str) -> Html:
    """A picture at its size in pixels."""
    return _image_tag(encode_png(image), alt, image.size)


def thumbnail(image: Image.Image, alt: str) -> Html:
    """A picture with a longer side of `THUMBNAIL_SIDE`. Small pictures are enlarged in blocks of whole pixels."""
    factor = max(1, ENLARGED_SIDE // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if max(image.size) > 2 * ENLARGED_SIDE:
        image.thumbnail((2 * ENLARGED_SIDE, 2 * ENLARGED_SIDE))
    scale = THUMBNAIL_SIDE / max(image.size)
    return _image_tag(encode_png(image), alt, (round(image.width * scale), round(image.height * scale)))


def _image_tag(png: bytes, alt: str, size: tuple[int, int]) -> Html:
    return Html(f'<img src="{data_uri(png)}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}">')


def light_and_dark_picture(light: bytes, dark: bytes, alt: str) -> Html:
    """A figure's two PNG files: the reader's browser shows the one for a light or for a dark page."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
    return Html(f'<picture>{source}<img src="{data_uri(light)}" alt="{escape(alt)}"></picture>')


def figure(image: Html, caption: str) -> Html:
    """A picture in a frame, with its caption."""
    return element("figure", image, element("figcaption", caption))
