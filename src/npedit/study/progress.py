"""Shows how far the jobs of a study are: bars in a terminal, plain lines elsewhere.

How far a run is stands in its `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from npedit.runs.checkpoint import METRICS
from npedit.study.jobs import Job

PRINT_SECONDS = 30.0  # between two groups of lines where there is no terminal
TAIL_BYTES = 65_536  # of a file of metrics; a row is much shorter


class JobProgress:
    """How far one job is. `now` is a clock in seconds."""

    def __init__(self, job: Job, run: Path, now: float | None = None) -> None:
        self.job, self.run = job, run
        self.began = time.monotonic() if now is None else now
        self.first: tuple[int, float] | None = None  # number of updates and time when the first update ended
        self.step = last_step(run / METRICS) if job.variant else 0
        self._start = self.step

    def look(self, now: float | None = None) -> None:
        """Read the number of finished updates again."""
        now = time.monotonic() if now is None else now
        self.step = last_step(self.run / METRICS) if self.job.variant else 0
        if self.first is None and self.step > self._start:
            self.first = (self.step, now)
        self.seen = now

    def seconds_per_update(self) -> float | None:
        """Seconds per update since this process began; None before the second update."""
        if self.first is None or self.step <= self.first[0]:
            return None
        return (self.seen - self.first[1]) / (self.step - self.first[0])

    def describe(self) -> str:
        """One line: the job, its updates, seconds per update and the time that is left."""
        words, total = f"{self.job.name:24}", self.job.updates
        if self.job.critic:
            return f"{words} critic, {total} batches"
        if total and self.step >= total:
            return f"{words} trained, being scored"
        words += f" update {self.step:>5} of {total}"
        if (each := self.seconds_per_update()) is None:
            return words
        return f"{words}  {each:.2f} s an update  ETA {format_seconds(each * (total - self.step))}"


class StudyProgress:
    """The progress of all running jobs on a console. In a terminal it is used as a context manager."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.printed_at = float("-inf")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
        self.bars = Progress(*columns, console=console, transient=True)
        self.tasks: dict[str, TaskID] = {}
        self.all = self.bars.add_task("", total=total)

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def show(self, running: Sequence[JobProgress], done: int, failed: int) -> None:
        """Show the running jobs and the numbers of finished and failed ones."""
        is_due = time.monotonic() - self.printed_at >= PRINT_SECONDS
        if not self.console.is_terminal and not is_due:
            return
        for job in running:
            job.look()
        state = f"{done} of {self.total} jobs finished" + (f", {failed} failed" if failed else "")
        if self.console.is_terminal:
            self._move_bars(running, state, done + failed)
            return
        self.printed_at = time.monotonic()
        for line in (state, *(f"  {job.describe()}" for job in running)):
            self.console.print(line, markup=False, highlight=False)

    def _move_bars(self, running: Sequence[JobProgress], state: str, ended: int) -> None:
        for name in set(self.tasks) - {job.job.name for job in running}:
            self.bars.remove_task(self.tasks.pop(name))
        for job in running:
            if job.job.name not in self.tasks:
                self.tasks[job.job.name] = self.bars.add_task("", total=job.job.updates or None)
            self.bars.update(self.tasks[job.job.name], completed=job.step, description=job.describe())
        self.bars.update(self.all, completed=ended, description=state)


def last_step(metrics: Path) -> int:
    """The number of the last update in a file of metrics; 0 if there is none yet. An unfinished last line is left
    out."""
    try:
        with open(metrics, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            found: Any = json.loads(line)
        except ValueError:
            continue
        return int(found["step"]) if isinstance(found, dict) and "step" in found else 0
    return 0


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
