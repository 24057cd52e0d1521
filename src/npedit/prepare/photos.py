"""Finding and reading the photos of a folder: bad ones are listed, each good one gets an id, a perceptual hash, and its
licence and source.

What was read is kept in a file of rows, so that a second run reads only photos that have changed.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npedit.data._photos import BadImage, decoding, open_image, read_photo
from npedit.errors import UserError
from npedit.prepare.duplicates import similarity_facts
from npedit.runs.files import append_row, repair_rows, write_rows

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")  # of cameras
NOT_READ = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".psd", *RAW)
MAX_SIDE_RATIO = 64  # of a photo; a longer one shows nothing when it is scaled down
COPYRIGHT = 0x8298  # EXIF 2.3
TEXT_KEYS = {"copyright": "licence", "license": "licence", "licence": "licence", "source": "source"}  # PNG texts
XMP_LICENCE = re.compile(rb"cc:license[^>]*rdf:resource=[\"']([^\"']+)|xmpRights:WebStatement[>=\"']+([^<\"']+)")
XMP_SOURCE = re.compile(rb"(?:dc|photoshop):[sS]ource[>=\"']+([^<\"']+)")

Photo = dict[str, Any]
ScanJob = tuple[Path, str, Photo | None, int, int]  # the arguments of `scan_photo`
ReportProgress = Callable[[int, int], None]


def find_photos(folder: Path) -> list[str]:
    """The names of all photos in a folder and its sub-folders, relative to it, sorted, with those in formats that are
    not read. Hidden files and folders are left out. A folder that is reached twice through symbolic links is read once.

    Raises:
        UserError: there is no such folder, or no photo in it.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing there"
        raise UserError(f"expected a folder of photos; got {str(folder)!r}: {what}; correct the path")
    names, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES + NOT_READ) and not name.startswith("."):
                names.append(Path(place, name).relative_to(folder).as_posix())
    if not names:
        raise UserError(f"expected photos ({', '.join(SUFFIXES)}) in {folder}; found none; correct the path")
    return sorted(names)


def choose_shard(names: list[str], shard: tuple[int, int]) -> list[str]:
    """The names that shard (i, n) works on, i from 0. A function of each name alone."""
    number, count = shard
    return [n for n in names if int(hashlib.sha256(n.encode(errors="replace")).hexdigest(), 16) % count == number]


def scan_photos(
    folder: Path,
    names: list[str],
    known: Path,
    max_pixels: int,
    min_side: int,
    scan: Callable[[Sequence[ScanJob]], Iterable[Photo]],
    report_progress: ReportProgress = lambda done, total: None,
) -> tuple[list[Photo], list[dict[str, str]]]:
    """(photos, bad photos) in the order of `names`. `known` is the file of rows that keeps what was read. `scan`
    returns `scan_photo` of each job, in any order.

    Files with the same bytes are one photo: the further ones are bad photos.
    """
    kept = {row["name"]: row for row in repair_rows(known) if isinstance(row.get("name"), str)}
    jobs = [(folder, name, kept.get(name), max_pixels, min_side) for name in names]
    found: dict[str, Photo] = {}
    for done, row in enumerate(scan(jobs), 1):
        found[row["name"]] = row
        if row != kept.get(row["name"]):
            append_row(known, row)
        report_progress(done, len(jobs))
    rows = [found[name] for name in names]
    if found != kept:
        write_rows(known, rows)  # without files that have changed or are gone
    return _part_usable(folder, rows, min_side)


def _part_usable(folder: Path, rows: Sequence[Photo], min_side: int) -> tuple[list[Photo], list[dict[str, str]]]:
    """(photos, bad photos) of rows that `scan_photo` returned."""
    photos: list[Photo] = []
    bad: list[dict[str, str]] = []
    first: dict[str, str] = {}
    for row in rows:
        reason = row.get("reason") or _size_fault(row, min_side)
        if not reason and row["id"] in first:
            reason = f"the same file as {first[row['id']]}"
        if reason:
            bad.append({"file": str(row.get("file") or row["name"]), "reason": reason})
        else:
            first[row["id"]] = row["name"]
            photos.append({**row, "path": str(folder / row["name"])})
    return photos, bad


def _size_fault(row: Mapping[str, Any], min_side: int) -> str:
    short, long = sorted((row["width"], row["height"]))
    size = f"{row['width']} x {row['height']} pixels"
    if short < min_side:
        return f"{size}: the shorter side is below {min_side}"
    return f"{size}: the sides are not within 1:{MAX_SIDE_RATIO}; crop it" if long > MAX_SIDE_RATIO * short else ""


def scan_photo(folder: Path, name: str, kept: Photo | None, max_pixels: int, min_side: int) -> Photo:
    """Facts about one photo: name, id, size, hashes, licence and source; or the reason why it is bad. `kept` is
    returned if the file has not changed."""
    path = folder / name
    if not _is_unicode(name):
        shown = os.fsencode(name).decode("ascii", "backslashreplace")
        return {"name": name, "file": shown, "reason": "the file name is not UTF-8; rename the file"}
    if name.lower().endswith(NOT_READ):
        return {"name": name, "reason": f"{path.suffix.lower()} files are not read; convert it to JPEG or PNG"}
    try:
        facts = path.stat()
        stamp = {"bytes": facts.st_size, "modified": facts.st_mtime_ns, "max_pixels": max_pixels}
        if kept is not None and all(kept.get(key) == value for key, value in stamp.items()):
            return kept
        data = path.read_bytes()
    except OSError as error:
        return {"name": name, "reason": f"{type(error).__name__}: {error.strerror}"}
    try:
        if not data:
            raise BadImage("an empty file")
        image = read_photo(data, max_pixels)
    except BadImage as error:
        return {"name": name, **stamp, "reason": str(error)}
    return {
        "name": name,
        **stamp,
        "id": hashlib.sha256(data).hexdigest()[:16],
        "width": image.width,
        "height": image.height,
        **similarity_facts(image),
        **read_rights(data),
    }


def _is_unicode(name: str) -> bool:
    """Whether a name can be encoded: Python hands on bytes that are no UTF-8 as lone surrogates."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ licence and source


def read_rights(data: bytes) -> dict[str, str]:
    """{"licence", "source"} from a photo's metadata (EXIF copyright, XMP, PNG texts); "" where it says nothing."""
    found = {"licence": "", "source": ""}
    try:
        with decoding():
            with open_image(data) as image:
                for key, value in image.info.items():
                    if isinstance(key, str) and isinstance(value, str) and key.lower() in TEXT_KEYS:
                        found[TEXT_KEYS[key.lower()]] = _clean(value)
                xmp = image.info.get("xmp") or b""
                xmp = xmp.encode() if isinstance(xmp, str) else xmp
                copyright_notice = image.getexif().get(COPYRIGHT)
    except BadImage:
        return found
    for name, pattern in (("licence", XMP_LICENCE), ("source", XMP_SOURCE)):
        match = pattern.search(xmp)
        if match:
            found[name] = _clean(next(filter(None, match.groups())).decode(errors="replace"))
    if isinstance(copyright_notice, str) and not found["licence"]:
        found["licence"] = _clean(copyright_notice)
    return found


def _clean(text: str) -> str:
    return " ".join(text.replace("\x00", " ").split())[:300]


def read_rights_table(path: Path) -> dict[str, dict[str, str]]:
    """{file name: {"licence", "source"}} from a csv file with the columns file_name, licence (or license), source.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames = [c.strip() for c in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--licences: expected a csv file in UTF-8; got {path} ({error}); correct it") from None
    if "file_name" not in columns or not {"licence", "license", "source"} & set(columns):
        raise UserError(
            f"--licences: expected the columns file_name, licence and source in {path}; got {', '.join(columns)}; "
            "add them to its first line"
        )
    return {(row["file_name"] or "").strip().removeprefix("./"): dict(_table_row(row)) for row in rows}


def _table_row(row: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    for column, name in (("licence", "licence"), ("license", "licence"), ("source", "source")):
        value = row.get(column)
        if value and value.strip():
            yield name, _clean(value)
