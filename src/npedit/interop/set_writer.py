"""Writing an imported data set as an imagefolder: photos with unchanged bytes, `metadata.jsonl`, a data card.

The set is written beside its final place, as `NAME.importing`, and renamed once it is complete. The photos that a
stopped import has written are not written again.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from npedit.data._photos import BadImage, decoding, open_image
from npedit.errors import UserError, explain_write_errors
from npedit.interop.set_records import PICTURES
from npedit.runs.files import fsync_file, fsync_folder, write_rows, write_text
from npedit.runs.lock import Lock, hold

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif"}
TRIED_SUFFIXES = [f".{word}" for suffix in PICTURES for word in (suffix, suffix.upper())]  # of a photo named without
PHOTOS_IN_FOLDER = 1000


class BadPhoto(Exception):
    """A photo that cannot be taken; the message is the reason."""


@contextmanager
def open_writer(out: Path, roots: Sequence[Path] = ()) -> Iterator[SetWriter]:
    """A writer of the set `out`, for the length of a `with` block in which no other process can write the set.

    Raises:
        UserError: `out` exists and is not empty, or cannot be written, or another process imports into it.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: expected a new or empty folder; got {out}, which is not; choose another")
    with hold(out.with_name(out.name + ".importing"), "import") as lock:
        writer = SetWriter(out, lock, roots)
        try:
            yield writer
        finally:
            writer.close()


class SetWriter:
    """Writes rows and photos to the folder of `lock`, which becomes `out`. `roots` are the folders in which relative
    file names of photos are sought; a photo outside of them is a bad photo.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, out: Path, lock: Lock, roots: Sequence[Path] = ()):
        self.out, self.folder, self.roots, self._lock = out, lock.folder, tuple(roots), lock
        self.bad_photos: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self._saved: dict[str, str] = {}  # hash of the bytes -> file name in the set
        self._hashes: dict[Path, str] = {}  # of the files read so far
        self._ids: set[str] = set()
        self._named: set[str] = set()  # photos that a row names
        with explain_write_errors(out):
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            self._rows: IO[str] = (self.folder / "metadata.jsonl").open("w", encoding="utf-8")

    def close(self) -> None:
        """Close the file of rows, if it is open."""
        self._rows.close()

    # ---- photos

    def save_photo(self, photo: Any, list_folder: Path, folders: Sequence[str]) -> str:
        """The name in the set of a photo: a file name, bytes, or a mapping with `bytes` or `path`. Its header is read,
        and its pixels are not decoded.

        Raises:
            BadPhoto: it is missing, no picture, or outside of the allowed folders.
        """
        content = photo.get("bytes") if isinstance(photo, Mapping) else photo
        if isinstance(content, bytes | bytearray):
            return self._save_bytes(bytes(content))
        name = photo.get("path") if isinstance(photo, Mapping) else photo
        if not isinstance(name, str) or not name.strip():
            raise BadPhoto("no photo")
        return self._save_file(self._find_file(name.strip(), list_folder, folders))

    def _save_bytes(self, content: bytes) -> str:
        key = hashlib.sha256(content).hexdigest()
        if key not in self._saved:
            path = self._new_path(_read_suffix(io.BytesIO(content)))
            with explain_write_errors(path):
                if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
                    path.unlink(missing_ok=True)  # it may be a hard link to somebody's photo
                    path.write_bytes(content)
            self._saved[key] = path.relative_to(self.folder).as_posix()
        return self._saved[key]

    def _save_file(self, source: Path) -> str:
        if source not in self._hashes:
            self._hashes[source] = _hash_file(source)
        key = self._hashes[source]
        if key not in self._saved:
            path = self._new_path(_read_suffix(source))
            with explain_write_errors(path):
                if not (path.is_file() and filecmp.cmp(path, source, shallow=False)):
                    path.unlink(missing_ok=True)
                    _link_or_copy(source, path)
            self._saved[key] = path.relative_to(self.folder).as_posix()
        return self._saved[key]

    def _new_path(self, suffix: str) -> Path:
        number = len(self._saved)
        folder = self.folder / "images" / f"{number // PHOTOS_IN_FOLDER:04d}"
        path = folder / f"{number % PHOTOS_IN_FOLDER:03d}.{suffix}"
        with explain_write_errors(path):
            path.parent.mkdir(exist_ok=True)
        return path

    def _find_file(self, name: str, list_folder: Path, folders: Sequence[str]) -> Path:
        """The file that a list's file name means. It is sought in the roots, or beside the list."""
        written = PurePosixPath(name.replace("\\", "/"))
        if ".." in written.parts:
            raise BadPhoto(f"the name {name!r} leads out of the folder of photos")
        roots = self.roots or tuple(list_folder / folder for folder in folders)
        places = [Path(name)] if written.is_absolute() else [root / written for root in roots]
        places += [place.with_name(place.name + suffix) for place in places for suffix in TRIED_SUFFIXES]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise BadPhoto(f"there is no file {name!r} in {', '.join(map(str, roots))}")
        resolved = found.resolve()
        if not any(resolved.is_relative_to(root.resolve()) for root in roots):
            raise BadPhoto(f"the file {name!r} is not in {', '.join(map(str, roots))}")
        return resolved

    # ---- rows

    def add_row(self, row: Mapping[str, Any]) -> str:
        """Append a row; returns its id, to which a number is added if another row has the same."""
        wanted = str(row["id"])
        unique, number = wanted, 1
        while unique in self._ids:
            number += 1
            unique = f"{wanted}-{number}"
        self._ids.add(unique)
        self._named.update((row["file_name"], *row.get("reference_file_names", ())))
        with explain_write_errors(self.folder):
            self._rows.write(json.dumps({**row, "id": unique}, ensure_ascii=False) + "\n")
        return unique

    def finish(self, facts: Mapping[str, Any], card: str, held_out: Sequence[str] = ()) -> None:
        """Write the other files of the set and give it its name.

        Raises:
            UserError: a file cannot be written, or another process has taken the folder over.
        """
        self._lock.check()
        with explain_write_errors(self.folder):
            fsync_file(self._rows)
            self.close()
            self._delete_other_photos()
            write_rows(self.folder / "bad_photos.jsonl", self.bad_photos)
            write_rows(self.folder / "rejected.jsonl", self.rejected)
            write_text(self.folder / "prepare.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            write_text(self.folder / "README.md", card)
            if held_out:
                write_text(self.folder / "held_out.txt", "".join(f"{i}\n" for i in held_out))
            if self.out.exists():
                self.out.rmdir()
            os.replace(self.folder, self.out)
            self._lock.folder = self.out
            fsync_folder(self.out.parent)

    def _delete_other_photos(self) -> None:
        """Delete the photos that no row names: of an earlier import, or of an edit that was left out."""
        for path in (self.folder / "images").rglob("*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in self._named:
                path.unlink()


def _read_suffix(source: Path | io.BytesIO) -> str:
    """The usual suffix of a picture's format, by its header."""
    try:
        with decoding(), open_image(source) as picture:
            kind = picture.format or ""
    except BadImage as error:
        raise BadPhoto(f"no picture that can be opened: {' '.join(str(error).split())[:200]}") from None
    if kind not in SUFFIXES:
        raise BadPhoto(f"a picture of the format {kind}")
    return SUFFIXES[kind]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadPhoto(f"a file that cannot be read: {error.strerror}") from None


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
