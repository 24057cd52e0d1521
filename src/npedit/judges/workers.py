"""Work in daemon threads, for requests to servers: a request that is never answered cannot keep the process alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

STOP_SECONDS = 2.0  # how long work in progress is waited for at the end
Job = TypeVar("Job")
Result = TypeVar("Result")


def results_as_finished(
    work: Callable[[Job], Result], jobs: Sequence[Job], count: int, on_stop: Callable[[], None]
) -> Generator[tuple[Job, Result], None, None]:
    """(job, `work(job)`) of each job, in the order in which they finish, computed in at most `count` threads.

    If `work` or the caller fails, or Ctrl-C comes, no further job is begun, `on_stop` is called, and jobs in progress
    have `STOP_SECONDS` to finish; their results are lost.

    Raises:
        BaseException: the first error of `work`.
    """
    waiting: SimpleQueue[Job] = SimpleQueue()
    finished: SimpleQueue[tuple[Job, list[Result], BaseException | None]] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    stopping = threading.Event()
    threads = [
        threading.Thread(target=_work_through, args=(work, waiting, finished, stopping), daemon=True)
        for _ in range(min(count, len(jobs)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in jobs:
            job, results, error = finished.get()
            if error is not None:
                raise error
            yield job, results[0]
    except BaseException:
        stopping.set()
        on_stop()
        raise
    finally:
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, deadline - time.monotonic()))


def _work_through(work: Callable[[Any], Any], waiting: Any, finished: Any, stopping: threading.Event) -> None:
    """One thread: jobs from the queue `waiting` until it is empty or one fails."""
    while not stopping.is_set():
        try:
            job = waiting.get_nowait()
        except Empty:
            return
        try:
            finished.put((job, [work(job)], None))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting main thread, which raises it
            stopping.set()
            finished.put((job, [], error))
