"""Photos in tar files, as the library webdataset reads them. No edited images.

    data: {name: webdataset, path: shards/}            every .tar in the folder, in the order of their names
    data: {name: webdataset, path: "shards/{000..099}.tar"}

A sample is the files of one key: `0001.jpg`, and `0001.json` with the fields of a line of metadata.jsonl (without
`file_name`), or `0001.txt` with the instruction alone. `data.columns` says which file is the photo where there are
several: {file_name: source.jpg}. `reference_file_names` in the JSON are further files of the same key: ["ref.jpg"], and
so is `mask_file_name`: "mask.png". No other picture is opened.

Tar files on a disk are read at any place: the first start notes where each picture is. Others are streamed
(`_stream.py`): URLs ("https://HOST/{000..099}.tar") and commands ("pipe:aws s3 cp s3://BUCKET/{000..099}.tar -").
"""

from __future__ import annotations

import json
import logging
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from pydantic import Field
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, tarfile_samples

from npedit.data._metadata import EDITED_COLUMN, FieldName, Row, parse_row
from npedit.data._photos import BadImage
from npedit.data._rows import Cache, Rows, open_rows
from npedit.data._scan import Facts, bytes_inspector, scan_kept
from npedit.data._settings import PhotoSettings
from npedit.data._source import PhotoSource
from npedit.data._stream import Sample, StreamSource
from npedit.errors import UserError

log = logging.getLogger(__name__)

CACHED_FROM = 64 << 20  # bytes of tar files; the index of smaller sets is made at each start
TEXTS = ("json", "txt")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
Member = tuple[int, int]  # where a file begins in the tar file, and its length, in bytes


class Settings(PhotoSettings):
    """Which tar files, and how their photos are cropped."""

    streaming: bool = Field(False, description="read the tar files from start to end, as a URL or a command gives them")
    shuffle_buffer: int = Field(256, ge=1, description="samples that a stream holds to mix them")


def Source(settings: Settings, seed: int) -> IndexedSource | StreamSource:
    """The source of these tar files: one that reads any sample, or a stream where they are not files on a disk."""
    if not (settings.streaming or ":" in settings.path):
        return IndexedSource(settings, seed)
    place = Path(settings.path).expanduser()
    urls = [str(shard) for shard in find_shards(settings.path)] if place.is_dir() else expand_urls(settings.path)
    return StreamSource(settings, seed, partial(stream_samples, urls, settings.columns, seed), settings.shuffle_buffer)


class IndexedSource(PhotoSource):
    """The samples of all tar files as batches."""

    def _open_rows(self, path: str, columns: Mapping[FieldName, str]) -> Rows:
        self.shards = find_shards(path)
        self.folder = self.shards[0].parent
        states, parse = [shard.stat() for shard in self.shards], partial(read_rows, self.shards, columns)
        if sum(state.st_size for state in states) < CACHED_FROM:
            return open_rows(parse(), self.shards, self.folder)
        sizes_and_times = [(state.st_size, state.st_mtime_ns) for state in states]
        self._cache = Cache(["webdataset", Path(path).resolve(), dict(columns)], [self.shards, sizes_and_times])
        return self._cache.rows(parse, self.shards, self.folder)

    def _scan_photos(self, max_pixels: int) -> Facts:
        inspect = bytes_inspector(self._all_pictures, max_pixels)
        columns, name = ("file", "offset", "length", "references", "edit_type"), self._scan_name(max_pixels)
        return scan_kept(self.rows, columns, inspect, self._cache, name, self._stop_early, can_change=False)

    def _all_pictures(self, values: tuple[Any, ...]) -> Iterator[IO[bytes]]:
        file, offset, length, *more = values
        yield BytesIO(_read(self.shards[file], (offset, length)))
        for name in self._references_of(*more):
            yield BytesIO(_read(self.shards[file], _member_of(name)))

    def _find_picture(self, row: Row, name: str) -> Path | bytes:
        return _read(row.metadata, (row.offset, row.length) if name == row.file_name else _member_of(name))


def _read(shard: Path, member: Member) -> bytes:
    """The content of a file inside a tar file.

    Raises:
        BadImage: it is empty, or the tar file cannot be read.
    """
    try:
        with shard.open("rb") as file:
            file.seek(member[0])
            content = file.read(member[1])
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error
    if not content:
        raise BadImage("an empty file")
    return content


def find_shards(path: str) -> list[Path]:
    """The tar files in a folder, or those that a pattern with braces names.

    Raises:
        UserError: there is none, or one of the pattern is missing.
    """
    place = Path(path).expanduser()
    found = sorted(place.glob("*.tar")) if place.is_dir() else [Path(p).expanduser() for p in expand_urls(path)]
    missing = [shard for shard in found if not shard.is_file()]
    if not found or missing:
        raise UserError(
            f"data.path: expected a folder of .tar files, or their names with braces, such as shards/{{000..099}}.tar; "
            f"got {path!r}, {f'where {missing[0]} is missing' if missing else 'which has none'}; correct it"
        )
    return found


def read_rows(shards: Sequence[Path], columns: Mapping[FieldName, str]) -> Iterator[Row]:
    """The rows of these tar files: one for each sample.

    Raises:
        UserError: names the tar file and the number of the sample: the tar file is damaged, the fields are not JSON, or
            an error of `parse_row`.
    """
    for shard in shards:
        number, ignored = 0, set[str]()
        try:
            with tarfile.open(shard, "r:") as tar:
                for key, members in _samples(tar):
                    number += 1
                    ignored |= {kind for kind in members if EDITED_COLUMN.fullmatch(kind.split(".")[0])}
                    yield _as_row(tar, key, members, columns, shard, number)
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{shard}: expected a tar file; got one that cannot be read after sample {number} ({error}); make it "
                "again"
            ) from error
        if ignored:
            log.warning("%s: ignored, never opened: the edited images in %s", shard, ", ".join(sorted(ignored)))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, files by what follows the key) of each sample. As in the library, a sample is consecutive files."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # otherwise every member stays in memory
        name, kind = base_plus_ext(member.name)
        if not member.isreg() or name is None or Path(member.name).name.startswith("__"):
            continue
        if name != key and members:
            yield str(key), members
            members = {}
        key = name
        members[kind.lower()] = member
    if members:
        yield str(key), members


def _as_row(
    tar: tarfile.TarFile,
    key: str,
    members: Mapping[str, tarfile.TarInfo],
    columns: Mapping[FieldName, str],
    shard: Path,
    number: int,
) -> Row:
    """Sample number `number` of a tar file as a row. Errors as in `read_rows`."""
    location = f"{shard}:{number}"
    texts = {kind: _content(tar, members[kind]) for kind in TEXTS if kind in members}
    photo, values = read_sample(key, list(members), texts, columns, location)
    mapping: dict[FieldName, str] = {field: column for field, column in columns.items() if field != "file_name"}
    row = parse_row(values | {"file_name": members[photo].name}, number, shard, mapping)
    kinds = _further_kinds(row)
    for kind in kinds:
        if kind.lower() not in members:
            raise UserError(f"{location}: expected a file {key}.{kind}; got {', '.join(members)}; add it")
    files = [members[kind.lower()] for kind in kinds]
    names = [f"{kind}@{file.offset_data}+{file.size}" for kind, file in zip(kinds, files, strict=True)]
    references, mask = tuple(names[: len(row.references)]), names[-1] if row.mask else ""
    photo_file = members[photo]
    return replace(row, references=references, mask=mask, offset=photo_file.offset_data, length=photo_file.size)


def stream_samples(urls: Sequence[str], columns: Mapping[FieldName, str], seed: int, epoch: int) -> Iterator[Sample]:
    """The samples of all tar files, in a random order of the tar files.

    Raises:
        UserError: a tar file cannot be read, or an error of `read_rows`.
    """
    urls, number = list(urls), 0
    random.Random(f"{seed}/shards/{epoch}").shuffle(urls)
    mapping: dict[FieldName, str] = {field: column for field, column in columns.items() if field != "file_name"}
    try:
        for sample in tarfile_samples(({"url": url} for url in urls), select_files=_is_wanted):
            number += 1
            key, where = sample["__key__"], Path(str(sample["__url__"]))
            kinds = [kind for kind in sample if not kind.startswith("__")]
            photo, values = read_sample(key, kinds, sample, columns, f"{where}:{number}")
            row = parse_row(values | {"file_name": f"{key}.{photo}"}, number, where, mapping)
            _further_kinds(row)
            mask = sample[row.mask.lower()] if row.mask else b""
            yield Sample(row, sample[photo], tuple(sample[kind.lower()] for kind in row.references), mask)
    except (tarfile.TarError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.path: expected tar files that can be read; got {urls[0]!r} and others, of which one fails after "
            f"sample {number} of epoch {epoch} ({error}); check path and connection"
        ) from error


def _is_wanted(name: str) -> bool:
    """Whether a file of a stream is kept: edited images are not."""
    _, kind = base_plus_ext(name)
    return kind is not None and not EDITED_COLUMN.fullmatch(kind.split(".")[0])


def _further_kinds(row: Row) -> list[str]:
    """The files of a sample that its row names: further references and the mask.

    Raises:
        UserError: one of them holds an edited image.
    """
    kinds = [*row.references, *([row.mask] if row.mask else [])]
    if edited := [kind for kind in kinds if EDITED_COLUMN.fullmatch(kind.split(".")[0])]:
        raise UserError(
            f"{row.location}: expected files of reference images or masks; got {edited[0]!r}, which by its name holds "
            "an edited image, and those are never opened; name another file, or rename this one"
        )
    return kinds


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _member_of(name: str) -> Member:
    """Where a further reference is, from its name in `Row.references`."""
    offset, length = name.rsplit("@", 1)[1].split("+")
    return int(offset), int(length)


def read_sample(
    key: str, kinds: Sequence[str], texts: Mapping[str, bytes], columns: Mapping[FieldName, str], location: str
) -> tuple[str, dict[str, Any]]:
    """(which file of a sample is the photo, the values of the sample by column). `kinds` is what follows the key in the
    names of its files; `texts` are the contents of those that are text.

    Raises:
        UserError: there is no photo, or several; or the fields are not JSON.
    """
    chosen = columns.get("file_name", "")
    photos = [kind for kind in kinds if (kind == chosen.lower() if chosen else kind in PICTURES)]
    if len(photos) != 1:
        raise UserError(
            f"{location}: expected one photo of the key {key!r}, {chosen or ', '.join(PICTURES)}; got "
            f"{', '.join(kinds)}; set data.columns, for example {{file_name: source.jpg}}"
        )
    if EDITED_COLUMN.fullmatch(photos[0].split(".")[0]):
        raise UserError(
            f"data.columns.file_name: expected the files of reference images; got {chosen!r}, which by its name holds "
            "edited images, and those are never opened; name the files of the photos"
        )
    try:
        values = json.loads(texts["json"].decode("utf-8-sig")) if "json" in texts else {}
        text = texts["txt"].decode("utf-8-sig") if "txt" in texts else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: expected JSON and text in UTF-8; got {key!r} ({error}); correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"{location}: expected a JSON object in {key}.json; got {values!r:.40}; correct it")
    instruction = columns.get("instruction", "instruction")
    if text is not None and instruction not in values:
        values[instruction] = text
    id_ = columns.get("id", "id")
    return photos[0], values | {id_: values.get(id_) or key}
