"""The runs of a folder as they are now: figures, JSON, pictures. The app runs in this process."""

import asyncio
import base64
import errno
import io
import json
import time

import httpx
import pytest
from PIL import Image
from watched_runs import add_checkpoint, add_final, add_samples, append_rows, make_row, make_run

from npedit.errors import UserError
from npedit.runs import lock
from npedit.serve import watch
from npedit.serve.access import LOCAL_HOSTS
from npedit.serve.watch import Watch
from npedit.serve.watch_app import make_watch_app

TOKEN = "0123456789abcdef0"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def ask(app, *paths, **headers):
    """The answers to GET requests."""

    async def get():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get(path, headers=headers) for path in paths]

    return asyncio.run(get())


def watch_app(folder, token=""):
    return make_watch_app(folder, token, LOCAL_HOSTS)


def test_figures_of_a_training(folder):
    run = make_run(folder / "one")
    with lock.hold(run, "train"):
        append_rows(run, 1, 20, time=time.time())
        (first,) = Watch(folder).look()
        assert (first.state, first.stage_name, first.stage, first.stages) == ("training", "reference_copy", 0, 2)
        assert first.seconds_left is None and first.seconds_left_in_stage == 0
        append_rows(run, 21, 30, time=time.time(), **{"eval/both": 0.25})
        (status,) = Watch(folder).look()
    assert (status.update, status.total, status.share) == (30, 120, 0.25)
    assert status.seconds_per_update == 0.5 and status.seconds_left == pytest.approx(45, abs=2)
    assert status.evaluation == {"eval/both": 0.25} and status.evaluated_at == 30 and status.alarms == []


def test_runs_in_their_order_and_as_json(folder):
    for name, time_of_last in (("old", 1e9), ("new", 2e9), ("running", 1.5e9)):
        append_rows(make_run(folder / name), 1, 3, time=time_of_last)
    add_checkpoint(folder / "new", 3)
    add_final(folder / "old")
    (folder / "notes").mkdir()
    with lock.hold(folder / "running", "train"):
        all_runs, one, missing = ask(watch_app(folder), "/runs", "/runs/new", "/runs/nothing")
    found = {run["name"]: run["state"] for run in all_runs.json()["runs"]}
    assert list(found.items()) == [("running", "training"), ("new", "stopped"), ("old", "crashed")]
    assert one.json() == all_runs.json()["runs"][1] and one.json()["update"] == 3
    assert missing.status_code == 404 and "running, new, old" in missing.json()["error"]["message"]


def test_a_run_itself_can_be_watched(folder):
    append_rows(make_run(folder / "one"), 1, 3)
    (status,) = Watch(folder / "one").look()
    assert status.name == "one" and status.update == 3
    with pytest.raises(UserError, match="expected one of the runs one; got 'two'"):
        Watch(folder / "one").find("two")


def test_a_run_of_100_000_updates_is_read_once(folder, monkeypatch):
    monkeypatch.setattr("npedit.serve.watch.LEAST_SECONDS", 0.0)
    run = make_run(folder / "long")
    line = '{"step": %d, "stage": 1, "stage_name": "np_edit", "time/update": 0.5, "loss/dmd": 0.3}'
    (run / "metrics.jsonl").write_text("".join(line % step + "\n" for step in range(100_000)))
    watch = Watch(folder)
    (status,) = watch.look()
    while status.is_behind:
        (status,) = watch.look()
    assert status.update == 99_999
    append_rows(run, 100_000, 100_000)
    metrics = watch._runs["long"].metrics
    before, began = metrics.bytes_read, time.monotonic()
    assert watch.look()[0].update == 100_000
    assert time.monotonic() - began < 0.2
    assert metrics.bytes_read - before == len(json.dumps(make_row(100_000))) + 1


@pytest.mark.parametrize("name", ["is_run", "find_state"])
def test_a_run_that_cannot_be_read_hides_no_other_run(folder, monkeypatch, name):
    """As on NFS, after another machine has deleted a folder."""
    for run in ("a", "lost", "z"):
        append_rows(make_run(folder / run), 1, 3)
    works = getattr(watch, name)

    def fail(path, *more):
        if path.name == "lost":
            raise OSError(errno.ESTALE, "Stale file handle")
        return works(path, *more)

    monkeypatch.setattr(watch, name, fail)
    assert {status.name for status in Watch(folder).look()} == {"a", "z"}
    page, lost = ask(watch_app(folder), "/", "/runs/lost")
    assert (page.status_code, lost.status_code) == (200, 404)


def test_a_finished_run_is_finished_while_its_log_is_still_being_read(folder, monkeypatch):
    monkeypatch.setattr("npedit.serve.watch.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("npedit.serve.watch.MOST_BYTES", 0)  # a look reads a MiB all the same
    run = make_run(folder / "one")
    append_rows(run, 1, 120, words="x" * 2**14)
    add_final(run)
    runs = Watch(folder)
    (first,) = runs.look()
    assert first.is_behind and first.update < 120 and first.state == "finished"
    (second,) = runs.look()
    assert not second.is_behind and (second.update, second.state) == (120, "finished")


def test_a_resumed_run_begins_anew_where_its_log_was_cut(folder, monkeypatch):
    monkeypatch.setattr("npedit.serve.watch.LEAST_SECONDS", 0.0)
    run, watch = make_run(folder / "one"), Watch(folder)
    append_rows(run, 1, 60, **{"eval/both": 0.5})
    assert watch.look()[0].update == 60
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "new").write_text("".join(rows[:40]))
    (run / "new").replace(run / "metrics.jsonl")
    (status,) = watch.look()
    assert status.update == 40 and status.evaluated_at == 40
    assert sum(part.count for part in status.figures.curves["loss/dmd"].parts) == 20


def test_pictures_and_report(folder):
    run = make_run(folder / "one")
    append_rows(run, 1, 30)
    for update in (0, 20):
        add_samples(run, update)
    add_samples(run, 30)
    picture = run / "samples" / "step-000030" / "grid.png"
    picture.write_bytes(picture.read_bytes()[:500])  # it is being written
    app = watch_app(folder)
    page, small, full, none, svg, no_svg, report = ask(
        app, "/", "/runs/one/samples.webp", "/runs/one/samples/20.png", "/runs/one/samples/10.png",
        "/runs/one/curves/2.svg", "/runs/one/curves/99.svg", "/runs/one/report",
    )  # fmt: skip
    assert page.status_code == 200 and "runs/one/samples.webp?v=30-" in page.text
    assert small.headers["cache-control"] == "no-store"
    seen, written = (Image.open(io.BytesIO(answer.content)) for answer in (small, full))
    assert seen.size == written.size == Image.open(run / "samples" / "step-000020" / "grid.png").size
    assert none.status_code == no_svg.status_code == 404
    assert svg.headers["content-type"] == "image/svg+xml" and svg.text.count("<polyline") == 2
    assert "<h1>toy" in report.text and not (run / "report.html").exists()
    add_samples(run, 30)
    version = ask(app, "/")[0].text.partition("samples.webp?v=")[2].partition('"')[0]
    (kept,) = ask(app, f"/runs/one/samples.webp?v={version}")
    assert "max-age" in kept.headers["cache-control"]


DAMAGE = {
    "config.resolved.yaml": [b"", b"\xff", b"stages: [1, {step: [}", b"stages: 3\ntrainer: {}",
                             b"trainer: {}\nstages: [{}]"],
    "manifest.json": [b"", b"{", b"[]"],
    "metrics.jsonl": [b"", b"\x00" * 100, b'{"step": "1"}\n{"step": 1e999, "stage": {}}\n',
                      b'{"step": 3, "time": "a"}\n', b'{"step": 3, "time": 1e29, "time/update": 1e29}\n'],
    "samples/step-000020/grid.png": [b"", b"\x89PNG", b"<svg/>"],
    "samples/step-000020/items.json": [b"", b"{}"],
    ".holder.json": [b"", b"{", b"[]"],
    "samples/step-99999999999999999999/grid.png": [b""],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_never_make_the_page_fail(folder, name):
    for i, content in enumerate(DAMAGE[name]):
        run = make_run(folder / f"run-{i}")
        append_rows(run, 1, 30)
        add_samples(run, 20)
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
    app = watch_app(folder)
    page, runs = ask(app, "/", "/runs")
    assert page.status_code == runs.status_code == 200
    for run in runs.json()["runs"]:
        place = f"/runs/{run['name']}"
        answers = ask(app, f"{place}/samples.webp", *(f"{place}/curves/{i}.svg" for i in range(10)))
        assert all(answer.status_code in (200, 404) for answer in answers)
    assert ask(app, f"{place}/report")[0].status_code in (200, 404)


def test_names_are_text_and_not_html(folder):
    name = "<img src=x onerror=alert(1)> & \"a' %41?#"
    run = make_run(folder / name)
    append_rows(run, 1, 30, stage_name="<b>step</b>")
    app = watch_app(folder)
    (page,) = ask(app, "/")
    assert "<img src=x" not in page.text and "<b>step" not in page.text
    address = page.text.partition('<img src="runs/')[2].partition('"')[0]
    assert ask(app, f"/runs/{address}")[0].status_code == 200
    assert ask(app, "/runs/..%2Fone", "/runs/../x/report")[0].status_code == 404


def test_a_token_is_asked_for(folder):
    make_run(folder / "one")
    app = watch_app(folder, TOKEN)
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    for header in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic x"}, {"authorization": "Basic eDp5"}):
        refused, report = ask(app, "/", "/runs/one/report", **header)
        assert refused.status_code == report.status_code == 401 and "one" not in refused.text
    for allowed in (f"Bearer {TOKEN}", f"Basic {basic}"):
        assert ask(app, "/", authorization=allowed)[0].status_code == 200
    assert ask(watch_app(folder), "/", host="evil.example")[0].status_code == 400
