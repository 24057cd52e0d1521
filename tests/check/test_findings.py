"""The report: verdict, exit code, JSON, and the page."""

from __future__ import annotations

import json

from PIL import Image

from npedit.check.findings import CheckReport, ReportPicture, Section, format_cell
from npedit.check.page import VERDICTS, write_page


def report_with(*severities) -> CheckReport:
    section = Section("data", "Data")
    for number, severity in enumerate(severities):
        section.add(f"key-{number}", severity, f"fact <{number}>", "what it means", "what to do")
    section.add_table("A table", ("name", "value"), [("a", 0.12345), ("b", None)])
    section.texts.append(("A text", "<image> is it?"))
    section.pictures.append(ReportPicture("A picture", Image.new("RGB", (4000, 10))))
    return CheckReport("mine", (section,))


def test_the_verdict_is_the_worst_finding_and_only_the_worst_severity_gives_exit_code_1() -> None:
    expected = {"ok": 0, "note": 0, "warning": 0, "will not learn": 1}
    for severity, code in expected.items():
        report = report_with("ok", severity)
        assert (report.verdict, report.exit_code) == (severity, code)
    assert CheckReport("empty", ()).verdict == "ok"


def test_the_json_report_has_every_finding_and_table() -> None:
    found = json.loads(json.dumps(report_with("ok", "will not learn").as_dict()))
    (section,) = found["sections"]
    assert (found["verdict"], found["exit_code"], found["recipe"]) == ("will not learn", 1, "mine")
    assert section["findings"][1] == {
        "key": "key-1",
        "severity": "will not learn",
        "measured": "fact <1>",
        "meaning": "what it means",
        "advice": "what to do",
    }
    assert section["tables"][0]["rows"] == [["a", 0.12345], ["b", None]]
    assert section["pictures"] == ["A picture"]


def test_the_page_shows_findings_worst_first_tables_texts_and_pictures(tmp_path) -> None:
    page = write_page(report_with("ok", "will not learn"), tmp_path / "report.html").read_text()
    assert VERDICTS["will not learn"] in page
    assert page.index("fact &lt;1&gt;") < page.index("fact &lt;0&gt;")
    assert "&lt;image&gt; is it?" in page and "<td>0.123</td>" in page and "data:image/png;base64" in page
    assert 'width="1600"' in page  # large pictures are scaled down


def test_cells_have_three_digits_and_missing_values_a_dash() -> None:
    assert [format_cell(v) for v in (None, "a", 3, 0.00012345)] == ["-", "a", "3", "0.000123"]
