"""Answers on disk, one JSON line for each call. The file is only appended to. A resumed run asks no question twice.

The key of an answer covers everything that the answer depends on: protocol, judge and revision, complete prompt,
decoding, pass and attempt, and the pixels of each picture in order. File names and item ids are not part of the key. So
a picture that is moved keeps its answers, and a picture that is changed loses them.
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


class AnswerCache:
    """The answers in one file, for several threads of one process. Used as a context manager, which locks the file.

    Raises:
        UserError: another process holds the file, or it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._final: dict[str, dict[str, Any]] = {}
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"expected {path} to be free; another evaluation writes it; wait, or use --out") from None
        except UserError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._final)

    def _load(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:  # a kill cut the last line off; this question is asked again
            self._file.truncate(sum(len(line) + 1 for line in lines))
        damaged = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["outcome"] in FINAL_OUTCOMES:
                    self._final[record["key"]] = record
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged.append(number)
        if damaged:
            more = ", ..." if len(damaged) > 5 else ""
            numbers = ", ".join(map(str, damaged[:5]))
            words = "%s: %d damaged lines of %d are skipped (%s%s); these answers are asked for again"
            log.warning(words, self.path, len(damaged), len(lines), numbers, more)

    def total_token_usage(self) -> dict[str, int]:
        """The sum of the servers' token counts over all kept answers."""
        with self._lock:
            return dict(sum((Counter(r.get("usage", {})) for r in self._final.values()), Counter()))

    def count_answers_by_address(self) -> dict[str, int]:
        """Server address -> number of kept answers from there."""
        with self._lock:
            found = Counter(r["address"] for r in self._final.values() if r.get("address"))
        return dict(sorted(found.items()))

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer or refusal with this key. Other outcomes are not returned, so that the question is asked again."""
        with self._lock:
            return self._final.get(key)

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
            if record["outcome"] in FINAL_OUTCOMES:
                self._final[record["key"]] = dict(record)


def answer_cache_key(images: Sequence[Image.Image], **facts: Any) -> str:
    """A hash of the pictures' pixels and sizes, in order, and of `facts`, which are JSON values."""
    digests = [hashlib.sha256(f"{im.mode} {im.size}".encode() + im.tobytes()).hexdigest() for im in images]
    return hash_json({**facts, "images": digests})


def hash_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
