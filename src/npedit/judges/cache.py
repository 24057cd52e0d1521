"""Answers on disk, one JSON line for each call. The file is only appended to. A resumed run asks no question twice.

The key of an answer covers everything that the answer depends on: protocol, judge and revision, complete prompt,
decoding, pass and attempt, and the pixels of each picture in order. File names and item ids are not part of the key. So
a picture that is moved keeps its answers, and a picture that is changed loses them.

Memory holds only where each answer begins in the file: millions of answers fit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image

from npedit.errors import UserError, explain_write_errors
from npedit.judges.base import FINAL_OUTCOMES

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16  # at once; an answer is seldom longer


class AnswerCache:
    """The answers in one file, for several threads of one process. Used as a context manager, which locks the file.

    Raises:
        UserError: another process holds the file, or it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._places: dict[bytes, int] = {}  # hash of the key -> where the record's line begins
        self._usage: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            self._hold()
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _hold(self) -> None:
        """Lock the file. A file system without `flock` locks nothing; the folder is held too (`runs/lock.py`)."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"expected {self.path} to be free; another evaluation writes it; wait, or use --out"
            ) from None
        except OSError:
            log.debug("%s: this file system has no flock", self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def _load(self) -> None:
        damaged, place, number = [], 0, 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):  # a kill cut the last line off; this question is asked again
                    self._file.truncate(place)
                    number -= 1
                    break
                try:
                    self._note(json.loads(line), place)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    damaged.append(number)
                place += len(line)
        if damaged:
            more = ", ..." if len(damaged) > 5 else ""
            numbers = ", ".join(map(str, damaged[:5]))
            words = "%s: %d damaged lines of %d are skipped (%s%s); these answers are asked for again"
            log.warning(words, self.path, len(damaged), number, numbers, more)

    def _note(self, record: Mapping[str, Any], place: int) -> None:
        """Remember where the line of an answer or refusal begins, and count its tokens."""
        if record["outcome"] not in FINAL_OUTCOMES:
            return
        hashed = _short_hash(record["key"])
        self._usage.update(record.get("usage", {}))
        self._addresses.update([record["address"]] if record.get("address") else [])
        self._places[hashed] = place

    def total_token_usage(self) -> dict[str, int]:
        """The sum of the servers' token counts over all kept answers."""
        with self._lock:
            return dict(self._usage)

    def count_answers_by_address(self) -> dict[str, int]:
        """Server address -> number of kept answers from there."""
        with self._lock:
            return dict(sorted(self._addresses.items()))

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer or refusal with this key. Other outcomes are not returned, so that the question is asked again."""
        with self._lock:
            place = self._places.get(_short_hash(key))
        return None if place is None else json.loads(self._read_line(place))

    def _read_line(self, place: int) -> bytes:
        """The line of the file that begins at a place."""
        parts: list[bytes] = []
        while not parts or (b"\n" not in parts[-1] and parts[-1]):
            parts.append(os.pread(self._file.fileno(), READ_BYTES, place))
            place += len(parts[-1])
        return b"".join(parts).partition(b"\n")[0]

    def put(self, record: Mapping[str, Any]) -> None:
        """Append one record, which has at least `key` and `outcome`, and bring it to the disk (fsync)."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock, explain_write_errors(self.path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(before)  # half a line would damage the next one
                raise
            self._note(record, before)


def _short_hash(key: str) -> bytes:
    """16 bytes in place of a key."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def answer_cache_key(images: Sequence[Image.Image], **facts: Any) -> str:
    """A hash of the pictures' pixels and sizes, in order, and of `facts`, which are JSON values."""
    digests = [hashlib.sha256(f"{im.mode} {im.size}".encode() + im.tobytes()).hexdigest() for im in images]
    return hash_json({**facts, "images": digests})


def hash_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
