"""The status page of `npedit serve --watch`, in headless Chromium."""

import signal
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from browser import CHROMIUM, open_browser
from command_line import run, start
from local_pages import LocalPage
from watched_runs import add_checkpoint, add_samples, append_rows, make_run

from npedit.runs.lock import hold
from npedit.serve.access import LOCAL_HOSTS
from npedit.serve.http_server import HttpServer
from npedit.serve.watch_app import make_watch_app

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium in the PATH or in $CHROMIUM")


@pytest.fixture
def folder(tmp_path):
    """A run that was stopped, and one that trains as long as its lock is held."""
    folder = tmp_path / "runs"
    append_rows(make_run(folder / "done"), 1, 30, **{"judge/p_edit": 0.4, "judge/p_identity": 0.9})
    add_checkpoint(folder / "done", 30)
    add_samples(folder / "done", 30)
    training = make_run(folder / "night photos")
    append_rows(training, 1, 40, time=time.time(), **{"eval/both": 0.5})
    add_samples(training, 40, side=200)
    return folder


@contextmanager
def serving(folder):
    """The address of the page, which a thread of this process serves."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = HttpServer(make_watch_app(folder, "", LOCAL_HOSTS), 1)
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@needs_browser
def test_the_page_renews_itself_and_fits_a_phone(folder, tmp_path):
    training, requests = folder / "night photos", []
    with open_browser() as browser:
        tab = browser.new_page(viewport={"width": 1200, "height": 800})
        tab.on("request", lambda request: requests.append(request.url))
        with serving(folder) as address, hold(training, "train"):
            tab.goto(address)
            look(tab, training)
            tab.screenshot(path=tmp_path / "wide.png", full_page=True)
            tab.set_viewport_size({"width": 375, "height": 700})
            assert tab.evaluate("document.documentElement.scrollWidth") == 375
            tab.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert [url for url in requests if not url.startswith(f"{address}/")] == []
        tab.evaluate("renew()")
        tab.wait_for_selector(".lost", state="visible")  # the server has ended


def look(tab, training):
    faults = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    first, second = tab.locator("details.run").all()
    words = first.inner_text()
    for word in ("night photos", "training", "update 40 of 120", "33\xa0%, stage 2 of 2: np edit", "0.5 s", "50\xa0%"):
        assert word in words
    assert "stopped" in second.inner_text() and "40\xa0% / 90\xa0%" in second.inner_text()
    assert first.evaluate("e => e.open") and not second.evaluate("e => e.open")
    wait_for_pictures(tab, 6)
    second.locator("summary b").first.click()
    append_rows(training, 41, 90, time=time.time())
    time.sleep(1)  # a look is used for one second
    tab.evaluate("renew()")
    tab.wait_for_function("document.body.innerText.includes('update 90 of 120')")
    assert second.evaluate("e => e.open")
    tab.locator("details.run img").last.scroll_into_view_if_needed()
    wait_for_pictures(tab, 12)
    assert faults == []


def wait_for_pictures(tab, count):
    loaded = "[...document.images].filter(one => one.complete && one.naturalWidth > 0).length"
    tab.wait_for_function(f"n => {loaded} == n", arg=count)


def test_options_of_an_editor_are_refused(folder):
    assert "--critic, --bits" in run("serve", "--watch", folder, "--bits", "8", "--critic", code=2)
    for words in ([folder / "nothing"], []):
        assert "expected a folder of runs" in run("serve", "--watch", *words, code=2)


@pytest.mark.slow
@needs_browser
def test_a_training_is_watched_until_it_is_stopped_and_resumed(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    command = (
        "train", "toy", "stages.0.updates=4", "stages.1.updates=30", "stages.0.batch_size=4", "stages.1.batch_size=4",
        "trainer.evaluate_items=9", "trainer.sample_every=10", "--out", runs / "mine",
    )  # fmt: skip
    with open_browser() as browser:
        page = LocalPage(browser, tmp_path / "log", "serve", "--watch", runs)
        assert "no runs yet" in page.tab.inner_text("main")
        training = start(*command)
        state = lambda: (httpx.get(f"{page.url}/runs").json()["runs"] or [{"state": "", "update": -1}])[0]  # noqa: E731
        try:
            seen = wait_until(lambda: (now := state())["update"] >= 6 and now)
            assert (seen["state"], seen["stage_name"], seen["total"]) == ("training", "np_edit", 34)
            assert 0 < seen["seconds_left"] < 600
            training.send_signal(signal.SIGINT)
            training.wait(120)
            assert wait_until(lambda: (now := state())["state"] == "stopped" and now)["update"] < 34
            training = start(*command)
            done = wait_until(lambda: (now := state())["state"] == "finished" and now)
            assert (done["update"], done["share"], done["samples"]) == (34, 1.0, 34)
            page.wait_for("main", "update 34 of 34")
            page.tab.click("text=report")
            page.wait_for("h1", "toy")
            page.stop()
        finally:
            training.kill()
            page.process.kill() if page.process.poll() is None else None


def wait_until(found, seconds=240):
    """What `found` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return value
