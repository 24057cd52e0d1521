"""A Hugging Face imagefolder of photos: `metadata.jsonl` beside the images, one JSON object a line, no edited image.

    {"file_name": "images/0001.jpg", "instruction": "Remove the white fence", "edit_type": "remove",
     "object": "white fence", "source_caption": "...", "target_caption": "...", "id": "0001"}

Only `file_name` and `instruction` are required. This module opens the files named in the `file_name` column and no
others: columns that hold edited images are named in the log and left alone.

A wrong line is an error that stops the run at once; a picture that cannot be used is a *bad row*, which is recorded and
replaced by the next good row of its bucket, until there are too many of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from npedit.data import Batch, Example, collate
from npedit.data._photos import BadImage, load_photo, read_photo_size
from npedit.errors import BadRowsError, UserError, did_you_mean
from npedit.questions import IDENTITY_EDIT, normalise_edit_type
from npedit.recipe.config import Settings as Base

log = logging.getLogger(__name__)

IDENTITY_INSTRUCTIONS = ("do nothing", "leave it as it is", "keep the picture as it is", "change nothing")
FIELDS = ("file_name", "instruction", "edit_type", "object", "source_caption", "target_caption", "id")
_FILE = r"(_?(image|img|picture|photo|file|path|url)(_?(file_?names?|path|url))?|_?file_?names?)?s?"
EDITED_COLUMN = re.compile(rf"(edited|edit|target|output|result|after|modified|generated|ground_truth|gt){_FILE}", re.I)
REFERENCE_COLUMN = re.compile(rf"(source|src|input|reference|ref|original|before|image|img|photo|picture){_FILE}", re.I)
NOT_FILES = {"edit", "edits"}  # elsewhere the name of an instruction
Pixels = Annotated[int, Field(ge=8, le=8192)]


class Settings(Base):
    """Where the photos lie and how they are cut. `sizes` are (H, W) in pixels; each batch has one of them."""

    path: str
    sizes: tuple[tuple[Pixels, Pixels], ...] = Field(
        ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (512, 384), (384, 512)), min_length=1
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of bad rows above which training stops")
    share: float = Field(1.0, gt=0, le=1, description="share of the rows, drawn by lot, that is used at all")
    nothing_share: float = Field(0.01, ge=0, le=1, description="share of items turned into 'do nothing'")
    columns: dict[Literal[FIELDS], str] = Field({}, description="our field -> the data set's column")
    max_pixels: int = Field(80_000_000, ge=1, le=89_478_485, description="larger images are bad rows")
    prefetch: int = Field(2, ge=0, le=16, description="batches made ahead, each in its own thread; 0 for none")


@dataclass(frozen=True)
class Row:
    """One line of the metadata; captions and object are "" where it has none."""

    file_name: str
    instruction: str
    edit_type: str
    object: str
    source_caption: str
    target_caption: str
    id: str
    line: int


# --------------------------------------------------------------------------------------------------------- metadata


def find_metadata(path: str) -> Path:
    """The metadata.jsonl of a data folder, in it or in its `train/` sub-folder."""
    folder = Path(path).expanduser()
    wanted = f"expected a folder with images and metadata.jsonl; got {path!r}"
    if not path or not folder.exists():
        raise UserError(f"{wanted}, which does not exist; set data.path to your photos")
    if not folder.is_dir():
        raise UserError(f"{wanted}, which is a file; set data.path to the folder that holds it")
    if not any(folder.iterdir()):
        raise UserError(f"{wanted}, which is empty; put your photos and a metadata.jsonl there")
    for metadata in (folder / "metadata.jsonl", folder / "train" / "metadata.jsonl"):
        if metadata.is_file():
            return metadata
    raise UserError(f"{wanted}, where there is no metadata.jsonl; write one, a line of JSON an image")


def read_json_lines(metadata: Path) -> Iterator[tuple[int, dict]]:
    """(line number, JSON object) of each line that is not blank."""
    try:
        with metadata.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                value = json.loads(raw.decode("utf-8-sig"))
                if not isinstance(value, dict):
                    raise UserError(f"{metadata}:{line}: expected a JSON object; got {raw[:40]!r}; write one a line")
                yield line, value
    except (ValueError, RecursionError) as error:
        got = f"{raw[:40]!r} ({error})"
        raise UserError(f"{metadata}:{line}: expected JSON in UTF-8; got {got}; mend or delete the line") from error
    except OSError as error:
        raise UserError(f"expected a readable {metadata}; got {error}; check its permissions") from error


def _check_columns(settings: Settings, seen: set[str], metadata: Path) -> set[str]:
    """Refuse unclear or wrong mappings; return the columns that hold edited images."""
    for field, column in settings.columns.items():
        if column not in seen:
            raise UserError(
                f"data.columns.{field}: expected a column of {metadata}; got {column!r}.{did_you_mean(column, seen)} "
                f"Its columns are: {', '.join(sorted(seen))}"
            )
    edited = {c for c in seen if EDITED_COLUMN.fullmatch(c) and c not in NOT_FILES}
    photo = settings.columns.get("file_name", "file_name")
    if photo in edited:
        raise UserError(
            f"data.columns.file_name: expected a column of reference images; got {photo!r}, which by its name holds "
            "edited images, and those are never opened; name the column of the originals, or rename this one"
        )
    sources = sorted(c for c in seen if REFERENCE_COLUMN.fullmatch(c))
    if photo not in seen and sources and edited:
        raise UserError(
            f"{metadata}: expected a column file_name; got {', '.join(sources)} and {', '.join(sorted(edited))}, of "
            f"which only you know the originals; set data.columns, for example {{file_name: {sources[0]}}}"
        )
    return edited


def parse_row(value: dict, line: int, metadata: Path, columns: dict[str, str]) -> Row:
    """A line's JSON object as a row; `columns` are our fields that have another name there.

    Raises:
        UserError: with file and line, for a line that lacks a field, has an edit type that nothing is asked about or a
            removal of nothing.
    """
    words = {}
    for field in FIELDS:
        column = columns.get(field, field)
        word = value.get(column)
        if isinstance(word, int) and field == "id":
            word = str(word)
        if not isinstance(word, str | None):
            raise UserError(f"{metadata}:{line}: expected text in {column!r}; got {word!r}; write it as a string")
        if field in ("file_name", "instruction") and not (word or "").strip():
            there = f"got {', '.join(value) or 'an empty object'}" if word is None else "got an empty one"
            raise UserError(
                f"{metadata}:{line}: expected a field {column!r}; {there}.{did_you_mean(column, value)} "
                "Add it, or say in data.columns which column holds it"
            )
        words[field] = (word or "").strip()
    try:
        words["edit_type"] = normalise_edit_type(words["edit_type"])
    except ValueError as error:
        raise UserError(f"{metadata}:{line}: {error}") from error
    if words["edit_type"] == "remove" and not words["object"]:
        raise UserError(
            f"{metadata}:{line}: expected an 'object' for edit type 'remove'; got none; "
            "add the name of what is removed, which the critic is asked for"
        )
    if words["edit_type"] == IDENTITY_EDIT:
        words["target_caption"] = words["target_caption"] or words["source_caption"]
    return Row(**words | {"id": words["id"] or f"{line:06d}"}, line=line)


def read_rows(metadata: Path, settings: Settings) -> list[Row]:
    """All rows of a metadata file.

    Raises:
        UserError: with file and line, for a line that is not JSON, lacks a field, has an edit type that nothing is
            asked about or a removal of nothing; for columns that need a mapping; for a file without rows.
    """
    values = list(read_json_lines(metadata))
    if not values:
        raise UserError(f"expected at least one row; got an empty {metadata}; write one line of JSON an image")
    edited = _check_columns(settings, {column for _, value in values for column in value}, metadata)
    if edited:
        log.warning("%s: ignored, never opened: the edited images in %s", metadata, ", ".join(sorted(edited)))
    return [parse_row(value, line, metadata, settings.columns) for line, value in values]


def resolve_photo_path(folder: Path, file_name: str) -> Path:
    """Where a file of a data folder lies. Only the name is checked: a link inside the folder is followed.

    Raises:
        BadImage: the name leads out of the folder.
    """
    name = PurePosixPath(file_name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or re.match(r"[a-zA-Z]:", file_name):
        raise BadImage("the name leads out of the data folder")
    return folder / file_name


def subsample(rows: list[Row], share: float) -> list[Row]:
    """This share of the rows, at least one, in their order. Whatever the seed, a smaller share is part of a larger."""
    lots = list(range(len(rows)))
    random.Random("share").shuffle(lots)
    return [rows[i] for i in sorted(lots[: max(1, round(share * len(rows)))])]


# ----------------------------------------------------------------------------------------------------------- source


class Source:
    """The rows of one data folder as batches. A row belongs to the bucket (size) of the aspect nearest to its photo's.

    Each bucket is passed through over and over, in a new order each time, and no row comes again before all others of
    its bucket have come. A batch is of one bucket; what is left at the end of a pass opens the next batch. Buckets are
    mixed in proportion to their rows, so an epoch (one pass of all) visits every row once, to within one unfinished
    batch a bucket.
    """

    def __init__(self, settings: Settings, seed: int):
        self.settings = settings
        self.seed = seed
        self.metadata = find_metadata(settings.path)
        self.rows = subsample(read_rows(self.metadata, settings), settings.share)
        self.has_target_captions = all(row.target_caption for row in self.rows)
        self.has_source_captions = all(row.source_caption for row in self.rows)
        self._bad: dict[int, dict] = {}
        self._lock = threading.Lock()
        self._buckets, self._bytes = self._scan_photos()
        self._order = lru_cache(2 * len(self._buckets) + 2)(self._shuffled_order)
        self._plan = lru_cache(4)(self._shuffled_plan)
        self._ahead: dict[tuple[int, int, int, int], Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(settings.prefetch, "photos") if settings.prefetch else None

    def __len__(self) -> int:
        return len(self.rows) - len(self._bad)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every bucket, in pixels, filled or not."""
        return list(self.settings.sizes)

    @property
    def bad_rows(self) -> list[dict]:
        """{"id", "file", "line", "reason"} of each row found unusable so far; new ones come last."""
        with self._lock:
            return list(self._bad.values())

    def fingerprint(self) -> str:
        """A hash of the metadata and of the size in bytes of each photo, wherever the folder lies."""
        digest = hashlib.sha256(self.metadata.read_bytes())
        digest.update(json.dumps(self._bytes).encode())
        return digest.hexdigest()

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, H, W) in [0, 1], H and W those of one bucket.

        Ranks are disjoint, and two ranks together see what one process with twice the size sees.

        Raises:
            UserError: too many bad rows.
            ValueError: a size, index or rank that cannot be.
        """
        if size < 1 or index < 0 or not 0 <= rank < world:
            raise ValueError(f"expected size >= 1, index >= 0, rank < world; got {size}, {index}, {rank} of {world}")
        self._check_bad_share()  # of what batches made ahead have met
        if self._pool is None:
            return self._make_batch(index, size, rank, world)
        wanted = [(i, size, rank, world) for i in range(index, index + 1 + self.settings.prefetch)]
        for key in self._ahead.keys() - set(wanted):
            self._ahead.pop(key).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._pool.submit(self._make_batch, *key)
        return self._ahead.pop(wanted[0]).result()

    # ---- rows

    def _record_bad_row(self, row: Row, reason: str) -> None:
        with self._lock:
            if row.line in self._bad:
                return  # another thread met it at the same time
            self._bad[row.line] = {"id": row.id, "file": row.file_name, "line": row.line, "reason": reason}
        log.warning("bad row: %s:%d: %s: %s", self.metadata, row.line, row.file_name, reason)

    def _check_bad_share(self) -> None:
        bad, share = self.bad_rows, self.settings.max_bad_share
        if len(bad) > share * len(self.rows) or len(bad) == len(self.rows):
            first = "; ".join(f"{self.metadata}:{b['line']}: {b['file']}: {b['reason']}" for b in bad[:3])
            raise BadRowsError(
                f"expected at most {share:.1%} bad rows; got {len(bad)} of {len(self.rows)}: {first}"
                f"{'; ...' if len(bad) > 3 else ''}. Mend or delete these rows, or raise data.max_bad_share",
                bad,
            )

    def _scan_photos(self) -> tuple[list[tuple[tuple[int, int], list[int]]], list[int]]:
        """The buckets that have rows, as (size, rows), and the size in bytes of each photo (-1: none)."""
        buckets: dict[tuple[int, int], list[int]] = {size: [] for size in self.settings.sizes}
        sizes_in_bytes = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is recorded below
            for number, row in enumerate(self.rows):
                sizes_in_bytes.append(-1)
                try:
                    path = resolve_photo_path(self.metadata.parent, row.file_name)
                    height, width = read_photo_size(path, self.settings.max_pixels)
                except BadImage as error:
                    self._record_bad_row(row, str(error))
                    continue
                sizes_in_bytes[-1] = path.stat().st_size
                aspect = math.log(width / height)
                buckets[min(buckets, key=lambda s: abs(math.log(s[1] / s[0]) - aspect))].append(number)
        self._check_bad_share()
        return [(size, rows) for size, rows in buckets.items() if rows], sizes_in_bytes

    # ---- batches

    def _shuffled_order(self, bucket: int, epoch: int) -> list[int]:
        order = list(self._buckets[bucket][1])
        random.Random(f"{self.seed}/{bucket}/{epoch}").shuffle(order)
        return order

    def _batches_before(self, epoch: int, size: int) -> list[int]:
        """How many batches of `size` rows each bucket has given before this epoch begins."""
        return [epoch * len(rows) // size for _, rows in self._buckets]

    def _shuffled_plan(self, epoch: int, size: int) -> list[tuple[int, int]]:
        """The batches of one epoch, mixed: (bucket, number of the batch in its bucket)."""
        spans = zip(self._batches_before(epoch, size), self._batches_before(epoch + 1, size), strict=True)
        plan = [(bucket, k) for bucket, (start, end) in enumerate(spans) for k in range(start, end)]
        random.Random(f"{self.seed}/plan/{epoch}").shuffle(plan)
        return plan

    def _locate_batch(self, index: int, size: int) -> tuple[int, int]:
        """(bucket, number of the batch in it) of the index-th batch of `size` rows over all ranks."""
        low, high = 0, 1  # the epoch sought is in [low, high)
        while sum(self._batches_before(high, size)) <= index:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if sum(self._batches_before(middle, size)) > index else (middle, high)
        return self._plan(low, size)[index - sum(self._batches_before(low, size))]

    def _make_batch(self, index: int, size: int, rank: int, world: int) -> Batch:
        bucket, number = self._locate_batch(index, size * world)
        first = number * size * world + rank * size
        return collate([self._example_at(bucket, position) for position in range(first, first + size)])

    def _example_at(self, bucket: int, position: int) -> Example:
        """What stands at a position of a bucket's endless stream; a bad row's place is taken by the next good one."""
        size, rows = self._buckets[bucket]
        epoch, place = divmod(position, len(rows))
        order = self._order(bucket, epoch)
        others = (number for k, (_, members) in enumerate(self._buckets) if k != bucket for number in members)
        for number in chain(order[place:], order[:place], others):
            row = self.rows[number]
            if row.line in self._bad:
                continue
            try:
                picture = load_photo(resolve_photo_path(self.metadata.parent, row.file_name), size)
            except BadImage as error:
                self._record_bad_row(row, str(error))
                self._check_bad_share()
                continue
            return self._make_example(row, picture, random.Random(f"{self.seed}/nothing/{bucket}/{position}"))
        raise UserError(f"expected at least one readable photo in {self.metadata.parent}; got none; mend the data")

    def _make_example(self, row: Row, picture: Tensor, rng: random.Random) -> Example:
        """A row as an example, now and then with nothing to do; never where the only caption is that of the edit, which
        would contradict it."""
        item = Example(
            row.id, picture, row.instruction, row.edit_type, row.object, row.source_caption, row.target_caption
        )
        fits = bool(row.source_caption) or not row.target_caption
        if fits and rng.random() < self.settings.nothing_share:
            return item.as_identity_edit(rng.choice(IDENTITY_INSTRUCTIONS))
        return item
