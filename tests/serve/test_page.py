"""The page of `npedit serve`, used in headless Chromium against a real server with the embedded editor."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, EditPage, open_browser, pixels
from edit_server import Server
from gradio.route_utils import delete_files_created_by_app
from served_runs import make_runs

from npedit.editor import Editor
from npedit.serve.api import ServerSettings, make_app
from npedit.serve.examples import write_examples
from npedit.serve.page import add_page
from npedit.serve.queue import EditQueue

TOKEN = "0123456789abcdef0"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium in the PATH or in $CHROMIUM")


@pytest.fixture(scope="module")
def browser():
    with open_browser() as made:
        yield made


@pytest.fixture
def page(browser, server, tmp_path):
    made = EditPage(browser, server.url).wait()
    yield made
    made.tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert made.foreign_requests() == []
    made.tab.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A scene of the toy world, with a red cross."""
    ((file, _),) = write_examples(tmp_path_factory.mktemp("photo"), ["recolour"])
    return Path(file)


def test_an_edit_equals_the_interfaces_and_the_critic_judges_it(page, client, photo, tmp_path):
    page.upload(photo)
    page.fill("turn the red cross yellow", seed=3, count=2)
    page.edit(1)
    results = page.pictures("#results")
    for seed, result in zip((3, 4), results, strict=True):
        data = {"instruction": "turn the red cross yellow", "seed": str(seed)}
        answer = client.post("/v1/edits", files={"image": photo.read_bytes()}, data=data)
        assert np.abs(result - pixels(answer.content)).max() <= 1
    assert (results[0] != results[1]).any()
    for seed, caption in zip((3, 4), page.captions("#results"), strict=True):
        done, kept = re.fullmatch(rf"seed {seed} · done (\d+)%, rest kept (\d+)%", caption).groups()
        assert int(done) > 80 and int(kept) > 80
    page.tab.locator("#results img").nth(1).click()
    page.tab.wait_for_function("document.querySelector('#caption').innerText.includes('seed 4')")
    before, after = page.pictures("#slider")
    assert (before == pixels(photo.read_bytes())).all() and (after == results[1]).all()
    with page.tab.expect_download() as download:
        page.tab.click("#download")
    assert (pixels(Path(download.value.path()).read_bytes()) == results[1]).all()
    assert download.value.suggested_filename.endswith(".png")


def test_edits_are_chained_and_undone(page, photo):
    page.upload(photo)
    page.fill("turn the red cross yellow")
    page.edit(1)
    (first,) = page.pictures("#results")
    page.tab.click("#further")
    page.tab.wait_for_function("document.querySelector('#instruction textarea').value == ''")
    assert (page.pictures("#photo")[0] == first).all()
    page.fill("make the background teal")
    page.edit(2)
    before, after = page.pictures("#slider")
    assert (before == first).all() and (after != first).any()
    page.tab.locator("#history img").first.click()  # the first edit is shown again
    page.tab.wait_for_function("document.querySelector('#caption').innerText.includes('cross')")
    assert (page.pictures("#slider")[1] == first).all()
    page.tab.click("#undo")
    page.wait_for_edits(1)
    assert page.tab.input_value("#instruction textarea") == "make the background teal"
    assert (page.pictures("#photo")[0] == first).all() and (page.pictures("#slider")[1] == first).all()
    page.tab.click("#undo")
    page.wait_for_edits(0)
    assert page.pictures("#slider") == [] and page.tab.is_disabled("#undo")


def test_bad_input_shows_a_message_and_the_page_goes_on(page, photo, tmp_path):
    page.tab.click("#edit")
    assert "expected a picture; got none" in page.message()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<svg onload='alert(1)'>")
    page.upload(bad)
    page.fill("turn the red cross yellow")
    page.tab.click("#edit")
    message = page.message()
    assert "not a picture" in message and "Traceback" not in message and str(tmp_path.parent) not in message
    page.tab.get_by_label("Clear").or_(page.tab.get_by_label("Remove Image")).first.click()
    page.upload(photo)
    page.fill("   ")
    page.tab.click("#edit")
    assert "expected an instruction" in page.message()
    page.fill("turn the red cross yellow")
    page.edit(1)


def test_examples_work_at_once(page):
    page.tab.locator("table tr").nth(1).click()
    page.tab.wait_for_selector("#photo img")
    page.tab.wait_for_function("document.querySelector('#instruction textarea').value != ''")
    page.edit(1)
    (caption,) = page.captions("#results")
    assert all(int(share) > 50 for share in re.findall(r"(\d+)%", caption))


def join_with(client, path):
    """Ask for an edit of the file with this path, as the page's script does."""
    edit = next(d for d in client.get("/config").json()["dependencies"] if len(d["inputs"]) == 8)
    photo = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    sent = {"data": ["", photo, "paint it red", 0, 1, False, False, None], "fn_index": edit["id"], "session_hash": path}
    return client.post("/gradio_api/queue/join", json=sent)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "https://example.org/x.png"])
def test_a_url_in_place_of_an_upload_is_refused(client, url):
    assert join_with(client, url).status_code == client.get(f"/gradio_api/file={url}").status_code == 400


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png"])
def test_only_files_of_the_page_are_read(client, path):
    """What a browser may send is not what the page sends: here the path of another file."""
    assert join_with(client, path).status_code == 200
    events = client.get("/gradio_api/queue/data", params={"session_hash": path}).text
    done = next(json.loads(line[6:]) for line in events.splitlines() if "process_completed" in line)
    assert not done["success"] and "Traceback" not in events and "root:" not in events


def test_examples_outlive_the_visitors_files(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
    queue = EditQueue(Editor.open)
    app = make_app(queue, ServerSettings())
    add_page(app, None, is_toy=True)
    folder = Path(app.state.page_folder.name)
    examples, other = sorted(folder.iterdir()), folder / "npedit-1.png"
    other.write_bytes(b"")
    blocks = app.state.page.get_blocks()
    photo = next(block for block in blocks.blocks.values() if block.elem_id == "photo")
    for file in (*examples, other):
        photo.move_resource_to_block_cache(file)  # as when a visitor uses it
    delete_files_created_by_app(blocks, 0)
    assert len(examples) == 5 and sorted(folder.iterdir()) == examples
    queue.close(30)


@pytest.mark.slow
def test_token_runs_full_queue_and_a_stop_with_an_open_page(browser, photo, tmp_path):
    env = os.environ | {"NPEDIT_SERVE_TOKEN": TOKEN, "TMPDIR": str(tmp_path)}
    runs = make_runs(tmp_path / "runs", "one", "two")
    server = Server(tmp_path / "log.txt", str(runs), "--waiting", "1", env=env)
    page = EditPage(browser, server.url)
    _log_in(page, "x" * 20)
    page.tab.wait_for_selector("text=Incorrect")
    assert not page.tab.locator("#edit").count()
    _log_in(page, TOKEN)
    page.wait()
    _choose_run(page, "one")
    page.upload(photo)
    page.fill("turn the red cross yellow")
    page.edit(1)
    page.tab.click("#show-report")
    page.tab.frame_locator("#report iframe").locator("h1").wait_for()
    page.fill("turn the red cross yellow", count=4)
    page.tab.click("#edit")
    assert "too many edits wait" in page.message()
    assert page.foreign_requests() == []
    assert list(tmp_path.glob("npedit-serve-*/*"))
    begun = time.monotonic()
    assert server.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 15  # an open page does not hold the server
    assert not list(tmp_path.glob("npedit-serve-*"))
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def _choose_run(page, name):
    page.tab.click("#run input")
    page.tab.locator("#run [role=option]").filter(has_text=name).click()
    page.tab.wait_for_function("n => document.querySelector('#run input').value == n", arg=name)


def _log_in(page, token):
    page.tab.wait_for_selector("input[type=password]")
    page.tab.locator("input").first.fill("anyone")
    page.tab.locator("input[type=password]").fill(token)
    page.tab.get_by_role("button", name="Login").click()
