"""`npedit train`: one process per visible GPU, or this process as one of those that torchrun started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from npedit.cli.console import out
from npedit.errors import npedit_command


def run_train(name: str, overrides: Sequence[str], folder: Path | None, fresh: bool, processes: int) -> int:
    """Train a recipe in `processes` processes on this machine (0: one per visible GPU); returns the exit code.

    Raises:
        UserError: whatever the user can put right.
    """
    from npedit.nets import distributed
    from npedit.recipe import config
    from npedit.training import launch, parts, trainer

    with distributed.process_group():
        loaded = config.load_recipe(name, overrides)
        run = folder or Path("runs") / loaded.name
        count = 1 if distributed.is_multi_process() else processes or launch.default_process_count()
        parts.check_processes(loaded, count)
        if fresh and distributed.is_main_process():
            move_aside(run)
        if count > 1:
            return launch.start_processes(count, ["train", name, *overrides, "--out", str(run)])
        trainer.train(loaded, run)
        if distributed.is_main_process():
            out.print(escape(f"\nNext:\n  {npedit_command()} edit PICTURE INSTRUCTION --model {shlex.quote(str(run))}"))
        return 0


def move_aside(folder: Path) -> None:
    """Rename a folder out of the way, if it is there.

    Raises:
        UserError: another process holds the folder, or the folder cannot be moved.
    """
    from npedit.runs import lock

    if aside := lock.move_aside(folder):
        out.print(f"Moved the earlier {escape(str(folder))} to {escape(str(aside))}.")
