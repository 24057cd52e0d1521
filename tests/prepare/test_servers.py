"""Several servers of one model as one writer, the options of `--engine ray`, and what its workers do without Ray."""

import json
import pickle
import sys

import pytest
from command_line import run
from judge_server import send
from PIL import Image
from writer_server import photos, prepare, rows_of, writing

from npedit.errors import UserError
from npedit.judges.base import JudgeUnavailable
from npedit.prepare.asking import CostCeiling
from npedit.prepare.servers import ServerPool, open_writers
from npedit.prepare.writer import WRITER, Request


def request() -> Request:
    return Request("look", "s", "u", {}, Image.new("RGB", (20, 20)), 0.0, 10, 0)


def lost(name, answer, body):
    return lambda handler: send(handler, 404, b"no such model")


def test_requests_are_spread_evenly_and_the_address_of_the_server_is_recorded(tmp_path):
    source = photos(tmp_path / "photos", 4)
    with writing() as one, writing() as two:
        prepare(one, source, tmp_path / "set", "--writer", two.url)
        assert len(one.bodies) == len(two.bodies) == 8
        addresses = [record["address"] for record in rows_of(tmp_path / "set", "answers.jsonl")]
        assert sorted(addresses) == sorted([one.url, two.url] * 8)
        prepare(two, source, tmp_path / "set")  # the answers count for a single server too
        assert len(one.bodies) + len(two.bodies) == 16


def test_a_server_that_fails_is_left_out_and_the_last_one_ends_the_run():
    notes: list[str] = []
    with writing(lost) as one, writing() as two, writing(lost) as three:
        pool = open_writers([s.url for s in (one, two, three)], "tiny", WRITER, 2, 0, on_note=notes.append)
        assert isinstance(pool, ServerPool) and pool.workers == 6
        assert all(pool.ask(request()).address == two.url for _ in range(4))
        assert len(one.bodies) == len(three.bodies) == 1 and len(two.bodies) == 4
        assert [note.rpartition(". ")[2] for note in notes] == ["2 of 3 servers are left", "1 of 3 servers are left"]
        with pytest.raises(JudgeUnavailable, match="404"):
            open_writers([one.url, three.url], "tiny", WRITER, 2, 0).ask(request())
        again = pickle.loads(pickle.dumps(pool))
        assert again.identity == pool.identity and again.ask(request()).address in (one.url, two.url)


@pytest.mark.parametrize("models", [["http://a/v1", "http://a/v1"], ["http://a/v1", "folder"]])
def test_several_writers_are_different_servers(models):
    with pytest.raises(UserError, match="different addresses"):
        open_writers(models, "tiny", WRITER, 2, 0)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine", "spark"], "--engine: expected local or ray; got 'spark'"),
        (["--ray-address", "auto"], "expected --engine ray"),
        (["--engine", "ray", "--ray-address", "127.0.0.1:1"], "expected a Ray cluster at 127.0.0.1:1; got: Connection"),
        (["--engine", "ray", "--ray-address", "ray://h:10001"], "expected HOST:PORT"),
        (["--engine", "ray", "--writer", "http://127.0.0.1:9/v2", "--verifier", "embedded"], "got a model of this"),
    ],
)
def test_options_of_an_engine_that_do_not_fit(tmp_path, words, said):
    source = photos(tmp_path / "photos", 1)
    model = ["--writer", "http://127.0.0.1:9/v1", "--writer-model", "tiny"]
    assert said in run("prepare", source, "--out", tmp_path / "set", *model, *words, code=2)


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    model = ["--writer", "http://127.0.0.1:9/v1", "--writer-model", "tiny", "--engine", "ray"]
    said = run("prepare", photos(tmp_path / "photos", 1), "--out", tmp_path / "set", *model, code=2)
    assert "pip install 'npedit[ray]'" in said


# -------------------------------------------------------------------------------- what runs in the cluster's processes


def ask_worker(work, photo, keys=()):
    """What a worker returns for three rows, with one thread."""
    from npedit.prepare.ray_engine import PhotoWorker

    class NoPasses:
        def stop_retrying(self):
            """Nothing is retried."""

    rows = [json.dumps([{**photo, "number": number}, ["add"]]) for number in range(3)]
    found = PhotoWorker(work, NoPasses(), 1, keys)({"number": [4, 5, 6], "row": rows})
    assert found["number"] == [4, 5, 6]
    return [json.loads(value) for value in found["value"]]


def test_a_worker_returns_values_errors_and_the_ceiling(tmp_path, monkeypatch):
    here = {"path": str(tmp_path / "a.png")}

    def work(photo, wanted, passes):
        if photo["number"] == 1:
            raise photo.get("stop") and CostCeiling or UserError("the server is gone")
        return {"rows": [photo["number"], wanted]}

    done = {"value": {"rows": [0, ["add"]]}}
    assert ask_worker(work, here) == [done, {"error": "the server is gone"}, {"value": None}]
    assert ask_worker(work, {**here, "stop": True}) == [done, {"value": None}, {"value": None}]
    (error, *_) = ask_worker(work, {"path": str(tmp_path / "nowhere" / "a.png")})
    assert "on each machine" in error["error"] and str(tmp_path / "nowhere") in error["error"]
    monkeypatch.delenv("NPEDIT_WRITER_KEY", raising=False)
    (error, *_) = ask_worker(work, here, ["NPEDIT_WRITER_KEY"])
    assert "set it before ray start" in error["error"]


def test_the_store_counts_the_requests_of_killed_workers_at_their_most(tmp_path):
    from npedit.prepare.ray_answers import AnswerStore

    store = AnswerStore(str(tmp_path / "answers.jsonl"), (10.0, 0.0, 0.05))
    store.open()
    assert store.set_aside("look", 3000, 10) == pytest.approx(0.03)  # this worker is killed: nothing is released
    with pytest.raises(CostCeiling):
        store.set_aside("look", 3000, 10)
    amount = store.set_aside("look", 1000, 10)
    store.add({"prompt_tokens": 900})
    store.release(amount)
    store.put({"key": "k", "outcome": "ok", "text": "t", "usage": {"prompt_tokens": 900}})
    assert store.get("k")["text"] == "t" and store.totals() == ({"prompt_tokens": 900}, {"look": 2})
