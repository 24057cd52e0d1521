"""The errors meant for users, and what its messages are made of: hints, full disks, commands to type."""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message says what was expected, what came, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


class BadRowsError(UserError):
    """More rows of a data set are unusable than is allowed. `rows` are those met: {"id", "file", "line", "reason"}."""

    def __init__(self, message: str, rows: list[dict]):
        super().__init__(message)
        self.rows = rows


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option most like `name`, or "" if none is like it."""
    found = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a place that cannot be written into a `UserError`; other errors pass."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have classes of their own for a full disk
        number, full = getattr(error, "errno", None), (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if number in full or any(f"(os error {n})" in str(error) for n in full):
            raise UserError(
                f"expected room on the disk for {path}; got a full one; free some space and run the same command "
                "again: everything that was complete is kept, and the work resumes from there"
            ) from error
        if (
            isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError))
            or number == errno.EROFS
        ):
            raise UserError(f"expected a place that can be written; got {path} ({error}); choose another") from error
        raise


def npedit_command() -> str:
    """How to call npedit from this shell and folder: its name if that is found, else its path, quoted."""
    started = sys.argv[0]
    module = Path(started).name == "__main__.py"
    script = Path(started) if Path(started).name == "npedit" else Path(sys.executable).with_name("npedit")
    found = shutil.which("npedit")
    if started == "npedit" or (not module and found and _is_same_file(Path(found), script)):
        return "npedit"
    if not module and script.exists():
        return shlex.quote(_shorten_path(script))
    return f"{python_command()} -m npedit"


def train_command(folder: Path) -> str:
    """The command that trains on a set, without its held-out rows."""
    held_out, path = folder / "held_out.txt", shlex.quote(str(folder))
    held = f" data.held_out={shlex.quote(str(held_out))}" if held_out.is_file() and held_out.stat().st_size else ""
    return f"{npedit_command()} train RECIPE data.path={path}{held}"


def python_command() -> str:
    """How to call this Python from this shell and folder, quoted."""
    found = shutil.which("python")
    here = Path(sys.executable)
    return "python" if found and _is_same_file(Path(found).parent, here.parent) else shlex.quote(_shorten_path(here))


def resume_command() -> str:
    """The command line that goes on with what this process does, as one would type it."""
    words = shlex.join(a for a in sys.argv[1:] if a != "--fresh")
    script, start = Path(sys.argv[0]), npedit_command()
    if script.name == "__main__.py":
        start = f"{python_command()} -m {script.parent.name}"
    elif script.suffix == ".py":  # of the user's own, which calls npedit
        start = f"{python_command()} {shlex.quote(str(script))}"
    return f"{start} {words}".rstrip()


def _is_same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _shorten_path(path: Path) -> str:
    """From the working folder, if it lies in there."""
    full = os.path.abspath(path)
    inside = os.path.relpath(full)
    return full if inside.startswith(os.pardir) else os.path.join(".", inside) if os.sep not in inside else inside
