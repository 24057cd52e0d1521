"""How the files of a run are written and read, so that a kill or a power cut loses little and a damaged file is named.

A file that is rewritten is written under a temporary name, flushed to disk (fsync) and renamed; then its folder is
flushed. A file of rows (metrics.jsonl, bad_rows.jsonl) is append-only and is flushed at each checkpoint. A damaged line
of such a file is skipped, counted and reported in the log.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from npedit.errors import UserError, explain_write_errors

log = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write a small file completely or not at all.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    aside = path.with_name(path.name + ".tmp")
    with explain_write_errors(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            fsync_file(file)
        os.replace(aside, path)
        fsync_folder(path.parent)


def fsync_file(file: IO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's list of file names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file cannot be read, or holds something else; the message says which.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: expected a JSON object; got {type(found).__name__}")
    return found


# --------------------------------------------------------------------------------------------------------------- rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line. A number that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with explain_write_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of rows; [] if there is no file. A last line that a kill truncated is skipped without a
    message. Damaged lines anywhere else are skipped with a warning that counts them.

    Raises:
        UserError: the file cannot be read at all.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"expected a file of rows in {path}; got: {error}; move it away to go on without") from None
    found = [(number, parse_row(line)) for number, line in enumerate(lines[:-1], 1)]
    damaged = [number for number, row in found if row is None]
    if damaged:
        more = ", ..." if len(damaged) > 5 else ""
        numbers = ", ".join(map(str, damaged[:5]))
        log.warning("%s: %d damaged lines of %d are skipped (%s%s)", path, len(damaged), len(found), numbers, more)
    return [row for _, row in found if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in one line of a file of rows; None for a damaged line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def repair_rows(path: Path) -> list[dict[str, Any]]:
    """Rewrite a file of rows without its damaged lines, so that the next row starts on a new line; returns the rows."""
    rows = read_rows(path)
    if path.exists():
        write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of rows completely or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def fsync_rows(path: Path) -> None:
    """Flush a file of rows to disk, if it exists."""
    if path.is_file():
        with explain_write_errors(path), open(path, "a") as file:
            fsync_file(file)
