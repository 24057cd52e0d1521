"""One process of `npedit study --workers N`: does one job of a study and ends.

`workers.py` starts it as `python -m npedit.study.worker` and sends the task as JSON on standard input. What the
training prints goes into the job's log. Exit codes are those of a training (`training/signals.py`); 2 is a user error,
whose message is the end of the log.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from npedit.errors import UserError
from npedit.recipe.packaged import recipe_path
from npedit.study.file import Study
from npedit.study.jobs import StudyWork
from npedit.training.signals import exit_code

ERROR = "error: "  # begins the line with the message of a user error
USER_ERROR = 2  # exit code


@dataclass(frozen=True)
class Task:
    """What a worker does: the job of this name, in this study. `command` is the command line of the study."""

    study: dict
    folder: str
    quick: bool
    job: str
    command: list[str]

    def to_json(self) -> str:
        """The task as it is sent to the worker."""
        return json.dumps(asdict(self))


def run_task(task: Task) -> None:
    """Do a task. A job that is done already is skipped.

    Raises:
        UserError: as `StudyWork.execute`.
    """
    work = StudyWork(Study.model_validate(task.study), Path(task.folder), recipe_path, task.quick)
    for job in work.missing_jobs():
        if job.name == task.job:
            work.execute(job)


def main() -> int:
    """Read a task from standard input and do it; returns the exit code."""
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    task = Task(**json.loads(sys.stdin.read()))
    sys.argv[:] = task.command  # for manifests, and for the command that resumes
    try:
        run_task(task)
    except UserError as error:
        sys.stderr.write(f"{ERROR}{error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        return exit_code(signal.SIGINT)
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
