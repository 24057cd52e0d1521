"""A Hugging Face imagefolder of photos: images and `metadata.jsonl` with one JSON object per line. No edited images.

    {"file_name": "images/0001.jpg", "instruction": "Remove the white fence", "edit_type": "remove",
     "object": "white fence", "source_caption": "...", "target_caption": "...", "id": "0001"}

Only `file_name` and `instruction` are required. This module opens only the files named in the columns `file_name`,
`reference_file_names` and `mask_file_name`. Columns that hold edited images are named in the log and never opened.

metadata.csv and metadata.parquet are read too, and metadata in sub-folders (`_metadata.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from npedit.data._formats import edited_columns, read_rows
from npedit.data._metadata import FieldName, Row, find_metadata, relative_name
from npedit.data._photos import BadImage
from npedit.data._rows import Cache, Rows, open_rows
from npedit.data._scan import Facts, file_inspector, scan_kept
from npedit.data._settings import PhotoSettings
from npedit.data._source import PhotoSource
from npedit.errors import UserError

log = logging.getLogger(__name__)

CACHED_FROM = 4 << 20  # bytes of metadata; the rows of smaller sets are read again at each start
PROBED = 50  # photos that are looked for before the rows of a large set are read


class Settings(PhotoSettings):
    """The folder of the photos and how they are cropped. `sizes` are (H, W) in pixels; each batch has one size."""


class Source(PhotoSource):
    """The rows of one data folder as batches."""

    def _open_rows(self, path: str, columns: Mapping[FieldName, str]) -> Rows:
        self.folder, self.metadata = find_metadata(path)
        states = [file.stat() for file in self.metadata]
        if sum(state.st_size for state in states) < CACHED_FROM:
            self._report_edited(edited_columns(self.metadata, columns))
            return open_rows(read_rows(self.folder, self.metadata, columns), self.metadata, self.folder)
        name = ["imagefolder", self.folder.resolve(), dict(columns)]
        sizes_and_times = [(state.st_size, state.st_mtime_ns) for state in states]
        self._cache = Cache(name, [list(map(str, self.metadata)), sizes_and_times])
        rows = self._cache.rows(partial(self._parse, columns), self.metadata, self.folder)
        edited = self._cache.load_note("edited.json") or {}
        self._report_edited({Path(file): names for file, names in edited.items()})
        return rows

    def _parse(self, columns: Mapping[FieldName, str]) -> Iterable[Row]:
        """The rows of a large set, after a look for the first photos, so that a wrong folder is said at once."""
        edited = edited_columns(self.metadata, columns)
        first = list(islice(read_rows(self.folder, self.metadata, columns), PROBED))
        if self.settings.max_bad_share < 1 and not any(_is_there(row) for row in first):
            raise UserError(
                f"expected photos in {self.folder}; got none of the first {len(first)} that {self.metadata[0]} names, "
                f"such as {first[0].photo!r}; set data.path to the folder of the photos"
            )
        assert self._cache is not None
        self._cache.save_note("edited.json", {str(file): names for file, names in edited.items()})
        return read_rows(self.folder, self.metadata, columns)

    def _report_edited(self, edited: dict[Path, list[str]]) -> None:
        for file, names in edited.items():
            if names:
                log.warning("%s: ignored, never opened: the edited images in %s", file, ", ".join(names))

    def _scan_photos(self, max_pixels: int) -> Facts:
        folders = [file.parent for file in self.metadata]
        inspect = file_inspector(folders, max_pixels, self._references_of)
        columns = ["file_name", "file", *(["references", "edit_type"] if self._reference_counts().any() else [])]
        return scan_kept(self.rows, columns, inspect, self._cache, self._scan_name(max_pixels), self._stop_early)

    def _find_picture(self, row: Row, name: str) -> Path | bytes:
        return row.metadata.parent / relative_name(name)

    def _hash_rows(self, digest: Any, with_names: bool) -> None:
        for number, file in enumerate(self.metadata):
            if number or with_names:
                digest.update(file.relative_to(self.folder).as_posix().encode())
            with file.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)


def _is_there(row: Row) -> bool:
    try:
        return row.photo_path().is_file()
    except (BadImage, OSError, ValueError):
        return False
