"""The records of another data set's lists: parquet, JSON lines, JSON, csv, caption files, WebDataset shards.

Of a parquet file, only the wanted columns are read from disk. Of a tar file, only the wanted members. No picture is
decoded here.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from npedit.data._formats import read_csv
from npedit.errors import UserError, did_you_mean

HELD_OUT_SPLITS = ("test", "dev", "val", "valid", "validation", "eval")
BATCH = 64  # rows of a parquet file in memory at a time
INSTRUCTIONS = "instructions.txt"
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")  # the suffixes of pictures
MAX_MEMBER_BYTES = 200_000_000


@dataclass(frozen=True)
class Located:
    """A record, its place for messages, and the folder of the list that it is in."""

    values: Mapping[str, Any]
    place: str
    folder: Path


class Lists(NamedTuple):
    """The lists of a data set: those to read, those of held-out splits, and those of other patterns."""

    wanted: list[Path]
    held_out: list[Path] = []
    others: list[Path] = []


def find_lists(source: Path, patterns: Collection[str], all_patterns: bool = False) -> Lists:
    """The lists in `source`, which is a list or a folder of lists. The files of the first pattern that has any are
    wanted, or with `all_patterns` those of each. A file or folder whose name begins with a split's name, such as
    `dev-00000-of-00004.parquet`, is of that split.

    Raises:
        UserError: there is no list.
    """
    if source.is_file():
        return Lists([source])
    if not source.is_dir():
        raise UserError(
            f"expected a downloaded data set; got {source}, which does not exist; download it, then name it"
        )
    by_pattern = [sorted(path for path in source.rglob(pattern) if path.is_file()) for pattern in patterns]
    by_pattern = [paths for paths in by_pattern if paths]
    if not by_pattern:
        raise UserError(f"expected {' or '.join(patterns)} in {source}; got none of these; check the path and the name")
    read = len(by_pattern) if all_patterns else 1
    found, others = (list(chain(*part)) for part in (by_pattern[:read], by_pattern[read:]))
    held_out = [path for path in found if _split_of(path.relative_to(source)) in HELD_OUT_SPLITS]
    wanted = [path for path in found if path not in held_out]
    if not wanted:
        raise UserError(f"expected training data in {source}; got held-out splits only; name the file itself")
    return Lists(wanted, held_out, others)


def _split_of(path: Path) -> str:
    """The split that a path's names tell: "dev" for `data/dev-00000-of-00004.parquet`; "" if they tell none."""
    words = [part.lower().split("-")[0].split(".")[0] for part in path.parts]
    return next((word for word in words if word in HELD_OUT_SPLITS), "")


def list_columns(path: Path) -> list[str]:
    """The names of the columns of a list (of the first record, for JSON and csv)."""
    if path.suffix == ".parquet":
        return list(_open_parquet(path).schema_arrow.names)
    return list(next((r.values for r in read_records(path, ())), {}))


def read_records(path: Path, columns: Collection[str]) -> Iterator[Located]:
    """The records of a list, in order. Of parquet and tar files, only `columns` are read.

    Raises:
        UserError: the file cannot be read, or is of no known kind.
    """
    readers = {
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tar": _read_tar,
        ".txt": _read_caption_file,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"expected a list ({', '.join(readers)}); got {path}; name another file or a folder")
    try:
        yield from readers[path.suffix.lower()](path, columns)
    except (OSError, ValueError, tarfile.TarError, RecursionError, pa.ArrowException) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"expected a list that can be read; got {path}: {said}; download it again") from None


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"expected a parquet file; got {path}: {error}; download it again") from None


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[Located]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if name in columns or name.rpartition("_")[0] in columns]
        if not wanted:
            missing = next(iter(columns), "")
            raise UserError(
                f"expected columns among {', '.join(columns)} in {path}; got {', '.join(names)}."
                f"{did_you_mean(missing, names)} Choose another format, or name the columns with --column"
            )
        number = 0
        for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield Located(values, f"{path.name}:{number}", path.parent)


def _read_json_lines(path: Path, columns: Collection[str]) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Located(_as_object(json.loads(line), f"line {number}"), f"{path.name}:{number}", path.parent)


def _read_json(path: Path, columns: Collection[str]) -> Iterator[Located]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, list):
        raise ValueError(f"expected a JSON array of records; got {type(found).__name__}")
    for number, value in enumerate(found, 1):
        yield Located(_as_object(value, f"record {number}"), f"{path.name}:{number}", path.parent)


def _as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a JSON object; got {type(value).__name__}")
    return value


def _read_csv(path: Path, columns: Collection[str]) -> Iterator[Located]:
    for line, values in read_csv(path):
        yield Located(values, f"{path.name}:{line}", path.parent)


def _read_caption_file(path: Path, columns: Collection[str]) -> Iterator[Located]:
    """One record: the file's text, and the name without suffix, which is the photo's too. A file `instructions.txt`
    gives a record for each of its lines and each picture of its folder and sub-folders."""
    text = path.read_text(encoding="utf-8-sig").strip()
    if path.name == INSTRUCTIONS:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        photos = sorted(p for p in path.parent.rglob("*") if p.suffix.lower().lstrip(".") in PICTURES)
        for photo in photos:
            name = photo.relative_to(path.parent).as_posix()
            for number, line in enumerate(lines, 1):
                values = {"instruction": line, "photo": name, "id": f"{name}-{number}"}
                yield Located(values, f"{path.name}:{number}", path.parent)
        return
    yield Located({"instruction": text, "photo": path.stem, "id": path.stem}, path.name, path.parent)


def _read_tar(path: Path, columns: Collection[str]) -> Iterator[Located]:
    """The samples of a WebDataset shard: members of one key that follow each other. A member KEY.json gives fields,
    KEY.txt a text, and a wanted picture its bytes. Other members are skipped unread."""
    key, values = "", dict[str, Any]()
    with tarfile.open(path, "r|*") as shard:
        for member in shard:
            if not member.isfile():
                continue
            stem, _, suffix = member.name.rpartition("/")[2].partition(".")
            folder = member.name.rpartition("/")[0]
            this = f"{folder}/{stem}" if folder else stem
            if this != key and values:
                yield Located({"__key__": key, **values}, f"{path.name}:{key}", path.parent)
                values = {}
            key, suffix = this, suffix if suffix in columns else suffix.lower()
            values |= _read_member(shard, member, suffix, columns)
    if values:
        yield Located({"__key__": key, **values}, f"{path.name}:{key}", path.parent)


def _read_member(
    shard: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, columns: Collection[str]
) -> dict[str, Any]:
    if suffix != "json" and suffix not in columns and suffix != "txt":
        return {}
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{member.name}: expected at most {MAX_MEMBER_BYTES} bytes; got {member.size}")
    opened = shard.extractfile(member)
    content = opened.read() if opened else b""
    if suffix == "json":
        return _as_object(json.loads(content), member.name)
    is_text = suffix.rpartition(".")[2] not in PICTURES
    return {suffix: content.decode("utf-8") if is_text else {"bytes": content, "path": member.name}}
