"""The report of a check as one HTML file, in the style of a run's report. The file needs no other file."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from PIL import Image

from npedit.check.findings import SEVERITIES, CheckReport, Finding, ReportPicture, ReportTable, Section, format_cell
from npedit.report.plots import encode_png
from npedit.report.report import STYLE
from npedit.runs.files import write_text

VERDICTS = {
    "ok": "Nothing was found that speaks against training.",
    "note": "Nothing was found that speaks against training. Read the notes.",
    "warning": "Training can start, but read the warnings first.",
    "will not learn": "With this recipe, these data and these models the editor will not learn.",
}
COLOURS = {"ok": "var(--good)", "note": "var(--soft)", "warning": "#b07a10", "will not learn": "var(--bad)"}
CHECK_STYLE = """
.finding { border-left: .3rem solid; padding: .2rem 1rem; margin: .8rem 0; background: var(--card) }
.finding b { text-transform: uppercase; font-size: .75rem; letter-spacing: .05em }
"""
LARGEST_SIDE = 1600  # pixels of a picture in the page


def write_page(report: CheckReport, path: Path) -> Path:
    """Write the report as HTML; returns `path`.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    name = html.escape(report.recipe)
    body = "".join(_section_block(section) for section in report.sections)
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>npedit check: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{CHECK_STYLE}</style>'
        f"</head><body><h1>Check of the recipe {name}</h1><p>{VERDICTS[report.verdict]}</p>"
        f"{_summary_block(report)}{body}</body></html>\n",
    )
    return path


def _summary_block(report: CheckReport) -> str:
    counts = [(severity, sum(f.severity == severity for f in report.findings)) for severity in reversed(SEVERITIES)]
    cells = "".join(f"<div><b>{count}</b>{severity}</div>" for severity, count in counts)
    return f'<div class="figures">{cells}</div>'


def _section_block(section: Section) -> str:
    findings = sorted(section.findings, key=lambda finding: -SEVERITIES.index(finding.severity))
    texts = "".join(
        f"<details open><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        for title, text in section.texts
    )
    return (
        f"<h2>{html.escape(section.title)}</h2>"
        + "".join(map(_finding_block, findings))
        + "".join(map(_table_block, section.tables))
        + texts
        + "".join(map(_picture_block, section.pictures))
        + f'<p class="soft">This section took {section.seconds:.1f} s.</p>'
    )


def _finding_block(finding: Finding) -> str:
    colour = COLOURS[finding.severity]
    lines = [f'<b style="color:{colour}">{finding.severity}</b> {html.escape(finding.measured)}']
    lines += [html.escape(finding.meaning)] if finding.meaning else []
    lines += [f"<i>What to do:</i> {html.escape(finding.advice)}"] if finding.advice else []
    inside = "".join(f"<p>{line}</p>" for line in lines)
    return f'<div class="finding" id="{finding.key}" style="border-color:{colour}">{inside}</div>'


def _table_block(table: ReportTable) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(format_cell(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f'<p>{html.escape(table.title)}</p><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _picture_block(shown: ReportPicture) -> str:
    picture = shown.picture
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    data = base64.b64encode(encode_png(picture)).decode()
    caption = html.escape(shown.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{caption}</figcaption></figure>'
    )
