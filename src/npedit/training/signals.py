"""Signals that stop a training, and its exit codes.

    signal            who sends it                         exit code
    SIGINT            Ctrl-C                               130
    SIGTERM, SIGUSR1  Slurm before a preemption or the     75 (EX_TEMPFAIL: not finished, start the same command again)
                      end of the time limit; a cloud's
                      spot machine; `kill`

The current update is finished, a checkpoint is written, and the process exits. Samples and evaluations are stopped
between two batches of pictures; the resumed run repeats them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from npedit.nets import distributed

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def exit_code(number: int) -> int:
    """The exit code of a training that a signal has stopped."""
    return 128 + number if number == signal.SIGINT else os.EX_TEMPFAIL


@contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """A list that collects the first stop signal inside the `with` block; a second signal has its usual effect. With
    several processes all signals are collected: the system and torchrun may both send the same signal."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}

    def collect(number: int, frame: Any) -> None:
        caught.append(number)
        for n in STOP_SIGNALS if not distributed.is_multi_process() else ():
            signal.signal(n, before[n])

    for n in STOP_SIGNALS:
        signal.signal(n, collect)
    try:
        yield caught
    finally:
        for n in STOP_SIGNALS:
            signal.signal(n, before[n])
