"""Only one process at a time may write, move or delete a folder. `hold` locks a folder; `move_aside` renames a free
one.

A held folder has two files:

    .lock         locked with `flock` by the process that holds the folder; the file stays when the lock is released
    .holder.json  {"host", "boot", "pid", "work", "since", "token"}; its modification time is renewed every ten seconds

On a local file system, and on NFS and Lustre where `flock` is shared between machines, `.lock` alone decides. Where
`flock` holds on one machine only (Lustre with `localflock`, NFS with `local_lock`) or is missing, `.holder.json`
decides between machines: a second process watches the file, refuses if the file is renewed, and takes the folder over
if nothing happens for `WATCH_SECONDS`. Two limits there: a process that was suspended for longer than that can lose its
folder (`Lock.check` finds out before the next checkpoint is written), and the second start may have to wait for that
time after a machine died.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from npedit.errors import UserError, explain_write_errors

LOCK, HOLDER = ".lock", ".holder.json"
LOCK_FILES = frozenset({LOCK, HOLDER})  # what `hold` leaves or may leave in a folder
BEAT_SECONDS = 10.0  # time between two renewals of .holder.json
WATCH_SECONDS = 45.0  # a process that does not renew the file for so long has ended
STALE_SECONDS = 3600.0  # an older .holder.json is ignored without watching; clocks differ by less
log = logging.getLogger(__name__)


class FolderHeldError(UserError):
    """Another process holds the folder. The message names the process."""


@dataclass
class Lock:
    """A folder that this process holds."""

    folder: Path
    token: str
    lost: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Make sure that the folder is still held.

        Raises:
            UserError: this process was suspended for long, and another one has taken the folder over.
        """
        if self.lost.is_set() or _read_holder(self.folder).get("token", self.token) != self.token:
            raise UserError(
                f"expected to hold {self.folder} still; got {_describe(_read_holder(self.folder))} there, which took "
                "the folder over while this process was suspended; nothing more is written here"
            )


@contextmanager
def hold(folder: Path, work: str) -> Iterator[Lock]:
    """The lock of a folder, held inside a `with` block. A missing folder is created. `work` is a word for the task in
    messages, such as "train".

    Raises:
        UserError: another process holds the folder (the message names host, process and since when), or the folder
            cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115
    with file:
        shared = _lock_file(file, folder)
        _require_no_holder(folder, shared)
        lock = Lock(folder, secrets.token_hex(8))
        _write_holder(lock, work)
        ended = threading.Event()
        renewal = threading.Thread(target=_renew_holder, args=(lock, ended), daemon=True)
        renewal.start()
        try:
            yield lock
        finally:
            ended.set()
            renewal.join()
            if _read_holder(lock.folder).get("token") == lock.token:
                (lock.folder / HOLDER).unlink(missing_ok=True)


def require_free(folder: Path) -> None:
    """Refuse a folder that another process holds, or that has such a folder anywhere inside.

    Raises:
        UserError: names the holder.
    """
    for found in sorted(folder.rglob(LOCK)):
        try:
            file = open(found, "a")  # noqa: SIM115
        except OSError:
            continue
        with file:
            _require_no_holder(found.parent, _lock_file(file, found.parent))


def move_aside(folder: Path) -> Path | None:
    """Rename a folder to FOLDER.old-TIME if it is there; returns the new path.

    Raises:
        UserError: another process holds the folder or one inside, this process is in it, or it cannot be moved.
    """
    if not folder.exists():
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"expected to move {folder} aside; got the working folder, or one that it is in, which must stay in its "
            "place; change to a folder outside it (cd), or name another folder"
        )
    require_free(folder)
    with hold(folder, "move aside") as lock:
        aside = _unused_name(folder)
        try:
            os.rename(folder, aside)
        except OSError as error:
            raise UserError(f"expected to move {folder} aside; got: {error}; use another folder") from None
        lock.folder = aside
    return aside


def _unused_name(folder: Path) -> Path:
    wanted = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    names = (wanted.with_name(f"{wanted.name}-{i}") if i > 1 else wanted for i in range(1, 1000))
    return next(name for name in names if not name.exists())


def _lock_file(file: IO, folder: Path) -> bool:
    """Lock an open `.lock`. False where the file system has no `flock`.

    Raises:
        UserError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held_error(folder) from None
    except OSError:
        return False
    try:
        moved = not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        moved = True
    if moved:  # between the opening and the locking
        raise UserError(f"expected {folder} to stay in its place; another process has just moved it; run this again")
    return True


def _require_no_holder(folder: Path, locked: bool) -> None:
    """Refuse a folder whose `.holder.json` is being renewed by a process that `flock` may not know of."""
    path = folder / HOLDER
    before = _modified_at(path)
    if before is None or (locked and _read_holder(folder).get("boot") == _boot_id() != ""):
        path.unlink(missing_ok=True)
        return
    age = (_modified_at(folder / LOCK, touch=True) or before) - before
    if age < STALE_SECONDS * 1e9:
        words = "%s: %s was here; waiting %.0f s to see whether it is still running"
        log.warning(words, folder, _describe(_read_holder(folder)), WATCH_SECONDS)
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            now = _modified_at(path)
            if now is None:
                return
            if now != before:
                raise _held_error(folder)
    path.unlink(missing_ok=True)


def _modified_at(path: Path, touch: bool = False) -> int | None:
    """The time of a file's last change in ns, by the file system's clock; None if there is no file."""
    try:
        if touch:
            os.utime(path)
        with open(path, "rb") as file:  # on NFS only an opened file has fresh times
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _write_holder(lock: Lock, work: str) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    facts = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "work": work, "since": since}
    with explain_write_errors(lock.folder):
        try:
            file = open(lock.folder / HOLDER, "x", encoding="utf-8")  # noqa: SIM115 - "x" is atomic on NFS too
        except FileExistsError:
            raise _held_error(lock.folder) from None
        try:
            with file:
                file.write(json.dumps(facts | {"token": lock.token}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # a full disk: half a file would make the next process watch it
            (lock.folder / HOLDER).unlink(missing_ok=True)
            raise


def _renew_holder(lock: Lock, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        if _read_holder(lock.folder).get("token", lock.token) != lock.token:
            lock.lost.set()
            return
        try:
            os.utime(lock.folder / HOLDER)
        except OSError:
            log.debug("%s: the holder's file could not be renewed", lock.folder)


def _read_holder(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return (
        f"process {holder.get('pid')} on host {holder.get('host')} ({holder.get('work')}, since {holder.get('since')})"
    )


def _held_error(folder: Path) -> FolderHeldError:
    return FolderHeldError(
        f"expected {folder} to be free; got a folder that is held by {_describe(_read_holder(folder))}; "
        "wait for that process, stop it, or choose another folder"
    )


def _boot_id() -> str:
    """Which running kernel this is; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
