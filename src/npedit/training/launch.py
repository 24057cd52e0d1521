"""Start one process per GPU of this machine, with the environment that torchrun would give them.

torchrun always fails with exit code 1 and its own long report. Here the exit code and the message are those of the
process that failed. On several machines, use torchrun: see docs/clusters.md.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from npedit.training.signals import STOP_SIGNALS, exit_code

LIBC = ctypes.CDLL(None)  # opened before any fork
GRACE = 10.0  # seconds until the other processes are killed after one has failed
STOP_CODES = (0, *(exit_code(n) for n in STOP_SIGNALS))
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def default_process_count() -> int:
    """Processes to start on this machine: one per visible GPU, one where there is none."""
    from npedit.nets.device import accelerator_count

    return max(1, accelerator_count())


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `npedit ARGUMENTS` in `count` processes that train together; returns their exit code.

    The first SIGINT, SIGTERM or SIGUSR1 is sent to all, a second one kills them. When one fails, the others are ended.

    Returns:
        the exit code: 0; 130 or 75 if a signal stopped them (`signals.py`); 2 for a user error; else that of the first
        process that failed.
    """
    command = [sys.executable, "-m", "npedit", *arguments]
    common = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    children: list[subprocess.Popen] = []
    with forward_signals(children):
        for i in range(count):
            env = common | {"RANK": str(i), "LOCAL_RANK": str(i)}
            # A new session: otherwise Ctrl-C in a terminal would reach the process twice.
            children.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=end_with_parent))
        return _wait_for_all(children)


def _wait_for_all(children: Sequence[subprocess.Popen]) -> int:
    """Wait for all. The exit code is that of the first to fail, but 2 if any gave 2."""
    codes: list[int] = []
    running, deadline = list(children), float("inf")
    while running:
        for child in [c for c in running if c.poll() is not None]:
            running.remove(child)
            codes.append(child.returncode if child.returncode >= 0 else 128 - child.returncode)
            if codes[-1] not in STOP_CODES:
                deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for child in running:
                child.kill()  # it waits in a collective for the failed process and would not handle SIGTERM
        time.sleep(0.1)
    return 2 if 2 in codes else next((c for c in codes if c), 0)


@contextmanager
def forward_signals(children: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """The list of the stop signals that have come. The first is sent to all children that run, a second one kills them.
    Children may be added to the sequence inside the `with` block."""
    received: list[int] = []

    def forward_signal(number: int, frame: Any) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number if len(received) == 1 else signal.SIGKILL)

    before = {n: signal.signal(n, forward_signal) for n in STOP_SIGNALS}
    try:
        yield received
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def end_with_parent() -> None:
    """In the child process (`preexec_fn`): ask for SIGTERM when the parent dies, also by `kill -9`. So the GPU becomes
    free."""
    if sys.platform == "linux":
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
