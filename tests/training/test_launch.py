"""One process per GPU: exit codes, signals, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npedit.cli.train import run_train
from npedit.errors import UserError
from npedit.runs import checkpoint
from npedit.training import launch

ROOT = Path(__file__).parents[2]
WAITING = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done"


def shell(words: str) -> subprocess.Popen:
    return subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize(("ends", "code"), [((0, 0), 0), ((1, 2), 2), ((0, 3), 3), ((143, 143), 143), ((130, 0), 130)])
def test_exit_codes(ends: tuple[int, int], code: int) -> None:
    assert launch._wait_for_all([shell(f"sleep 0.{i}; exit {end}") for i, end in enumerate(ends)]) == code


def test_a_failed_process_ends_the_waiting_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    waiting = shell("exec sleep 600")
    assert launch._wait_for_all([shell("exit 2"), waiting]) == 2
    assert waiting.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("times", "code"), [(1, 143), (2, 128 + signal.SIGKILL)])
def test_a_signal_is_passed_on_and_a_second_one_kills(times: int, code: int) -> None:
    children = [shell(WAITING if times == 1 else "trap '' TERM; echo ready; sleep 600") for _ in range(2)]
    for child in children:
        child.stdout.readline()
    before = signal.getsignal(signal.SIGTERM)
    with launch.forward_signals(children):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        assert launch._wait_for_all(children) == code
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_parent_leaves_no_process() -> None:
    script = (
        "import os, subprocess; from npedit.training import launch\n"
        "print(subprocess.Popen(['sleep', '600'], preexec_fn=launch.end_with_parent).pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE)
    child = Path("/proc") / parent.stdout.readline().decode().strip()
    parent.wait()
    deadline = time.monotonic() + 60
    while (child / "stat").exists() and (child / "stat").read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def test_a_batch_that_processes_cannot_share_starts_no_process(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a multiple of the 5 processes.*got 24"):
        run_train("toy", [], tmp_path / "run", False, 5)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["npedit", "torchrun"])
def test_the_command_trains_with_two_processes(tmp_path: Path, by: str) -> None:
    words = ["train", "demo", "stages.0.updates=1", "stages.1.updates=1", "stages.0.batch_size=2"]
    words += ["stages.1.batch_size=2", "trainer.benchmark=''", "trainer.shard=full", "--out", str(tmp_path / "run")]
    start = ["npedit", *words, "--processes", "2"]
    if by == "torchrun":
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "npedit", *words]
    env = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", *start], env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in checkpoint.read_rows(tmp_path / "run" / checkpoint.METRICS)] == [0, 1, 2]
    assert done.stdout.count("Next:") == 1 and (tmp_path / "run" / "final" / "transformer").is_dir()
