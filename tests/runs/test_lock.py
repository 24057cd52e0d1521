"""One holder per folder: refusals that name the holder, move-aside, and file systems without `flock`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from npedit.cli.train import run_train
from npedit.errors import UserError
from npedit.runs import lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from npedit.runs import lock
with lock.hold(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds tmp_path/run."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def foreign(folder: Path) -> None:
    """Leave what a process on another machine writes, where `flock` is not shared between machines."""
    folder.mkdir(exist_ok=True)
    facts = {"host": "n07", "boot": "another", "pid": 41, "work": "train", "since": "2026-01-01 00:00:00", "token": "t"}
    (folder / lock.HOLDER).write_text(json.dumps(facts))


def test_the_message_names_the_holder(holder: subprocess.Popen, tmp_path: Path) -> None:
    expected = rf"held by process {holder.pid} on host {socket.gethostname()} \(train, since 20"
    for attempt in (lambda: lock.hold(tmp_path / "run", "x").__enter__(), lambda: lock.require_free(tmp_path)):
        with pytest.raises(UserError, match=expected):
            attempt()


@pytest.mark.parametrize("folder", ["run", "."])
def test_a_held_folder_is_not_moved(holder: subprocess.Popen, tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match="held by process"):
        lock.move_aside(tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_fresh_does_not_move_a_run_in_training(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"process {holder.pid} on host"):
        run_train("toy", [], tmp_path / "run", True, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_holder_that_was_killed_holds_no_longer(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with lock.hold(tmp_path / "run", "train"):
        assert json.loads((tmp_path / "run" / lock.HOLDER).read_text())["pid"] == os.getpid()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [lock.LOCK]


def test_what_is_free_is_moved_and_names_never_clash(tmp_path: Path) -> None:
    moved = set()
    for i in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(str(i))
        moved.add(lock.move_aside(tmp_path / "run"))
    assert sorted((p / "file").read_text() for p in moved) == ["0", "1", "2"]
    assert not any((p / lock.HOLDER).exists() for p in moved)
    assert lock.move_aside(tmp_path / "run") is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_flock_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.3)
    with (
        lock.hold(tmp_path, "train"),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        lock.hold(tmp_path, ""),
    ):
        pass
    with lock.hold(tmp_path, "train"):
        pass


def test_another_machine_that_renews_its_file_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 5.0)
    foreign(tmp_path)
    timer = threading.Timer(0.1, os.utime, [tmp_path / lock.HOLDER])
    timer.start()
    with pytest.raises(UserError, match="process 41 on host n07"), lock.hold(tmp_path, "train"):
        pass
    timer.join()


def test_another_machine_that_died_is_waited_for_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.2)
    foreign(tmp_path)
    with lock.hold(tmp_path, "train"):
        assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == os.getpid()
    foreign(tmp_path)
    old = time.time() - 2 * lock.STALE_SECONDS
    os.utime(tmp_path / lock.HOLDER, (old, old))
    monkeypatch.setattr(lock, "WATCH_SECONDS", 600.0)
    with lock.hold(tmp_path, "train"):
        pass


def test_one_that_was_suspended_finds_out(tmp_path: Path) -> None:
    with lock.hold(tmp_path, "train") as held:
        held.check()
        foreign(tmp_path)
        with pytest.raises(UserError, match="process 41 on host n07"):
            held.check()
    assert (tmp_path / lock.HOLDER).exists()  # it is the other's


def test_a_damaged_holder_file_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.1)
    for text in ("", "\0\0", "[1]"):
        (tmp_path / lock.HOLDER).write_text(text)
        with lock.hold(tmp_path, "train"):
            pass


@pytest.mark.parametrize("name", [".", "..", "../run", "inner"])
def test_the_working_folder_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Relative paths of this process and of its shell would lead into the moved folder."""
    (tmp_path / "run" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    if name == "inner":
        assert lock.move_aside(Path(name)) is not None
        return
    with pytest.raises(UserError, match="got the working folder"):
        lock.move_aside(Path(name))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
