"""The page of `npedit review`, used with the keyboard in headless Chromium."""

import httpx
import pytest
from browser import CHROMIUM, open_browser
from command_line import run
from local_pages import LocalPage
from writer_server import rows_of

from npedit.errors import UserError
from npedit.runs.lock import hold

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium in the PATH or in $CHROMIUM")


def test_a_review_with_the_keyboard(tmp_path):
    run("toy", "data", tmp_path / "set", "--items", 5)
    before = (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()
    with open_browser() as browser:
        page = LocalPage(browser, tmp_path / "log", "review", "set")
        try:
            review(page, tmp_path)
        finally:
            page.process.kill() if page.process.poll() is None else None
    assert [(d["id"], d["state"]) for d in rows_of(tmp_path / "set", "review.jsonl")] == [
        ("0/0", "accepted"), ("0/1", "mended"), ("0/2", "rejected"), ("0/2", "accepted"), ("0/3", "rejected"),
    ]  # fmt: skip
    rows = rows_of(tmp_path / "set")
    assert [row["id"] for row in rows] == ["0/0", "0/1", "0/2", "0/4"]
    assert rows[1]["instruction"].endswith(" now") and rows[2]["id"] == "0/2"
    after = (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()
    assert [after[0], after[2], after[3]] == [before[0], before[2], before[4]]


def review(page, folder):
    tab = page.tab
    tab.wait_for_selector(".shown img")
    page.wait_for("#progress", "Row 1 of 5, 0/0: not seen. 0 of 5")
    assert httpx.get(page.url, headers={"Host": "other.example"}).status_code == 400
    with pytest.raises(UserError, match="review"), hold(folder / "set", "prepare"):
        pass
    page.press("a", "Row 2 of 5, 0/1: not seen. 1 of 5")
    tab.keyboard.press("e")
    tab.keyboard.press("End")
    tab.keyboard.type(" now")  # no letter of it is a command
    tab.keyboard.press("Escape")
    page.press("a", "Row 3 of 5, 0/2: not seen. 2 of 5 rows seen: 1 accepted, 1 mended, 0 rejected")
    tab.keyboard.press("r")
    tab.keyboard.type("a bad caption")
    page.press("Enter", "Row 4 of 5, 0/3: not seen. 3 of 5")
    page.press("ArrowLeft", "Row 3 of 5, 0/2: rejected")
    page.wait_for("#message", "Rejected: a bad caption")
    page.press("a", "2 accepted, 1 mended, 0 rejected")  # taken back
    tab.click("#reject")
    page.wait_for("#message", "expected a reason")
    tab.keyboard.press("r")
    tab.keyboard.type("dull")
    page.press("Enter", "Row 5 of 5")
    tab.screenshot(path=folder / "review.png")
    assert page.foreign_requests() == []
    assert "4 of 5 rows seen: 2 accepted, 1 mended, 1 rejected. Go on with the same command." in page.stop()
