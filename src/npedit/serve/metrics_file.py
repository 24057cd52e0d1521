"""Reads a metrics.jsonl while a run writes it: each row once, and only what was appended since the last look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from npedit.runs.files import parse_row

MOST_LINE = 2**20  # bytes; a longer line is damaged
TAIL = 64  # bytes before the place that is reached; if they have changed, the file was rewritten

Row = dict[str, Any]


class MetricsFile:
    """The rows of one file, in order.

    Attributes:
        damaged: lines so far that were no rows.
        bytes_read: bytes that all looks have read.
        is_at_end: whether the last look reached the end of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._begin()

    def _begin(self) -> None:
        self._inode, self._offset, self._tail = 0, 0, b""
        self.damaged, self.is_at_end = 0, True

    def read_new(self, most_bytes: int) -> tuple[bool, list[Row]]:
        """Whether the file was rewritten since the last look, as when a run resumes, and the rows that are new. After a
        rewrite they begin with the first row again.

        At most `most_bytes` are read, or `MOST_LINE` if that is more; the next look reads on. A last line without its
        end is still being written, and is read at a later look. A file that is missing or cannot be read has no rows.
        """
        was_begun = self._offset > 0
        rows: list[Row] = []
        try:
            with open(self.path, "rb") as file:
                is_same = was_begun and self._is_same(file)
                if not is_same:
                    self._begin()
                rows = self._read(file, most_bytes)
        except OSError:
            is_same = False
            self._begin()
        return was_begun and not is_same, rows

    def _is_same(self, file: IO[bytes]) -> bool:
        """Whether the file is the one of the last look, perhaps with more lines."""
        file.seek(self._offset - len(self._tail))
        return os.fstat(file.fileno()).st_ino == self._inode and file.read(len(self._tail)) == self._tail

    def _read(self, file: IO[bytes], most_bytes: int) -> list[Row]:
        file.seek(self._offset)
        most_bytes = max(MOST_LINE, most_bytes)
        data = file.read(most_bytes)
        self.bytes_read += len(data)
        self.is_at_end = len(data) < most_bytes
        end = data.rfind(b"\n") + 1
        if not end and not self.is_at_end:  # a line as long as that is no row
            end, self.damaged = len(data), self.damaged + 1
        self._inode = os.fstat(file.fileno()).st_ino
        self._offset, self._tail = self._offset + end, (self._tail + data[:end])[-TAIL:]
        found = [parse_row(line) for line in data[:end].split(b"\n")[:-1]]
        self.damaged += found.count(None)
        return [row for row in found if row is not None]
