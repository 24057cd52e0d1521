"""What the headers of photos tell: each photo's size in pixels and in bytes, kept between starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from npedit.data._metadata import relative_name
from npedit.data._photos import BadImage, read_photo_size
from npedit.data._rows import Cache, Rows

FACTS = np.dtype([("height", "i4"), ("width", "i4"), ("bytes", "i8"), ("time", "i8")])
THREADS = 4
WINDOW = 4096  # rows that one thread looks at before the next ones are given out


@dataclass
class Facts:
    """`values` has one entry of the type `FACTS` for each row; the size of a photo that cannot be used is 0 x 0, and
    `reasons` says why, by row number. `time` is when the file was changed last, in nanoseconds."""

    values: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)


Entry = tuple[int, int, int, int]  # as FACTS
Change = tuple[int, Entry, str]  # (place in the list, what is known now, why the photo cannot be used or "")
# The rows of a list, as values by column, whose photo is not as it was, given what was known of each (None: nothing).
Inspect = Callable[[Sequence[tuple[Any, ...]], Sequence[Entry] | None], list[Change]]
ReferencesOf = Callable[..., Sequence[str]]  # the further references of a row that must be readable


def scan(
    rows: Rows, columns: Sequence[str], inspect: Inspect, old: Facts | None, check: Callable[[int], None]
) -> Facts:
    """The facts of all rows. `inspect` gets the values of `columns`. `check` is called with the number of bad photos so
    far, and may raise."""
    found = Facts(np.zeros(len(rows), FACTS) if old is None else old.values, dict(old.reasons) if old else {})
    is_copy, bad = old is None, 0
    with ThreadPoolExecutor(THREADS, "scan") as pool:
        for first, chunk in _windows(rows, columns):
            known = old.values[first : first + len(chunk)].tolist() if old else None
            parts = [slice(i, i + WINDOW // THREADS) for i in range(0, len(chunk), WINDOW // THREADS)]
            jobs = [pool.submit(inspect, chunk[part], known[part] if known else None) for part in parts]
            for part, job in zip(parts, jobs, strict=True):
                for place, entry, reason in job.result():
                    if not is_copy:
                        found.values, is_copy = found.values.copy(), True
                    number = first + part.start + place
                    found.values[number] = entry
                    found.reasons.pop(number, None)
                    if not entry[0]:
                        found.reasons[number] = reason
            bad += int((found.values["height"][first : first + len(chunk)] == 0).sum())
            check(bad)
    return found


def _windows(rows: Rows, columns: Sequence[str]) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    first = 0
    for chunk in rows.chunks(columns):
        values = list(zip(*chunk, strict=True))
        for start in range(0, len(values), WINDOW):
            yield first, values[start : start + WINDOW]
            first += len(values[start : start + WINDOW])


def scan_kept(
    rows: Rows,
    columns: Sequence[str],
    inspect: Inspect,
    cache: Cache | None,
    name: str,
    check: Callable[[int], None],
    can_change: bool = True,
) -> Facts:
    """`scan`, with the facts of the last start, which `cache` keeps under `name`. They are taken as they are if photos
    cannot change while the cache is valid."""
    if cache is None:
        return scan(rows, columns, inspect, None, check)
    if _load(cache, name, len(rows)) is None:
        with cache.locked():  # one process opens the photos, the others wait for it
            if _load(cache, name, len(rows)) is None:
                _save(cache, name, scan(rows, columns, inspect, None, check))
    old = _load(cache, name, len(rows))
    if old is not None and not can_change:
        return old
    found = scan(rows, columns, inspect, old, check)
    if old is None or found.reasons != old.reasons or found.values is not old.values:
        _save(cache, name, found)
    return found


def _save(cache: Cache, name: str, facts: Facts) -> None:
    cache.save_note(f"{name}.json", list(facts.reasons.items()))
    cache.save_array(f"{name}.npy", facts.values)


def _load(cache: Cache, name: str, count: int) -> Facts | None:
    values, reasons = cache.load_array(f"{name}.npy"), cache.load_note(f"{name}.json")
    if values is None or values.dtype != FACTS or len(values) != count or not isinstance(reasons, list):
        return None
    return Facts(values, {int(number): str(reason) for number, reason in reasons})


def file_inspector(folders: Sequence[Path], max_pixels: int, references_of: ReferencesOf) -> Inspect:
    """An `Inspect` for photos that are files, with the columns file_name, file and those that `references_of` takes. A
    file whose size and time are as before is not opened. `folders` are those of the metadata files."""
    prefixes = [f"{folder}/" for folder in folders]

    def inspect(rows: Sequence[tuple[Any, ...]], known: Sequence[Entry] | None) -> list[Change]:
        found = []
        for place, (name, file, *more) in enumerate(rows):
            bytes_, time, references = -1, 0, references_of(*more)
            try:
                path = prefixes[file] + relative_name(name)
                try:
                    status = os.stat(path)
                    bytes_, time = status.st_size, status.st_mtime_ns
                    if known and known[place][2] == bytes_ and known[place][3] == time and not references:
                        continue
                except (OSError, ValueError):
                    pass  # the next lines say what is wrong
                height, width = read_photo_size(Path(path), max_pixels)
                for reference in references:
                    _check_reference(prefixes[file], reference, max_pixels)
                found.append((place, (height, width, bytes_, time), ""))
            except BadImage as error:
                found.append((place, (0, 0, bytes_, time), str(error)))
        return found

    return inspect


def bytes_inspector(find_all: Callable[[tuple[Any, ...]], Iterable[IO[bytes]]], max_pixels: int) -> Inspect:
    """An `Inspect` for pictures inside other files. `find_all` gives those of a row, its photo first."""

    def inspect(rows: Sequence[tuple[Any, ...]], known: Sequence[Entry] | None) -> list[Change]:
        found = []
        for place, values in enumerate(rows):
            size, photo = -1, (0, 0)
            try:
                for number, file in enumerate(find_all(values)):
                    height_and_width = read_photo_size(file, max_pixels)
                    if number == 0:
                        photo, size = height_and_width, file.seek(0, os.SEEK_END)
                found.append((place, (*photo, size, 0), ""))
            except BadImage as error:
                found.append((place, (0, 0, size, 0), str(error)))
        return found

    return inspect


def _check_reference(folder: str, name: str, max_pixels: int) -> None:
    try:
        read_photo_size(Path(folder, relative_name(name)), max_pixels)
    except BadImage as error:
        raise BadImage(f"reference {name!r}: {error}") from error
