"""The page of `npedit compare --people A B`, used with the keyboard in headless Chromium."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from browser import CHROMIUM, open_browser
from command_line import run
from local_pages import LocalPage
from PIL import Image

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium in the PATH or in $CHROMIUM")
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}


@pytest.fixture
def evaluated(tmp_path):
    """Results of "quokka", whose pictures are black, and of "wombat", whose are white."""
    run("toy", "data", tmp_path / "photos", "--items", 6)
    for name, colour in (("quokka", "black"), ("wombat", "white")):
        made = tmp_path / f"{name}-pictures"
        made.mkdir()
        for k in range(6):
            Image.new("RGB", (32, 32), colour).save(made / f"0%2F{k}.png", pnginfo=None)
        plain = ("--dino", "none", "--clip", "none")
        run("evaluate", "own", tmp_path / "photos", "--edited", made, "--out", tmp_path / name, *plain)
    return tmp_path


def test_a_blind_comparison_with_the_keyboard(evaluated):
    with open_browser() as browser:
        page = LocalPage(browser, evaluated / "log", "compare", "--people", "quokka", "wombat")
        try:
            said = compare(page, evaluated)
        finally:
            page.process.kill() if page.process.poll() is None else None
    rows = [json.loads(line) for line in (evaluated / "people.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows if row["rater"] == "Ann"}) == 6
    assert [row["rater"] for row in rows].count("Bob") == 1
    preferred = [row["preferred"] for row in rows if row["rater"] == "Ann"]
    assert preferred == ["wombat"] * 5 + [None, "wombat"]  # the white one, left or right; one answer was given again
    assert {row["left"] for row in rows} == {"quokka", "wombat"}
    assert "wombat against quokka: win rate" in said and "6/1/0 wins/ties/losses in 7 answers of 2 raters" in said


def compare(page, folder):
    tab = page.tab
    tab.wait_for_selector("#rater")
    begin(page, "Ann")
    for k in range(5):
        page.press(KEYS[white_side(page)], f"{k + 1} of 6")
        assert_blind(page)
    page.press("ArrowDown", "6 of 6")
    page.wait_for("#message", "All items are answered")
    tab.keyboard.press("u")
    tab.wait_for_selector("#instruction")
    side = white_side(page)
    tab.screenshot(path=folder / "people.png")
    page.press(KEYS[side], "6 of 6")
    page.wait_for("#message", "All items are answered")
    tab.reload()
    begin(page, "Bob")  # another rater sees all items
    page.press("ArrowDown", "Bob: 1 of 6")
    tab.reload()
    tab.wait_for_selector("#rater")
    tab.fill("#rater textarea, #rater input", " Ann ")
    tab.keyboard.press("Enter")
    page.wait_for("#progress", "Ann: 6 of 6")  # the first one goes on where she was
    assert page.foreign_requests() == []
    return page.stop()


def begin(page, name):
    page.tab.wait_for_selector("#rater")
    page.tab.fill("#rater textarea, #rater input", name)
    page.tab.keyboard.press("Enter")
    page.wait_for("#progress", f"{name}: 0 of 6")
    page.tab.wait_for_selector("#instruction")


def white_side(page):
    """Which of the two results is white."""
    sources = page.tab.locator(".shown img").evaluate_all("all => all.map(one => one.src)")
    assert [source.partition(",")[0] for source in sources] == ["data:image/png;base64"] * 3
    _, left, right = (open_picture(source) for source in sources)
    assert not left.info and not right.info and {np.asarray(left).max(), np.asarray(right).max()} == {0, 255}
    return "left" if np.asarray(left).max() else "right"


def open_picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def assert_blind(page):
    """Neither the page, nor the settings that Gradio sends, nor an address names an editor."""
    sent = page.tab.content() + httpx.get(f"{page.url}/config").text + " ".join(page.requests)
    assert not any(name in sent for name in ("quokka", "wombat", "0%2F"))
