"""The rows of a data set in an Arrow table that is memory-mapped: a process holds none of them in its own memory.

A large set is parsed once. Its table is kept in a cache folder (`NPEDIT_CACHE`, by default `npedit` in the cache folder
of Hugging Face `datasets`) and is used as long as the metadata files keep their sizes and times. A small set is parsed
at each start, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npedit.data._metadata import FIELDS, Row
from npedit.errors import UserError
from npedit.questions import SCENE

log = logging.getLogger(__name__)

FORMAT = 2  # of the files in the cache
CHUNK = 16384  # rows that are parsed or scanned at once
TEXTS = pa.string()
SCHEMA = pa.schema(
    [(field, TEXTS) for field in FIELDS]
    + [("references", pa.list_(TEXTS)), ("questions", TEXTS)]
    + [("line", pa.int32()), ("file", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())]
    + [("group", TEXTS), ("mask", TEXTS)]
)


class Rows(Sequence[Row]):
    """Rows in an Arrow table with the columns `SCHEMA`. `files` are the files that the column `file` numbers; `numbers`
    selects rows of the table, None: all."""

    def __init__(self, table: pa.Table, files: Sequence[Path], folder: Path, numbers: np.ndarray | None = None):
        self._table, self._files, self._folder, self._numbers = table, list(files), folder, numbers
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        self._subfolders = [_subfolder(file, folder) for file in files]

    def __len__(self) -> int:
        return len(self._table) if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        place = index if self._numbers is None else int(self._numbers[index])
        chunk = int(np.searchsorted(self._starts, place, "right")) - 1
        batch, inside = self._batches[chunk], place - int(self._starts[chunk])
        return self._as_row({name: batch.column(i)[inside].as_py() for i, name in enumerate(SCHEMA.names)})

    def __iter__(self) -> Iterator[Row]:
        for values in self.values(*SCHEMA.names):
            yield self._as_row(dict(zip(SCHEMA.names, values, strict=True)))

    def values(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """The values of these columns, row by row."""
        for chunk in self.chunks(names):
            yield from zip(*chunk, strict=True)

    def chunks(self, names: Sequence[str]) -> Iterator[list[list[Any]]]:
        """The values of these columns, some thousand rows at a time."""
        for start, batch in zip(self._starts, self._batches):
            if self._numbers is not None:
                first, last = np.searchsorted(self._numbers, (start, start + len(batch)))
                batch = batch.select(list(names)).take(pa.array(self._numbers[first:last] - start))
            yield [batch.column(name).to_pylist() for name in names]

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, of the selected rows."""
        column = self._table.column(name)
        return column if self._numbers is None else column.take(pa.array(self._numbers))

    @property
    def has_scenes(self) -> bool:
        """Whether a row has the edit type "scene"."""
        return bool(pc.any(pc.equal(self.column("edit_type"), SCENE)).as_py())

    @property
    def has_masks(self) -> bool:
        """Whether a row names a mask."""
        return bool(pc.any(pc.not_equal(self.column("mask"), "")).as_py())

    def numbers_without(self, field: str) -> np.ndarray:
        """The numbers of the rows where a text is empty."""
        return np.flatnonzero(pc.equal(self.column(field), "").to_numpy())

    def select(self, numbers: np.ndarray) -> Rows:
        """The rows with these numbers, which are in increasing order."""
        if self._numbers is not None:
            numbers = self._numbers[numbers]
        return Rows(self._table, self._files, self._folder, numbers)

    def location(self, line: int, file: int) -> str:
        """The file and line of a row, for messages, from its values of these columns."""
        return f"{self._files[file]}:{line}"

    def photo_name(self, file_name: str, file: int) -> str:
        """`Row.photo` from a row's values of these columns."""
        return file_name if self._subfolders[file] == "." else f"{self._subfolders[file]}/{file_name}"

    def digest(self) -> str:
        """A hash of all values that training depends on, whatever the files are called and wherever they lie."""
        digest = hashlib.sha256()
        unused = set(() if self.has_scenes else ("group",)) | set(() if self.has_masks else ("mask",))
        for chunk in self.chunks([name for name in SCHEMA.names if name not in unused]):
            digest.update(json.dumps(chunk, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _as_row(self, values: dict[str, Any]) -> Row:
        file = values.pop("file")
        values["references"] = tuple(values["references"] or ())
        return Row(**values, metadata=self._files[file], subfolder=self._subfolders[file])


def _subfolder(file: Path, folder: Path) -> str:
    return file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else "."


# ----------------------------------------------------------------------------------------------------------- writing


def _write_table(rows: Iterable[Row], files: Sequence[Path], sink: Any) -> int:
    """Write rows as an Arrow file; returns their number."""
    number_of, count, rows = {file: i for i, file in enumerate(files)}, 0, iter(rows)
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        while chunk := list(islice(rows, CHUNK)):
            columns = {name: [getattr(row, name) for row in chunk] for name in SCHEMA.names if name != "file"}
            columns["file"] = [number_of[row.metadata] for row in chunk]
            arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            count += len(chunk)
    return count


def open_rows(rows: Iterable[Row], files: Sequence[Path], folder: Path) -> Rows:
    """Rows in a table in memory, for a small set."""
    sink = pa.BufferOutputStream()
    _write_table(rows, files, sink)
    return Rows(pa.ipc.open_file(sink.getvalue()).read_all(), files, folder)


# ------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """The folder where tables are kept between starts."""
    if folder := os.environ.get("NPEDIT_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets"), "npedit").expanduser()


class Cache:
    """What is known of one data set: a folder with the table of its rows, and arrays and notes beside it.

    `name` identifies the set (its path and the settings that change its rows), and `state` what must be unchanged for
    the files to be used: sizes and times of the metadata. One process at a time writes; the others wait for it.
    """

    def __init__(self, name: Any, state: Any):
        words = json.dumps([FORMAT, name], sort_keys=True, default=str)
        self.folder = cache_folder() / hashlib.sha256(words.encode()).hexdigest()[:24]
        self._state = json.loads(json.dumps([FORMAT, name, state], default=str))
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def rows(self, parse: Callable[[], Iterable[Row]], files: Sequence[Path], folder: Path) -> Rows:
        """The rows of the set; `parse` is called if the cache does not have them. Errors as in `parse`.

        Raises:
            UserError: the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s cannot be written (%s): the data are read again at each start", self.folder, error)
            self._temporary = tempfile.TemporaryDirectory(prefix="npedit-rows-")
            self.folder = Path(self._temporary.name)
        with _locked(self.folder / "lock"):
            if self._is_current():
                return self._map(files, folder)
            log.info("%s: the rows are read for the first time, which takes some time", folder)
            for old in self.folder.glob("[!l]*"):
                old.unlink(missing_ok=True)
            _write_file(self.folder / "rows.arrow", lambda file: _write_table(parse(), files, file))
            self.save_note("state.json", self._state)
            return self._map(files, folder)

    def _is_current(self) -> bool:
        return self.load_note("state.json") == self._state and (self.folder / "rows.arrow").is_file()

    def _map(self, files: Sequence[Path], folder: Path) -> Rows:
        return Rows(pa.ipc.open_file(pa.memory_map(str(self.folder / "rows.arrow"))).read_all(), files, folder)

    def load_note(self, name: str) -> Any:
        """A JSON value that was saved under this name; None if there is none."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_note(self, name: str, value: Any) -> None:
        """Keep a JSON value with the table. Errors as in `rows`."""
        _write_file(self.folder / name, lambda file: file.write(json.dumps(value).encode()))

    def load_array(self, name: str) -> np.ndarray | None:
        """An array that was saved under this name, memory-mapped; None if there is none."""
        try:
            return np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError):
            return None

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Keep an array with the table. Errors as in `rows`."""
        _write_file(self.folder / name, lambda file: np.save(file, array))

    def locked(self) -> AbstractContextManager[None]:
        """A context manager: one process at a time is inside."""
        return _locked(self.folder / "lock")


def _write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file at once or not at all."""
    made = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with made.open("wb") as file:
            write(file)
        made.replace(path)
    except OSError as error:
        raise UserError(
            f"expected space for the table of the data in {path.parent}; got {error}; free some, or set "
            "NPEDIT_CACHE to another folder"
        ) from error
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file during the block, where the file system has locks. Without them two processes may both write;
    each file is replaced at once, by the same content."""
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            log.debug("%s: no locks here", path)
        yield
