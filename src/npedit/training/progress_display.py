"""How far a training is: one live line in a terminal; elsewhere, as in a log file, a plain line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 20.0  # between plain lines


def plain_console(is_quiet: bool = False) -> Console:
    """A console that neither wraps nor cuts lines, and prints text as it is: brackets are not read as styles."""
    return Console(quiet=is_quiet, soft_wrap=True, highlight=False, markup=False)


class ProgressDisplay:
    """The display of a training of `total` updates, of which `done` were made earlier. It is shown in a `with` block,
    until the end of the block or `stop`."""

    def __init__(
        self, console: Console, name: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.total, self._clock = console, total, clock
        self._bar = self._make_bar() if console.is_terminal and not console.is_dumb_terminal else None
        self._task = self._bar.add_task(name, total=total, completed=done, figures="") if self._bar else None
        self._printed_at: float | None = None
        self._first: tuple[float, int] | None = None  # when the first update of this process was finished, its number

    def _make_bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        eta = (TextColumn("ETA"), TimeRemainingColumn())
        return Progress(*columns, *eta, TextColumn("{task.fields[figures]}"), console=self.console)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the live line; what is printed then is below it."""
        if self._bar:
            self._bar.stop()

    def update(self, done: int, stage: str, figures: str) -> None:
        """Show that `done` updates are made, the last one in `stage`. Plain lines are printed for the first update, for
        the last, and otherwise at most one every `LINE_SECONDS`."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, description=stage, figures=figures)
            return
        now = self._clock()
        self._first = self._first or (now, done)
        if self._printed_at is None or now - self._printed_at >= LINE_SECONDS or done == self.total:
            self._printed_at = now
            parts = [f"{stage} {done}/{self.total}", *self._speed(now, done), figures]
            self.console.print("  ".join(part for part in parts if part))

    def _speed(self, now: float, done: int) -> list[str]:
        """The seconds of an update and the time left, in words; [] before the second update of this process."""
        assert self._first
        began, first = self._first
        if done <= first:
            return []
        seconds = (now - began) / (done - first)
        left = timedelta(seconds=round(seconds * (self.total - done)))
        return [f"{seconds:.2f} s/update", *([f"{left} left"] if done < self.total else [])]
