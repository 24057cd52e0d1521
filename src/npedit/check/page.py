"""The report of a check as one HTML file, in the style of a run's report. The file needs no other file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from npedit.check.findings import SEVERITIES, CheckReport, Finding, ReportPicture, ReportTable, Section, format_cell
from npedit.report import page_parts as parts
from npedit.report.page_parts import Html, element
from npedit.runs.files import write_text
from npedit.scoring.tables import TextTable

VERDICTS = {
    "ok": "Nothing was found that speaks against training.",
    "note": "Nothing was found that speaks against training. Read the notes.",
    "warning": "Training can start, but read the warnings first.",
    "will not learn": "With this recipe, these data and these models the editor will not learn.",
}
KINDS = {"ok": "ok", "note": "note", "warning": "warning", "will not learn": "fatal"}  # classes of CHECK_STYLE
CHECK_STYLE = """
.finding { border-left: .3rem solid var(--soft); padding: .2rem 1rem; margin: .8rem 0; background: var(--card) }
.finding b { text-transform: uppercase; font-size: .75rem; letter-spacing: .05em; color: var(--soft) }
.finding.ok { border-color: var(--good) } .finding.ok b { color: var(--good) }
.finding.warning { border-color: var(--warn) } .finding.warning b { color: var(--warn) }
.finding.fatal { border-color: var(--bad) } .finding.fatal b { color: var(--bad) }
"""
LARGEST_SIDE = 1600  # pixels of a picture in the page


def write_page(report: CheckReport, path: Path) -> Path:
    """Write the report as HTML; returns `path`.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    counts = [(severity, sum(f.severity == severity for f in report.findings)) for severity in reversed(SEVERITIES)]
    blocks = [
        element("h1", f"Check of the recipe {report.recipe}"),
        element("p", VERDICTS[report.verdict]),
        parts.key_figures(counts),
        *map(_section_block, report.sections),
    ]
    write_text(path, parts.document(f"npedit check: {report.recipe}", blocks, CHECK_STYLE))
    return path


def _section_block(section: Section) -> Html:
    findings = sorted(section.findings, key=lambda finding: -SEVERITIES.index(finding.severity))
    return parts.join(
        [
            element("h2", section.title),
            *map(_finding_block, findings),
            *map(_table_block, section.tables),
            *(parts.details(title, text, is_open=True) for title, text in section.texts),
            *map(_picture_block, section.pictures),
            element("p", f"This section took {section.seconds:.1f} s.", kind="soft"),
        ]
    )


def _finding_block(finding: Finding) -> Html:
    lines = [parts.join([element("b", finding.severity), f" {finding.measured}"])]
    lines += [parts.escape(finding.meaning)] if finding.meaning else []
    lines += [parts.join([element("i", "What to do:"), f" {finding.advice}"])] if finding.advice else []
    kind = f"finding {KINDS[finding.severity]}"
    return element("div", *(element("p", line) for line in lines), kind=kind, anchor=finding.key)


def _table_block(table: ReportTable) -> Html:
    shown = TextTable(table.title, table.head, left=table.head[:1])
    for row in table.rows:
        shown.add_row(*map(format_cell, row))
    return parts.join([element("p", table.title), parts.text_table(shown)])


def _picture_block(shown: ReportPicture) -> Html:
    image = shown.picture
    if max(image.size) > LARGEST_SIDE:
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return parts.figure(parts.picture(image, shown.caption), shown.caption)
