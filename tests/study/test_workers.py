"""Jobs side by side: order, failures, stops. Small shell commands stand for the workers, except in the last tests."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from npedit.runs.checkpoint import METRICS
from npedit.study import workers
from npedit.study.file import load_study
from npedit.study.jobs import Job
from npedit.study.progress import JobProgress, last_step
from npedit.study.worker import Task, run_task
from tests.study.test_study import TINY

SAVING = "trap 'echo saved; exit 130' INT; echo ready; while :; do sleep 0.02; done"
STUBBORN = "trap '' INT; echo ready; while :; do sleep 0.02; done"


def job(name: str, *needs: str) -> Job:
    return Job(name, variant=name, needs=needs, updates=10)


def pool(folder: Path, scripts: dict[str, str], count: int = 2) -> tuple[workers.WorkerPool, io.StringIO]:
    """A pool whose workers are shells; each reads its script from standard input."""
    said = io.StringIO()
    console = Console(file=said, width=200)
    return workers.WorkerPool(folder, count, lambda j: scripts[j.name], ("sh", "-s"), console), said


def test_jobs_wait_for_those_that_they_need_and_at_most_so_many_run(tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    script = f"cd {tmp_path}; touch now/$$; ls now | wc -l >> most; sleep 0.2; rm now/$$"
    scripts = {"a": f"{script}; touch a-done", "b": script, "c": f"test -e {tmp_path}/a-done && {script}", "d": script}
    made, said = pool(tmp_path, scripts)
    assert made.run([job("c", "a"), job("a"), job("b"), job("d")]) == []
    assert max(int(n) for n in (tmp_path / "most").read_text().split()) <= 2
    assert said.getvalue().index("a finished") < said.getvalue().index("c finished")


def test_a_failed_job_stops_only_those_that_need_it(tmp_path: Path) -> None:
    scripts = {
        "bad": "echo before; echo 'error: expected more; got less' >&2; exit 2",
        "quoting": "echo 'error: expected JSON; got a parse error: line 1' >&2; exit 2",
        "killed": "kill -9 $$",
        "broken": "echo 'Traceback ...'; echo 'ZeroDivisionError: division by zero'; exit 1",
        "next": "true",
        "after": "true",
        "good": f"touch {tmp_path}/good-done",
    }
    made, _ = pool(tmp_path, scripts)
    single = [job(name) for name in ("bad", "quoting", "killed", "broken", "good")]
    names = [*single, job("next", "bad"), job("after", "next")]
    failures = {f.name: f.reason for f in made.run(names)}
    assert (tmp_path / "good-done").exists() and set(failures) == set(scripts) - {"good"}
    assert failures["bad"].startswith("expected more; got less (all that it printed: ")
    assert failures["quoting"].startswith("expected JSON; got a parse error: line 1 (all")
    assert failures["killed"].startswith("killed by signal 9 (SIGKILL)")
    assert failures["broken"].startswith("ZeroDivisionError: division by zero")
    assert failures["next"] == "needs bad, which failed" and failures["after"] == "needs next, which failed"
    assert (tmp_path / "logs" / "bad.log").read_text().startswith("before\n")


def stop_when_ready(folder: Path, names: list[str]) -> None:
    def send() -> None:
        while not all(
            (folder / "logs" / f"{n}.log").exists() and (folder / "logs" / f"{n}.log").read_text() for n in names
        ):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


def test_ctrl_c_stops_all_and_tells_where_things_are(tmp_path: Path) -> None:
    made, said = pool(tmp_path, {"a": SAVING, "b": SAVING, "c": "true"})
    stop_when_ready(tmp_path, ["a", "b"])
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        made.run([job("a"), job("b"), job("c")])
    assert stopped.value.code == 130 and time.monotonic() - began < 5
    assert all((tmp_path / "logs" / f"{n}.log").read_text() == "ready\nsaved\n" for n in "ab")
    words = said.getvalue()
    assert "Stopped: 0 of 3 jobs finished, 0 failed." in words and "update     0 of 10" in words
    assert "run the same command" in words and not (tmp_path / "logs" / "c.log").exists()


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.1)
    made, _ = pool(tmp_path, {"a": STUBBORN})
    stop_when_ready(tmp_path, ["a"])
    with pytest.raises(SystemExit):
        made.run([job("a")])
    assert made.running[0].process.returncode == -signal.SIGKILL


def test_progress_is_read_from_the_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / METRICS
    shown = JobProgress(Job("full-0", variant="full", updates=100), tmp_path, now=0.0)
    assert last_step(metrics) == 0 and "ETA" not in shown.describe()
    metrics.write_text("".join(f'{{"step": {k}}}\n' for k in range(11)))
    shown.look(now=60.0)
    assert "update    10 of 100" in shown.describe() and "ETA" not in shown.describe()  # one time says nothing
    metrics.write_text("".join(f'{{"step": {k}}}\n' for k in range(31)) + '{"step": 3')
    shown.look(now=100.0)
    assert shown.seconds_per_update() == pytest.approx(2.0)
    assert shown.describe().endswith("update    30 of 100  2.00 s an update  ETA 0:02:20")
    metrics.write_text('{"step": 100}\n')
    shown.look(now=200.0)
    assert shown.describe().endswith("trained, being scored")


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    made, said = pool(tmp_path, {"a": "sleep 0.1"})
    made.run([job("a")])
    assert said.getvalue().splitlines()[0] == "0 of 1 jobs finished"
    assert all(c.isprintable() or c == "\n" for c in said.getvalue())


def test_in_a_terminal_every_running_job_has_a_bar(tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, width=120, force_terminal=True)
    made = workers.WorkerPool(tmp_path, 2, lambda j: "sleep 0.5", ("sh", "-s"), console)
    assert made.run([job("first"), job("second")]) == []
    words = said.getvalue()
    assert "first" in words and "second" in words and "0 of 10" in words and "━" in words


def write_tiny(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_a_worker_does_the_job_of_its_task(tmp_path: Path) -> None:
    made, folder = load_study(write_tiny(tmp_path)), tmp_path / "s"
    task = Task(made.model_dump(mode="json"), str(folder), False, "full-0", ["npedit", "study", "x"])
    run_task(Task(**json.loads(task.to_json())))
    assert {p.name for p in (folder / "full-0").glob("score-*")} == {"score-full.json", "score-one_step.json"}
    assert sorted(p.name for p in folder.iterdir()) == ["full-0"]


def study_command(folder: Path) -> list[str]:
    words = ["study", str(write_tiny(folder)), "--out", str(folder / "s"), "--workers", "2"]
    return [sys.executable, "-m", "npedit", *words]


@pytest.mark.slow
def test_the_command_fills_a_study_with_two_workers_after_a_kill(tmp_path: Path) -> None:
    """A killed parent takes its workers along; the same command then does the rest."""
    command = study_command(tmp_path)
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any((tmp_path / "s").glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    scores = json.loads((tmp_path / "s" / "results.json").read_text())
    assert set(scores) == {"full", "dmd_only", "one_step"}
    assert "Results:" in ended.stdout and "dmd_only-0 finished" in ended.stdout


@pytest.mark.slow
def test_a_failed_row_is_told_at_the_end_and_the_exit_code_is_2(tmp_path: Path) -> None:
    command = study_command(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dmd_only-0").write_text("no folder")
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 2 and "1 that did not" in ended.stderr and "dmd_only-0" in ended.stderr
    assert set(json.loads((tmp_path / "s" / "results.json").read_text())) == {"full", "one_step"}
