"""`npedit prepare --engine ray` on a local Ray cluster of three workers, with real servers on this machine."""

import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import run, start
from judge_server import completion, send
from toy_writer_server import serving_writer
from writer_server import passes_of, photos, rows_of, writing

from npedit.toy.dataset import write_dataset
from npedit.toy.writer import ErrorRates

MADE = ("metadata.jsonl", "held_out.txt", "README.md", "rejected.jsonl", "bad_photos.jsonl")


@pytest.fixture(scope="module")
def cluster():
    """Three workers in processes of their own; commands of this process use this cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        import ray

        ray.init("local", num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def same_set(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in MADE)


@pytest.mark.slow  # the next test compares the files of one server
def test_two_servers_and_three_workers_make_the_set_of_one_process(cluster, tmp_path):
    source = write_dataset(tmp_path / "photos", 12, seed=0, bare=True)
    (source / "bad.jpg").write_bytes(b"no picture")
    rates = ErrorRates(mistakes=0.3, broken=0.1, verifier=0.2)
    with serving_writer(rates) as (first, one), serving_writer(rates) as (second, two):
        words = ["--writer", first, "--writer", second, "--writer-model", "toy", "--jpeg-quality", 0, "--workers", 2]
        words += ["--types", "remove,add,recolour", "--held-out", 0.2, "--rounds", 1]
        run("prepare", source, "--out", tmp_path / "local", *words)
        local = one.counts + two.counts
        assert min(one.counts["look"], two.counts["look"]) >= 3  # both were asked
        one.counts.clear(), two.counts.clear()
        run("prepare", source, "--out", tmp_path / "ray", *words, "--engine", "ray")
        assert one.counts + two.counts == local and min(one.counts["look"], two.counts["look"]) >= 3
    assert rows_of(tmp_path / "local", "rejected.jsonl") and same_set(tmp_path / "local", tmp_path / "ray")


def end_client(handler) -> int:
    """Kill (-9) the process at the other end of a connection; returns its id."""
    port = handler.client_address[1]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = [line[9] for line in lines if line[1].endswith(f":{port:04X}")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            name = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"socket:[{inode}]" in files:
            assert name.startswith(b"ray::MapWorker"), name
            os.kill(int(process.name), signal.SIGKILL)
            return int(process.name)
    raise AssertionError("no process has the connection")


def test_a_worker_killed_half_way_loses_no_answer(cluster, tmp_path):
    source = photos(tmp_path / "photos", 12)
    numbers, asked, killed = itertools.count(), [], []

    def numbered(name, answer, body):
        """The right answer, whose token counts hold the number of the request; the 16th is not answered."""
        number = next(numbers)
        asked.append((json.dumps(body["messages"]), number))
        time.sleep(0.05)
        found = json.loads(completion(json.dumps(answer)))
        found["usage"]["number"] = number

        def reply(handler):
            if number == 15:
                killed.append(end_client(handler))
            else:
                send(handler, 200, json.dumps(found).encode())

        return reply

    with writing() as server:
        words = ["--writer-model", "tiny", "--workers", 6, "--rounds", 1]
        run("prepare", source, "--out", tmp_path / "local", "--writer", server.url, *words)
    with writing(numbered) as server:
        run("prepare", source, "--out", tmp_path / "ray", "--writer", server.url, *words, "--engine", "ray")
    assert len(killed) == 1 and same_set(tmp_path / "local", tmp_path / "ray")
    kept = {record["usage"]["number"] for record in rows_of(tmp_path / "ray", "answers.jsonl")}
    assert len(kept) == 48
    counts = Counter(body for body, _ in asked)
    again = [body for body, count in counts.items() if count > 1]
    # two workers or three share the six requests at a time, so the killed one had two or three
    assert 1 <= len(again) <= 3 and max(counts.values()) == 2
    first = dict(reversed(asked))
    assert not {first[body] for body in again} & kept  # no answer that was received is asked for again


@pytest.mark.slow
def test_the_cost_ceiling_holds_for_all_workers_together_and_the_run_resumes(cluster, tmp_path):
    source = photos(tmp_path / "photos", 12)
    with writing() as server:
        words = ["--writer", server.url, "--writer-model", "tiny", "--rounds", 1, "--price-in", 10, "--engine", "ray"]
        # a right answer has 100 prompt tokens, and 3,000 and the prompt's length are set aside for a request
        said = run("prepare", source, "--out", tmp_path / "set", *words, "--max-cost", 0.06, code=2)
        assert "more than --max-cost 0.06" in said and 1 <= len(server.bodies) < 40
        facts = json.loads((tmp_path / "set" / "prepare.json").read_text())
        assert facts["cost"] == pytest.approx(len(server.bodies) * 100 * 10 / 1e6) and facts["cost"] <= 0.06
        run("prepare", source, "--out", tmp_path / "set", *words)
        assert len(server.bodies) == 48 and len(rows_of(tmp_path / "set")) == 24
        said = run("prepare", source, "--out", tmp_path / "set", *words)
        assert "0 requests in this run" in said and len(server.bodies) == 48


def descendants(process: int) -> set[int]:
    """The processes that a process has started, and those that these have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = path.read_text().partition(" ")
            parents[int(number)] = int(rest.rpartition(") ")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def title(process: int) -> str:
    """The command of a process; "" if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().rstrip(b"\0").decode()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_resumes(tmp_path, number):
    source = photos(tmp_path / "photos", 8)
    gate = threading.Event()

    def silent(name, answer, body):
        if name == "verify" and not gate.is_set():
            gate.wait(120)
        return answer

    with writing(silent) as server:
        words = ["prepare", source, "--out", tmp_path / "set", "--writer", server.url, "--writer-model", "tiny"]
        words += ["--rounds", 1, "--engine", "ray"]
        process = start(*words)
        deadline = time.monotonic() + 240
        while "verify" not in passes_of(server) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        kept = len(rows_of(tmp_path / "set", "answers.jsonl"))
        ray = descendants(process.pid)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0].decode()
        assert kept and len(ray) > 5 and "Traceback" not in said and process.returncode in (130, -number), said
        deadline = time.monotonic() + 30
        while (left := [name for name in map(title, ray) if name and "Agent" not in name]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.2)
        assert not left  # after SIGKILL, two agents of Ray itself end after about a minute
        gate.set()
        before = len(server.bodies)
        assert start(*words).communicate(timeout=300)[0]
        assert len(server.bodies) - before == 32 - kept
    assert len(rows_of(tmp_path / "set")) == 16
