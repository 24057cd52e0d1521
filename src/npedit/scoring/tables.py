"""Tables of results: the same table is printed in a terminal, and written to HTML pages and Markdown files. Values with
their intervals, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import table as rich_tables
from rich.markup import escape

Interval = Sequence[float] | None


@dataclass(frozen=True)
class TableRow:
    """The cells of a row, in the order of the table's columns. `begins_section`: a line is drawn above the row."""

    cells: tuple[str, ...]
    is_bold: bool = False
    begins_section: bool = False


@dataclass
class TextTable:
    """A table whose cells are text.

    Attributes:
        head: the names of the columns.
        left: the names of the columns with words, which are aligned to the left. Figures are aligned to the right.
        caption: a sentence about the figures; "" for none.
    """

    title: str
    head: tuple[str, ...]
    left: tuple[str, ...] = ()
    caption: str = ""
    rows: list[TableRow] = field(default_factory=list)

    def add_row(self, *cells: object, is_bold: bool = False, begins_section: bool = False) -> None:
        """Add a row at the end; a cell that is no text is converted with `str`."""
        self.rows.append(TableRow(tuple(map(str, cells)), is_bold, begins_section))


def rich_table(table: TextTable) -> rich_tables.Table:
    """The table as rich prints it in a terminal."""
    shown = rich_tables.Table(title=escape(table.title) or None, caption=escape(table.caption) or None)
    for name in table.head:
        shown.add_column(escape(name), justify="left" if name in table.left else "right", overflow="fold")
    for row in table.rows:
        if row.begins_section:
            shown.add_section()
        shown.add_row(*map(escape, row.cells), style="bold" if row.is_bold else "")
    return shown


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def format_interval(interval: Interval, digits: int = 4) -> str:
    """An interval as text: "[0.4790, 0.5660]"; "-" for none."""
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "-"


def format_estimate(value: float, interval: Interval, digits: int = 4) -> str:
    """A value with its interval, if it has one: "0.5230 [0.4790, 0.5660]"."""
    return f"{value:.{digits}f} {format_interval(interval, digits)}" if interval else f"{value:.{digits}f}"
