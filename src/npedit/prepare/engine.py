"""Where the photos of a run are worked on: the interface of an engine, and the threads of this process.

An engine maps functions of one row over many rows. `npedit prepare` needs two such functions: one reads a photo, one
asks the model about a photo.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from npedit.judges.cache import AnswerCache
from npedit.judges.workers import results_as_finished
from npedit.prepare.asking import Answers, CostCeiling, Meter
from npedit.prepare.passes import Passes
from npedit.prepare.photos import Photo, ScanJob, scan_photo

Row = dict[str, Any]
Job = tuple[Row, Any]  # a photo, and what is wanted for it
Work = Callable[[Row, Any, Passes], Any]  # such as `passes.prepare_photo`; a function at the top of a module


class Engine(ABC):
    """Runs functions over the photos of one set."""

    @abstractmethod
    def open_answers(self, path: Path, meter: Meter) -> AbstractContextManager[tuple[Answers, Meter]]:
        """The kept answers in a file, and the meter that counts the tokens of all answers, these included. Both are
        open within the block. `meter` gives the prices.

        Raises:
            UserError: another process holds the file, or it cannot be read or written.
        """

    @abstractmethod
    def scan(self, jobs: Sequence[ScanJob]) -> Iterator[Photo]:
        """`scan_photo` of each job, in any order."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Job], passes: Passes) -> Iterator[tuple[Row, Any]]:
        """(photo, `work(photo, wanted, passes)`) as they finish. A cost ceiling ends with (photo, the reason): what has
        finished until then is complete.

        Raises:
            UserError: the model cannot be reached; requests in work are not repeated.
        """


def ceiling_reason(meter: Meter) -> str:
    """Why a run ended at the cost ceiling."""
    return f"the next request could cost more than --max-cost {meter.max_cost:g}; raise it"


class LocalEngine(Engine):
    """The threads of this process: `threads` read photos; the writer's `workers` say how many ask."""

    def __init__(self, threads: int = 8):
        self.threads = threads

    @contextmanager
    def open_answers(self, path: Path, meter: Meter) -> Iterator[tuple[Answers, Meter]]:
        """See `Engine.open_answers`."""
        with AnswerCache(path) as cache:
            meter.add(cache.total_token_usage())
            yield cache, meter

    def scan(self, jobs: Sequence[ScanJob]) -> Iterator[Photo]:
        """See `Engine.scan`."""
        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(lambda job: scan_photo(*job), jobs)

    def run(self, work: Work, jobs: Sequence[Job], passes: Passes) -> Iterator[tuple[Row, Any]]:
        """See `Engine.run`. At most as many photos are in work as the writer takes requests."""
        stopping = threading.Event()

        def attempt(job: Job) -> Any:
            try:
                return "" if stopping.is_set() else work(*job, passes)
            except CostCeiling:
                stopping.set()
                return ceiling_reason(passes.writer.meter)

        stopped: tuple[Row, str] | None = None
        with closing(results_as_finished(attempt, jobs, passes.writer.writer.workers, passes.stop_retrying)) as results:
            for (photo, _), result in results:
                if not isinstance(result, str):
                    yield photo, result
                elif result:
                    stopped = photo, result
        if stopped:
            yield stopped
