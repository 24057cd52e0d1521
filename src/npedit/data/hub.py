"""A data set of the Hugging Face Hub, or parquet files on this machine, with the pictures inside. No edited images.

    data: {name: hub, path: USER/SET, split: train}
    data: {name: hub, path: folder/with/parquet}

The columns are those of an imagefolder (`imagefolder.py`) after `push_to_hub`: `image` is the photo, `reference` a list
of further references, and `mask` the mask. `data.columns` gives other names: {file_name: source_image}. Of the pictures
only these columns are read; columns that hold edited images are named in the log and never decoded.

`datasets` downloads the set and keeps it as Arrow files, which are memory-mapped.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from pydantic import Field

from npedit.data._metadata import FieldName, Row, check_columns, parse_row, source_columns
from npedit.data._photos import BadImage
from npedit.data._rows import Cache, Rows, open_rows
from npedit.data._scan import Facts, bytes_inspector, scan_kept
from npedit.data._settings import PhotoSettings
from npedit.data._source import PhotoSource
from npedit.data._stream import Sample, StreamSource
from npedit.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

CACHED_FROM = 10_000  # rows; smaller sets are looked through at each start
PHOTO, REFERENCES, MASK = "image", "reference", "mask"  # columns after `push_to_hub` of an imagefolder


class PictureColumns(NamedTuple):
    """The names of the columns of photos, of further references and of masks; "" where there is none."""

    photo: str
    references: str
    mask: str


class Settings(PhotoSettings):
    """Which data set, and how its photos are cropped. `path` is a Hub id, or a folder or file of parquet."""

    split: str = "train"
    subset: str = Field("", description="the configuration of the data set; '': its default one")
    revision: str = Field("", description="branch, tag or commit on the Hub; '': the main branch")
    streaming: bool = Field(False, description="read the set while it is downloaded, and keep nothing on the disk")
    shuffle_buffer: int = Field(256, ge=1, description="samples that a stream holds to mix them")


def Source(settings: Settings, seed: int) -> IndexedSource | StreamSource:
    """The source of this data set: one that reads any row, or a stream."""
    if not settings.streaming:
        return IndexedSource(settings, seed)
    chosen = settings.path, settings.split, settings.subset, settings.revision
    found = load_split(*chosen, streaming=True)
    name = Path(settings.path, settings.split)
    schema = (found.features or datasets.Features()).arrow_schema
    if not schema.names:
        raise UserError(f"{name}: expected a data set whose columns are known; got none; set data.streaming to false")
    pictures = choose_columns(schema, settings.columns, name)
    texts = [field.name for field in schema if not _has_bytes(field.type)]
    found = found.select_columns([*filter(None, pictures), *texts]).decode(False)
    samples = partial(stream_samples, found, pictures, settings.columns, name, seed)
    return StreamSource(settings, seed, samples, settings.shuffle_buffer)


def stream_samples(
    found: Any, pictures: PictureColumns, columns: Mapping[FieldName, str], name: Path, seed: int, epoch: int
) -> Iterator[Sample]:
    """The samples of a streamed data set, in a random order of its files.

    Raises:
        UserError: it cannot be read, or an error of `parse_row`.
    """
    ours, number, draw = _text_columns(columns), 0, random.Random(f"{seed}/files/{epoch}").randrange(2**31)
    try:
        for values in found.shuffle(seed=draw, buffer_size=1):
            number += 1
            picture, more = values.pop(pictures.photo), values.pop(pictures.references, None) or []
            mask = _bytes_of(values.pop(pictures.mask, None))
            file = picture.get("path") if isinstance(picture, dict) else None
            values |= {"file_name": Path(file).name if file else f"{number:06d}"}
            values |= _picture_names(len(more), bool(mask))
            yield Sample(parse_row(values, number, name, ours), _bytes_of(picture), tuple(map(_bytes_of, more)), mask)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        raise UserError(
            f"{name}: expected samples; got {error} after sample {number}; check your connection"
        ) from error


def _text_columns(columns: Mapping[FieldName, str]) -> dict[FieldName, str]:
    """The mapping without the columns of pictures."""
    return {f: c for f, c in columns.items() if f not in ("file_name", "reference_file_names", "mask_file_name")}


def _picture_names(references: int, has_mask: bool) -> dict[str, Any]:
    """The fields of a row that name pictures inside the row."""
    names = [f"{REFERENCES}/{k}" for k in range(references)]
    return {"reference_file_names": names, "mask_file_name": MASK if has_mask else ""}


def _bytes_of(picture: Any) -> bytes:
    return (picture.get("bytes") if isinstance(picture, dict) else picture) or b""


class IndexedSource(PhotoSource):
    """The rows of one split as batches."""

    settings: Settings

    def _open_rows(self, path: str, columns: Mapping[FieldName, str]) -> Rows:
        split, chosen = self.settings.split, (self.settings.subset, self.settings.revision)
        found = load_split(path, split, *chosen)
        self.folder, name = Path(path), Path(path, split)
        table = found.data.table
        pictures = choose_columns(table.schema, columns, name)
        roots = [Path(datasets.config.HF_CACHE_HOME).resolve(), Path(path).expanduser().resolve()]
        self._photos = Pictures(table.column(pictures.photo), roots)
        self._references = Pictures(table.column(pictures.references), roots) if pictures.references else None
        self._masks = Pictures(table.column(pictures.mask), roots) if pictures.mask else None
        parse = partial(self._parse, table, columns, name)
        if len(table) < CACHED_FROM:
            return open_rows(parse(), [name], self.folder)
        self._cache = Cache(["hub", path, split, *chosen, dict(columns)], [found._fingerprint, len(table)])
        return self._cache.rows(parse, [name], self.folder)

    def _parse(self, table: pa.Table, columns: Mapping[FieldName, str], name: Path) -> Iterator[Row]:
        names = [f.name for f in table.schema if not _has_bytes(f.type)]
        ours, number = _text_columns(columns), 0
        for batch in table.select(names).to_batches():
            for values in batch.to_pylist():
                values["file_name"] = self._photos.name(number)
                count = self._references.count(number) if self._references else 0
                values |= _picture_names(count, self._masks is not None and self._masks.has_picture(number))
                number += 1
                yield parse_row(values, number, name, ours)

    def _scan_photos(self, max_pixels: int) -> Facts:
        inspect = bytes_inspector(self._all_pictures, max_pixels)
        columns, name = ("line", "references", "edit_type"), self._scan_name(max_pixels)
        return scan_kept(self.rows, columns, inspect, self._cache, name, self._stop_early, can_change=False)

    def _all_pictures(self, values: tuple[Any, ...]) -> Iterator[IO[bytes]]:
        line, *more = values
        yield self._photos.open(line - 1)
        for k in range(len(self._references_of(*more))):
            assert self._references is not None
            yield self._references.open(line - 1, k)

    def _find_picture(self, row: Row, name: str) -> Path | bytes:
        if name == row.mask and self._masks is not None:
            return self._masks.open(row.line - 1).read()
        if name == row.file_name or self._references is None:
            return self._photos.open(row.line - 1).read()
        return self._references.open(row.line - 1, int(name.rsplit("/", 1)[1])).read()


def load_split(path: str, split: str, subset: str = "", revision: str = "", streaming: bool = False) -> Any:
    """A split of a data set, memory-mapped, or with `streaming` read while it is downloaded.

    Raises:
        UserError: it cannot be found, downloaded or read.
    """
    place = Path(path).expanduser()
    more: dict[str, Any] = {"split": split, "name": subset or None, "revision": revision or None}
    more["streaming"] = streaming
    try:
        if place.is_file():
            return datasets.load_dataset("parquet", data_files={split: str(place)}, split=split, streaming=streaming)
        return datasets.load_dataset(str(place) if place.is_dir() else path, **more)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = f"{error.__cause__ or error}".strip().split("\n")[0]
        raise UserError(
            f"data.path: expected a data set of the Hub, or a folder or file of parquet, with a split {split!r}; got "
            f"{path!r} ({reason}); check path, split, subset and your connection"
        ) from error


def choose_columns(schema: pa.Schema, columns: Mapping[FieldName, str], name: Path) -> PictureColumns:
    """The columns of pictures that are read.

    Raises:
        UserError: a mapping names no column or one of edited images, or the column of the photos is not known.
    """
    present = {field.name: field.type for field in schema}
    pictures = {name for name, kind in present.items() if _has_bytes(kind)}
    edited = check_columns(columns, set(present), name)
    if edited & pictures:
        log.warning("%s: ignored, never decoded: the edited images in %s", name, ", ".join(sorted(edited & pictures)))
    references, mask = columns.get("reference_file_names", REFERENCES), columns.get("mask_file_name", MASK)
    references = references if references in pictures and _is_list(present[references]) else ""
    mask = mask if mask in pictures and not _is_list(present[mask]) else ""
    photo = columns.get("file_name") or _plain_photo_column(pictures - {references, mask}, name)
    if photo not in pictures or _is_list(present[photo]):
        raise UserError(
            f"{name}: expected a column of reference images; got {photo or ', '.join(sorted(present))!r}; set "
            f"data.columns, for example {{file_name: {(sorted(pictures) or ['image'])[0]}}}."
            f"{did_you_mean(photo, pictures)}"
        )
    return PictureColumns(photo, references, mask)


def _plain_photo_column(pictures: set[str], name: Path) -> str:
    """The column that alone may hold the photos, by its name; "" if there is none.

    Raises:
        UserError: several may.
    """
    found = source_columns(pictures)
    if len(found) > 1:
        raise UserError(
            f"{name}: expected one column that may hold the reference images; got {', '.join(found)}, of which one may "
            "hold edited images; set data.columns to the column of the originals, for example "
            f"{{file_name: {next(column for column in found if column != PHOTO)}}}"
        )
    return found[0] if found else ""


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether a column has pictures: bytes, or the struct of bytes and path of `datasets`, or lists of these."""
    if _is_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class Pictures:
    """A column of pictures, or of lists of pictures, in a table that is memory-mapped. A picture that the table only
    names is opened if it is in one of the folders `roots`."""

    def __init__(self, column: pa.ChunkedArray, roots: Sequence[Path]):
        self._roots = roots
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def _value(self, number: int) -> Any:
        chunk = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._chunks[chunk][number - int(self._starts[chunk])]

    def count(self, number: int) -> int:
        """How many pictures the list of a row has."""
        value = self._value(number)
        return len(value) if value.is_valid else 0

    def has_picture(self, number: int) -> bool:
        """Whether a row has a picture."""
        value = self._value(number)
        if not pa.types.is_struct(value.type):
            return bool(value.is_valid)
        return value.is_valid and (value["bytes"].is_valid or value["path"].is_valid)

    def name(self, number: int) -> str:
        """The file name of a row's picture, or else the row's number."""
        value = self._value(number)
        path = value["path"].as_py() if value.is_valid and pa.types.is_struct(value.type) else None
        return Path(path.replace("\\", "/")).name if path else f"{number + 1:06d}"

    def open(self, number: int, place: int | None = None) -> IO[bytes]:
        """The picture of a row as an open file; with `place`, the one at this place of its list.

        Raises:
            BadImage: the row has none, or only a name.
        """
        value = self._value(number)
        if place is not None:
            value = value.values[place] if value.is_valid else value
        if value.is_valid and pa.types.is_struct(value.type):
            if not value["bytes"].is_valid and value["path"].is_valid:
                return self._open_file(value["path"].as_py())
            value = value["bytes"]
        if not value.is_valid:
            raise BadImage("no picture in the row")
        if not value.as_buffer().size:
            raise BadImage("an empty file")
        return pa.BufferReader(value.as_buffer())

    def _open_file(self, name: str) -> IO[bytes]:
        path = Path(name)
        try:
            if not path.is_absolute() or not any(path.resolve().is_relative_to(root) for root in self._roots):
                raise BadImage("the row names a file outside the data set, and has no picture")
            return BytesIO(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
