"""The progress of `npedit prepare`: a bar in a terminal, plain lines in a log file, and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from npedit.prepare.prepare import Progress, ReportProgress

STAGES = {"photos": "reading photos", "edits": "writing edits", "captions": "writing captions"}
LINE_SECONDS = 30.0  # between two plain lines
SAMPLE_SECONDS = 1.0  # between two counts of finished photos that a rate is measured from
LEAST_SECONDS = 5.0  # of measuring before a time left is told
MOST_SECONDS = 120.0  # that a rate is measured over


class TimeLeft:
    """The time left of one stage, from the rate at which its photos are finished.

    Photos can be finished in bursts: at once where their answers are kept, and block by block with the processes of a
    cluster, whose start takes time too. So the rate is measured between two counts that are apart in time, and the time
    before the first finished photo does not belong to it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> None:
        """Count `done` finished photos now."""
        now = self._clock()
        if now - self._last < SAMPLE_SECONDS:
            return
        self._last = now
        self._counts.append((now, done))
        while len(self._counts) > 2 and now - self._counts[1][0] > MOST_SECONDS:
            self._counts.popleft()

    def seconds(self, total: int) -> float | None:
        """The seconds until `total` photos are finished; None if they cannot be known yet."""
        if not self._counts:
            return None
        (start, first), (end, last) = self._counts[0], self._counts[-1]
        if end - start < LEAST_SECONDS or last <= first:
            return None
        return (total - last) * (end - start) / (last - first)


@contextmanager
def progress_display(priced: bool, err: Console) -> Iterator[ReportProgress]:
    """A progress bar with the time left, the rows of each type, and the cost; a line from time to time where `err` is
    no terminal."""
    times: dict[str, TimeLeft] = {}

    def time_left(progress: Progress) -> float | None:
        left = times.setdefault(progress.stage, TimeLeft())
        left.add(progress.done)
        return left.seconds(progress.total)

    if err.is_terminal and not err.is_dumb_terminal:
        with _bar_display(priced, err, time_left) as report:
            yield report
    else:
        yield _line_display(priced, err, time_left)


@contextmanager
def _bar_display(priced: bool, err: Console, time_left: Callable[[Progress], float | None]) -> Iterator[ReportProgress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
    with Bar(*columns, console=err, transient=True) as bar:
        tasks = {}

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(STAGES[progress.stage], words="")
            words = [format_time_left(time_left(progress)), progress_words(progress, priced)]
            shown = escape(" | ".join(filter(None, words)))
            bar.update(tasks[progress.stage], completed=progress.done, total=progress.total, words=shown)

        yield report


def _line_display(priced: bool, err: Console, time_left: Callable[[Progress], float | None]) -> ReportProgress:
    printed_at = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal printed_at
        left = time_left(progress)
        if time.monotonic() - printed_at >= LINE_SECONDS:
            printed_at = time.monotonic()
            err.print(escape(progress_line(progress, priced, left)))

    return report


def progress_line(progress: Progress, priced: bool, seconds_left: float | None) -> str:
    """A line about the progress, for a log file."""
    done = f"{STAGES[progress.stage]}: {progress.done} of {progress.total} photos"
    left, words = format_time_left(seconds_left), progress_words(progress, priced)
    return (f"{done}, {left}" if left else done) + (f" | {words}" if words else "")


def format_time_left(seconds: float | None) -> str:
    """The time left as text; "" if it is not known."""
    if seconds is None:
        return ""
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def progress_words(progress: Progress, priced: bool) -> str:
    """The rows of each type, the rejected ones, and the cost, for a progress display."""
    if progress.stage == "photos":
        return ""
    counts = " ".join(f"{kind} {count}" for kind, count in sorted(progress.rows_by_type.items()))
    return f"{counts} | rejected {progress.rejected}" + (f" | cost {progress.cost:.2f}" if priced else "")
