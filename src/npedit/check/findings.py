"""What a check reports: findings by severity, tables, texts and pictures, in sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Severity = Literal["ok", "note", "warning", "will not learn"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "will not learn")  # from harmless to fatal
Cell = str | int | float | None  # None: not measured


@dataclass(frozen=True)
class Finding:
    """One result of a check. `key` names the kind of finding. `measured` is the fact, `meaning` what follows from it,
    `advice` what to do; the last two are "" for a finding that is "ok"."""

    key: str
    severity: Severity
    measured: str
    meaning: str = ""
    advice: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table of a section: one row a list, in the order of `head`."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class ReportPicture:
    """A picture of a section, and what it shows."""

    caption: str
    picture: Image.Image


@dataclass
class Section:
    """One part of the report. `texts` are (title, text shown as it is)."""

    name: str
    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[ReportPicture] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, key: str, severity: Severity, measured: str, meaning: str = "", advice: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(key, severity, measured, meaning, advice))

    def add_table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Add a table; one without rows is left out."""
        if rows:
            self.tables.append(ReportTable(title, tuple(head), tuple(tuple(row) for row in rows)))


@dataclass(frozen=True)
class CheckReport:
    """The whole report of one recipe."""

    recipe: str
    sections: tuple[Section, ...]

    @property
    def findings(self) -> list[Finding]:
        """The findings of all sections, in their order."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def verdict(self) -> Severity:
        """The worst severity of all findings; "ok" if there are none."""
        found = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return SEVERITIES[max(found, default=0)]

    @property
    def exit_code(self) -> int:
        """1 if a finding says "will not learn", else 0."""
        return int(self.verdict == "will not learn")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON. Pictures are given by their captions."""
        return {
            "recipe": self.recipe,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "sections": [
                {
                    "name": section.name,
                    "seconds": round(section.seconds, 2),
                    "findings": [vars(finding) for finding in section.findings],
                    "tables": [
                        {"title": table.title, "head": list(table.head), "rows": [list(row) for row in table.rows]}
                        for table in section.tables
                    ],
                    "texts": [{"title": title, "text": text} for title, text in section.texts],
                    "pictures": [picture.caption for picture in section.pictures],
                }
                for section in self.sections
            ],
        }


def format_cell(value: Cell) -> str:
    """A table's value as text: three significant digits; "-" for a value that was not measured."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
