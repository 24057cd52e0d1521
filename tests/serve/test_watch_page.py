"""The status page of `npedit serve --watch`, in headless Chromium."""

import time

import pytest
from browser import CHROMIUM, open_browser
from command_line import run
from local_pages import LocalPage
from watched_runs import add_checkpoint, add_samples, append_rows, make_run

from npedit.runs.lock import hold

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium in the PATH or in $CHROMIUM")


@pytest.fixture
def folder(tmp_path):
    """A run that was stopped, and one that trains as long as its lock is held."""
    folder = tmp_path / "runs"
    append_rows(make_run(folder / "done"), 1, 30, **{"judge/p_edit": 0.4, "judge/p_identity": 0.9})
    add_checkpoint(folder / "done", 30)
    add_samples(folder / "done", 30)
    run = make_run(folder / "night photos")
    append_rows(run, 1, 40, time=time.time(), **{"eval/both": 0.5})
    add_samples(run, 40, side=200)
    return folder


@needs_browser
def test_the_page_renews_itself_and_fits_a_phone(folder, tmp_path):
    training = folder / "night photos"
    with open_browser() as browser, hold(training, "train"):
        page = LocalPage(browser, tmp_path / "log", "serve", "--watch", "runs")
        try:
            look(page, training)
            page.tab.screenshot(path=tmp_path / "wide.png", full_page=True)
            page.tab.set_viewport_size({"width": 375, "height": 700})
            assert page.tab.evaluate("document.documentElement.scrollWidth") == 375
            page.tab.screenshot(path=tmp_path / "phone.png", full_page=True)
            assert page.foreign_requests() == []
            page.stop()
            page.tab.evaluate("renew()")
            page.tab.wait_for_selector(".lost", state="visible")
        finally:
            page.process.kill() if page.process.poll() is None else None


def look(page, training):
    tab, faults = page.tab, []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    first, second = tab.locator("details.run").all()
    words = first.inner_text()
    for word in ("night photos", "training", "update 40 of 120 (33 %)", "stage 2 of 2: np edit", "0.5 s", "50 %"):
        assert word in words
    assert "stopped" in second.inner_text() and "40 % applied, 90 % rest kept" in second.inner_text()
    assert first.evaluate("e => e.open") and not second.evaluate("e => e.open")
    wait_for_pictures(tab, 6)
    second.locator("summary b").first.click()
    append_rows(training, 41, 90, time=time.time())
    time.sleep(1)  # a look is used for one second
    tab.evaluate("renew()")
    tab.wait_for_function("document.body.innerText.includes('update 90 of 120 (75 %)')")
    assert tab.locator("details.run").nth(1).evaluate("e => e.open")
    tab.locator("details.run img").last.scroll_into_view_if_needed()
    wait_for_pictures(tab, 12)
    with tab.expect_navigation():
        tab.locator("details.run a:text('report')").first.click()
    assert tab.locator("h1").inner_text().startswith("toy")
    tab.go_back()
    tab.wait_for_selector("details.run")
    assert faults == []


def wait_for_pictures(tab, count):
    loaded = "[...document.images].filter(one => one.complete && one.naturalWidth > 0).length"
    tab.wait_for_function(f"n => {loaded} == n", arg=count)


def test_options_of_an_editor_are_refused(folder):
    assert "--bits, --critic" in run("serve", "--watch", folder, "--bits", "8", "--critic", code=2)
    for words in ([folder / "nothing"], []):
        assert "expected a folder of runs" in run("serve", "--watch", *words, code=2)
