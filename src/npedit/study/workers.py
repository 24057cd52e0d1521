"""Does the jobs of a study side by side, each in a process of its own with one thread (`worker.py`).

What a job prints goes into `logs/JOB.log` in the study's folder. Progress is read from the runs' `metrics.jsonl`. So
the parent keeps no state: after any stop the same command resumes. A job that fails does not stop the others. When the
parent dies, also by `kill -9`, the system sends SIGTERM to the workers, and their trainings save and end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from rich.console import Console

from npedit.errors import resume_command
from npedit.runs.checkpoint import explain_write_errors
from npedit.study.jobs import Failure, Job
from npedit.study.progress import JobProgress, StudyProgress
from npedit.study.worker import ERROR, USER_ERROR
from npedit.training.launch import end_with_parent, forward_signals
from npedit.training.signals import exit_code

GRACE = 10.0  # seconds until a worker is killed that does not stop after a signal
POLL_SECONDS = 0.2
WORKER = (sys.executable, "-m", "npedit.study.worker")
# One thread, and glibc's allocator keeps freed memory: updates of the toy are some 10 % faster (docs/log.md).
WORKER_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass
class Worker:
    """A process that does one job."""

    job: Job
    process: subprocess.Popen
    log: IO[bytes]
    log_start: int  # where this process's lines begin
    progress: JobProgress

    def failure(self) -> Failure | None:
        """What the ended process did not finish; None if all went well."""
        code = self.process.returncode
        self.log.seek(self.log_start)
        said = self.log.read().decode("utf-8", "replace").strip()
        self.log.close()
        if code == 0:
            return None
        reason = f"\n{said}".rpartition(f"\n{ERROR}" if code == USER_ERROR else "\n")[2]
        if code < 0:
            reason = f"killed by signal {-code} ({signal.Signals(-code).name})"
        return Failure(self.job.name, f"{reason or f'exit code {code}'} (all that it printed: {self.log.name})")


@dataclass
class WorkerPool:
    """Does jobs in at most `count` processes at a time. `task_for` gives the text that the worker reads."""

    folder: Path
    count: int
    task_for: Callable[[Job], str]
    command: Sequence[str] = WORKER
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Do all jobs; returns those that failed or that could not begin.

        Raises:
            SystemExit: a stop signal came; the workers have saved and ended. Exit codes as for a training.
        """
        self.waiting, self.running = list(jobs), list[Worker]()
        self.done, self.failures = set[str](), list[Failure]()
        children: list[subprocess.Popen] = []
        terminal = self.console.is_terminal
        progress = StudyProgress(self.console, len(jobs))
        with forward_signals(children) as received, progress if terminal else nullcontext():
            while (self.waiting or self.running) and not received:
                self._start_ready_jobs(children)
                self._collect_ended()
                progress.show([w.progress for w in self.running], len(self.done), len(self.failures))
                time.sleep(POLL_SECONDS)
            if received:
                self._end_all()
        if received:
            self._exit_with_state(received[0], len(jobs))
        return self.failures

    def _start_ready_jobs(self, children: list[subprocess.Popen]) -> None:
        names, failed = {j.name for j in self.waiting}, {f.name for f in self.failures}
        for job in list(self.waiting):
            if lost := [need for need in job.needs if need in failed]:
                self.waiting.remove(job)
                self.failures.append(Failure(job.name, f"needs {', '.join(lost)}, which failed"))
                failed.add(job.name)
            elif len(self.running) < self.count and not (names | self._running_names()) & set(job.needs):
                self.waiting.remove(job)
                self.running.append(self._start(job))
                children.append(self.running[-1].process)

    def _running_names(self) -> set[str]:
        return {worker.job.name for worker in self.running}

    def _start(self, job: Job) -> Worker:
        path = self.folder / "logs" / f"{job.name}.log"
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "a+b")  # noqa: SIM115 - closed when the worker has ended
        start = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | WORKER_VARIABLES,
            start_new_session=True,  # otherwise Ctrl-C in a terminal would reach the process twice
            preexec_fn=end_with_parent,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(self.task_for(job).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # the process has ended already; its exit code tells
        return Worker(job, process, log, start, JobProgress(job, self.folder / job.name))

    def _collect_ended(self) -> None:
        for worker in [w for w in self.running if w.process.poll() is not None]:
            self.running.remove(worker)
            if failure := worker.failure():
                self.failures.append(failure)
                self.console.print(f"{failure.name} failed: {failure.reason}", markup=False)
            else:
                self.done.add(worker.job.name)
                self.console.print(f"{worker.job.name} finished", markup=False)

    def _end_all(self) -> None:
        """Wait until the workers have saved and ended; kill those that take too long."""
        deadline = time.monotonic() + GRACE
        while any(w.process.poll() is None for w in self.running):
            if time.monotonic() > deadline:
                for worker in self.running:
                    worker.process.kill()
            time.sleep(0.05)

    def _exit_with_state(self, number: int, total: int) -> NoReturn:
        self.console.print(f"Stopped: {len(self.done)} of {total} jobs finished, {len(self.failures)} failed.")
        for worker in self.running:
            self.console.print(f"  {worker.progress.describe()}", markup=False)
        self.console.print("Each run is saved up to its last checkpoint. To resume, run the same command:")
        self.console.print(f"  {resume_command()}", markup=False)
        raise SystemExit(exit_code(number))
