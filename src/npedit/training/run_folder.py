"""What a run that starts or resumes does with its folder: recorded changes, held-out rows, bad rows, shared files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npedit.errors import BadRowsError, UserError
from npedit.nets import distributed
from npedit.runs import checkpoint
from npedit.runs.changes import Change
from npedit.training.progress_display import plain_console


def print_changes(changes: Sequence[Change]) -> None:
    """Print the recorded changes of a resumed run, and how its schedule continues."""
    for change in changes:
        note = f" ({change.note})" if change.note else ""
        words = f"Changed after update {change.update}: {change.setting}: {change.old} -> {change.new}{note}"
        plain_console().print(words)


def restore_held_out_rows(run: Path, data: Any) -> None:
    """Hold out the rows that a resumed run began with: a lost photo must not change which rows are trained on."""
    if getattr(data, "has_drawn_held_out", False):
        numbers = checkpoint.read_held_out(run) if distributed.is_main_process() else None
        if (numbers := distributed.broadcast_object(numbers)) is not None:
            data.hold_out(numbers)


@contextmanager
def list_bad_rows(run: Path) -> Iterator[None]:
    """List all bad rows in the run directory when they are too many to go on."""
    if distributed.is_main_process() and not checkpoint.is_run(run):
        (run / checkpoint.BAD_ROWS).unlink(missing_ok=True)  # from an earlier attempt; the rows may be correct now
    try:
        yield
    except BadRowsError as error:
        if distributed.is_main_process():
            listed = checkpoint.repair_rows(run / checkpoint.BAD_ROWS)
            for row in error.rows:
                if row not in listed:
                    checkpoint.append_row(run / checkpoint.BAD_ROWS, row)
        raise UserError(f"{error}. All of them: {run / checkpoint.BAD_ROWS}") from None


def require_shared_files(run: Path, fingerprint: str) -> None:
    """Refuse a process that cannot see the main process's run folder, or that sees other data."""
    if distributed.broadcast_object(fingerprint) != fingerprint:
        raise UserError(
            f"data: expected the same data for every process; got others in process {distributed.rank()}; "
            "put one copy where all machines see it"
        )
    if not checkpoint.is_run(run):
        raise UserError(
            f"expected {run} on a file system that all machines share; process {distributed.rank()} does not see what "
            "the first has written there; choose another folder"
        )
