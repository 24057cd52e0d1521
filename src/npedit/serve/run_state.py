"""Whether a run trains, told from the files in its folder. Nothing is written or locked there."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path

from npedit.runs.editor_facts import FACTS_FILE
from npedit.runs.lock import HOLDER, WATCH_SECONDS
from npedit.runs.resolve import latest_complete_checkpoint


class RunState(StrEnum):
    """What a run does now, or how it ended."""

    TRAINING = "training"
    FINISHED = "finished"  # the finished editor is there
    STOPPED = "stopped"  # everything is saved, as after Ctrl-C
    CRASHED = "crashed"  # updates after the last checkpoint are lost, or there is no checkpoint


class HolderWatch:
    """Whether the process that holds a run's folder renews its file `.holder.json`, as it does every ten seconds.

    The file's time may come from another machine's clock. So a change of this time is noted by this machine's clock.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / HOLDER
        self._modified = 0
        self._changed_at = 0.0

    def is_held(self) -> bool:
        """Whether the file is there and was renewed in the last `WATCH_SECONDS`."""
        try:
            modified = self._file.stat().st_mtime_ns
        except OSError:
            return False
        now = time.monotonic()
        if modified != self._modified:
            age = 0.0 if self._modified else max(0.0, time.time() - modified / 1e9)
            self._modified, self._changed_at = modified, now - age
        return now - self._changed_at < WATCH_SECONDS


def find_state(run: Path, is_held: bool, update: int, total: int | None) -> RunState:
    """The state of a run after its last logged `update` (-1: not known) of `total` (None: not known). `is_held` says
    whether a process holds its folder."""
    if is_held:
        return RunState.TRAINING
    has_all_updates = total is None or update < 0 or update >= total
    if has_all_updates and (run / "final" / FACTS_FILE).is_file():
        return RunState.FINISHED
    checkpoint = latest_complete_checkpoint(run)
    is_saved = checkpoint is not None and int(checkpoint.name[11:]) >= update
    return RunState.STOPPED if is_saved else RunState.CRASHED
