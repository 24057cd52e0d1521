"""Whether a run trains, has finished, was stopped or has crashed, told from its files."""

import json
import os
import time

import pytest
from watched_runs import add_checkpoint, add_final, make_run

from npedit.runs import lock
from npedit.serve import run_state
from npedit.serve.run_state import HolderWatch, RunState, find_state


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_a_held_folder_trains(run):
    watch = HolderWatch(run)
    assert not watch.is_held()
    with lock.hold(run, "train"):
        before = sorted(path.name for path in run.iterdir()), (run / lock.HOLDER).read_bytes()
        assert watch.is_held() and HolderWatch(run).is_held()
        assert find_state(run, True, 5, 120) == RunState.TRAINING
        after = sorted(path.name for path in run.iterdir()), (run / lock.HOLDER).read_bytes()
        assert before == after
    assert not watch.is_held()
    with lock.hold(run, "train"):  # looking has locked nothing
        assert watch.is_held()


def leave_holder(run, seconds_ago):
    (run / lock.HOLDER).write_text(json.dumps({"pid": 1, "work": "train"}))
    then = time.time() - seconds_ago
    os.utime(run / lock.HOLDER, (then, then))


def test_a_holder_that_is_no_longer_renewed_has_ended(run, monkeypatch):
    leave_holder(run, seconds_ago=1000)  # as after kill -9
    assert not HolderWatch(run).is_held()
    leave_holder(run, seconds_ago=5)
    watch = HolderWatch(run)
    assert watch.is_held()
    monkeypatch.setattr(run_state, "WATCH_SECONDS", 0.0)
    assert not watch.is_held()


@pytest.mark.parametrize("seconds_ago", [-9000, 9000])
def test_the_clock_of_another_machine_may_differ(run, seconds_ago):
    leave_holder(run, seconds_ago + 10)
    watch = HolderWatch(run)
    watch.is_held()
    leave_holder(run, seconds_ago)  # it was renewed
    assert watch.is_held()


def test_how_a_run_ended(run):
    assert find_state(run, False, -1, 120) == RunState.CRASHED  # before the first update, and nothing is saved
    add_checkpoint(run, 0)
    assert find_state(run, False, 0, 120) == RunState.STOPPED
    add_checkpoint(run, 30)
    assert find_state(run, False, 30, 120) == RunState.STOPPED
    assert find_state(run, False, 31, 120) == RunState.CRASHED
    assert find_state(run, False, 120, 120) == RunState.CRASHED  # the editor was not written
    add_final(run)
    assert find_state(run, False, 120, 120) == RunState.FINISHED
    assert find_state(run, False, -1, None) == RunState.FINISHED  # its metrics were deleted
    assert find_state(run, False, 130, 200) == RunState.CRASHED  # resumed for more updates
    add_checkpoint(run, 130)
    assert find_state(run, False, 130, 200) == RunState.STOPPED
