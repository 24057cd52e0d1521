"""A Hugging Face imagefolder of photos: images and `metadata.jsonl` with one JSON object per line. No edited images.

    {"file_name": "images/0001.jpg", "instruction": "Remove the white fence", "edit_type": "remove",
     "object": "white fence", "source_caption": "...", "target_caption": "...", "id": "0001"}

Only `file_name` and `instruction` are required. This module opens only the files named in the column `file_name`.
Columns that hold edited images are named in the log and never opened.

Metadata in sub-folders are read too (`_metadata.py`).

A wrong line is an error that stops the run at once. A picture that cannot be used is a *bad row*: it is recorded and
replaced by the next good row of its bucket. Too many bad rows stop the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from npedit.data import Batch, Example, collate
from npedit.data._held_out import draw_rows, find_rows, read_held_out_ids
from npedit.data._metadata import FieldName, Row, find_metadata, read_rows
from npedit.data._photos import BadImage, crop_and_scale, load_photo, read_photo_size
from npedit.errors import BadRowsError, UserError
from npedit.recipe.config import Settings as Base

log = logging.getLogger(__name__)

IDENTITY_INSTRUCTIONS = ("do nothing", "leave it as it is", "keep the picture as it is", "change nothing")
Pixels = Annotated[int, Field(ge=8, le=8192)]


class Settings(Base):
    """The folder of the photos and how they are cropped. `sizes` are (H, W) in pixels; each batch has one size."""

    path: str
    sizes: tuple[tuple[Pixels, Pixels], ...] = Field(
        ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (512, 384), (384, 512)), min_length=1
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of bad rows above which training stops")
    share: float = Field(1.0, gt=0, le=1, description="share of the rows that is used, drawn at random")
    held_out: Annotated[int, Field(ge=0)] | str = Field(
        0, description="rows that are never trained on, for samples and judge: how many, or a file of their ids"
    )
    nothing_share: float = Field(0.01, ge=0, le=1, description="share of items turned into 'do nothing'")
    columns: dict[FieldName, str] = Field({}, description="our field name -> the data set's column name")
    max_pixels: int = Field(80_000_000, ge=1, le=89_478_485, description="larger images are bad rows")
    min_kept_share: float = Field(
        0.25, ge=0, le=1, description="share of a photo that its crop must keep; longer and narrower ones are bad rows"
    )
    max_enlargement: float = Field(
        4.0, gt=0, description="how many times a photo's sides may be enlarged; smaller ones are bad rows"
    )
    prefetch: int = Field(2, ge=0, le=16, description="batches prepared in advance, each in a separate thread")


def subsample(rows: list[Row], share: float) -> list[Row]:
    """A random share of the rows, at least one, in their order. The choice does not depend on the seed, and a smaller
    share is part of a larger one."""
    shuffled = list(range(len(rows)))
    random.Random("share").shuffle(shuffled)
    return [rows[i] for i in sorted(shuffled[: max(1, round(share * len(rows)))])]


# ----------------------------------------------------------------------------------------------------------- source


class Source:
    """The rows of one data folder as batches. A row belongs to the bucket (picture size) with the nearest aspect ratio.

    Each bucket is repeated in epochs, in a new random order each time; no row is repeated before all others of its
    bucket have been used. A batch is from one bucket. The rows that are left at the end of an epoch begin the next
    batch. Buckets are mixed in proportion to their rows, so an epoch uses every row once, except for at most one
    unfinished batch per bucket.
    """

    def __init__(self, settings: Settings, seed: int):
        self.settings = settings
        self.seed = seed
        self.folder, self.metadata = find_metadata(settings.path)
        self.rows = subsample(read_rows(self.folder, self.metadata, settings.columns), settings.share)
        self.has_target_captions = all(row.target_caption for row in self.rows)
        self.has_source_captions = all(row.source_caption for row in self.rows)
        self._bad: dict[str, dict] = {}  # by the row's place
        self._lock = threading.Lock()
        self._all_buckets, self._bytes = self._scan_photos()
        self.hold_out(self._choose_held_out())
        self._prefetched: dict[tuple[int, int, int, int], Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(settings.prefetch, "photos") if settings.prefetch else None

    def __len__(self) -> int:
        with self._lock:
            bad = set(self._bad)
        held_out = set(self._held_out)
        return sum(row.location not in bad and number not in held_out for number, row in enumerate(self.rows))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every bucket in pixels, with or without rows."""
        return list(self.settings.sizes)

    @property
    def bad_rows(self) -> list[dict]:
        """{"id", "file", "line", "reason"} of each row found unusable so far, and "metadata" for one of a sub-folder's
        file; new ones come last."""
        with self._lock:
            return list(self._bad.values())

    def texts(self) -> Iterator[tuple[str, str]]:
        """(the row's place in its file, text) of every text that a text encoder may read."""
        for row in self.rows:
            for text in (row.instruction, row.source_caption, row.target_caption):
                yield row.location, text

    def fingerprint(self) -> str:
        """A hash of the metadata and of the size in bytes of each photo, wherever the folder lies."""
        digest = hashlib.sha256(self.metadata[0].read_bytes())
        for file in self.metadata[1:]:
            digest.update(file.relative_to(self.folder).as_posix().encode() + file.read_bytes())
        digest.update(json.dumps(self._bytes).encode())
        if self.settings.held_out:
            digest.update(json.dumps(self._held_out).encode())
        return digest.hexdigest()

    def inventory(self) -> dict[str, Any]:
        """What the fingerprint covers, in parts: a hash of the metadata, each photo's size in bytes (-1: none that can
        be used), and the numbers of the rows that are held out."""
        digest = hashlib.sha256()
        for file in self.metadata:
            digest.update(file.relative_to(self.folder).as_posix().encode() + file.read_bytes())
        photos = {row.photo: size for row, size in zip(self.rows, self._bytes, strict=True)}
        return {"metadata": digest.hexdigest(), "photos": photos, "held_out": self._held_out}

    # ---- held-out rows

    def _choose_held_out(self) -> list[int]:
        chosen = self.settings.held_out
        if isinstance(chosen, str):
            return find_rows(self.rows, read_held_out_ids(chosen, self.folder))
        return draw_rows(self.rows, self._all_buckets, chosen)

    def hold_out(self, numbers: Sequence[int]) -> None:
        """Keep the rows with these numbers out of training, and no others. A run that resumes gives the numbers that it
        started with: the lot would fall otherwise once a photo is lost.

        Raises:
            UserError: no row is left to train on.
        """
        self._held_out, held_out = list(numbers), set(numbers)
        buckets = [(size, [n for n in members if n not in held_out]) for size, members in self._all_buckets]
        self._buckets = [(size, members) for size, members in buckets if members]
        if not self._buckets:
            raise UserError("data.held_out: expected rows to be left for training; got all of them; hold out fewer")
        self._order = lru_cache(2 * len(self._buckets) + 2)(self._shuffled_order)
        self._plan = lru_cache(4)(self._shuffled_plan)

    @property
    def has_drawn_held_out(self) -> bool:
        """Whether the held-out rows are drawn by lot, which depends on which photos can be read."""
        return isinstance(self.settings.held_out, int) and self.settings.held_out > 0

    def held_out_batches(self, count: int) -> list[Batch]:
        """The first `count` held-out rows whose photos can be read, in batches of one picture size each. Their
        instructions are as written: none is turned into "do nothing"."""
        size_of = {number: size for size, members in self._all_buckets for number in members}
        examples: dict[tuple[int, int], list[Example]] = {}
        for number in self._held_out:
            if sum(map(len, examples.values())) == count or number not in size_of:
                continue
            row = self.rows[number]
            try:
                picture = load_photo(row.photo_path(), size_of[number])
            except BadImage as error:
                self._record_bad_row(row, str(error))
                continue
            examples.setdefault(size_of[number], []).append(_as_example(row, picture))
        return [collate(group) for group in examples.values()]

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, H, W) in [0, 1], H and W those of one bucket.

        Ranks are disjoint, and two ranks together see what one process with twice the size sees.

        Raises:
            UserError: too many bad rows.
            ValueError: a size, index or rank that cannot be.
        """
        if size < 1 or index < 0 or not 0 <= rank < world:
            raise ValueError(f"expected size >= 1, index >= 0, rank < world; got {size}, {index}, {rank} of {world}")
        self._check_bad_share()  # bad rows that prefetched batches have found
        if self._pool is None:
            return self._make_batch(index, size, rank, world)
        wanted = [(i, size, rank, world) for i in range(index, index + 1 + self.settings.prefetch)]
        for key in self._prefetched.keys() - set(wanted):
            self._prefetched.pop(key).cancel()
        for key in wanted:
            if key not in self._prefetched:
                self._prefetched[key] = self._pool.submit(self._make_batch, *key)
        return self._prefetched.pop(wanted[0]).result()

    # ---- rows

    def _record_bad_row(self, row: Row, reason: str) -> None:
        entry = {"id": row.id, "file": row.photo, "line": row.line, "reason": reason}
        if row.metadata.parent != self.folder:
            entry["metadata"] = row.metadata.relative_to(self.folder).as_posix()
        with self._lock:
            if row.location in self._bad:
                return  # another thread found it at the same time
            self._bad[row.location] = entry
        log.warning("bad row: %s: %s: %s", row.location, row.file_name, reason)

    def _check_bad_share(self) -> None:
        with self._lock:
            bad, share = dict(self._bad), self.settings.max_bad_share
        if len(bad) > share * len(self.rows) or len(bad) == len(self.rows):
            first = "; ".join(f"{place}: {entry['file']}: {entry['reason']}" for place, entry in list(bad.items())[:3])
            raise BadRowsError(
                f"expected at most {share:.1%} bad rows; got {len(bad)} of {len(self.rows)}: {first}"
                f"{'; ...' if len(bad) > 3 else ''}. Correct or delete these rows, or raise data.max_bad_share",
                list(bad.values()),
            )

    def _scan_photos(self) -> tuple[list[tuple[tuple[int, int], list[int]]], list[int]]:
        """The buckets that have rows, as (size, rows), and the size in bytes of each photo (-1: none)."""
        buckets: dict[tuple[int, int], list[int]] = {size: [] for size in self.settings.sizes}
        sizes_in_bytes = []
        for number, row in enumerate(self.rows):
            sizes_in_bytes.append(-1)
            try:
                path = row.photo_path()
                bucket = self._choose_bucket(read_photo_size(path, self.settings.max_pixels))
            except BadImage as error:
                self._record_bad_row(row, str(error))
                continue
            sizes_in_bytes[-1] = path.stat().st_size
            buckets[bucket].append(number)
        self._check_bad_share()
        return [(size, rows) for size, rows in buckets.items() if rows], sizes_in_bytes

    def _choose_bucket(self, photo: tuple[int, int]) -> tuple[int, int]:
        """The bucket of the aspect nearest to the photo's, both (H, W).

        Raises:
            BadImage: the crop to it would keep too little of the photo, or would have to be enlarged too much.
        """
        aspect = math.log(photo[1] / photo[0])
        size = min(self.settings.sizes, key=lambda s: abs(math.log(s[1] / s[0]) - aspect))
        kept, enlargement = crop_and_scale(photo, size)
        got = f"a photo of {photo[1]} x {photo[0]} pixels, width x height, cropped to {size[1]} x {size[0]}"
        if kept < self.settings.min_kept_share:
            least = self.settings.min_kept_share
            raise BadImage(f"{got}, keeps {kept:.1%} of itself, less than data.min_kept_share = {least:.1%}")
        if enlargement > self.settings.max_enlargement * (1 + 1e-9):
            most = self.settings.max_enlargement
            raise BadImage(f"{got}, is enlarged {enlargement:.3g} times, more than data.max_enlargement = {most:g}")
        return size

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
        """The example at a position of a bucket's endless stream. The next good row replaces a bad one."""
        size, rows = self._buckets[bucket]
        epoch, place = divmod(position, len(rows))
        order = self._order(bucket, epoch)
        others = (number for k, (_, members) in enumerate(self._buckets) if k != bucket for number in members)
        for number in chain(order[place:], order[:place], others):
            row = self.rows[number]
            if row.location in self._bad:
                continue
            try:
                picture = load_photo(row.photo_path(), size)
            except BadImage as error:
                self._record_bad_row(row, str(error))
                self._check_bad_share()
                continue
            return self._make_example(row, picture, random.Random(f"{self.seed}/nothing/{bucket}/{position}"))
        raise UserError(f"expected at least one readable photo in {self.folder}; got none; correct the data")

    def _make_example(self, row: Row, picture: Tensor, rng: random.Random) -> Example:
        """A row as an example; `nothing_share` of them become "do nothing" examples. A row whose only caption is the
        target caption never does: that caption describes the edit."""
        item = _as_example(row, picture)
        can_do_nothing = bool(row.source_caption) or not row.target_caption
        if can_do_nothing and rng.random() < self.settings.nothing_share:
            return item.as_identity_edit(rng.choice(IDENTITY_INSTRUCTIONS))
        return item


def _as_example(row: Row, picture: Tensor) -> Example:
    texts = (row.instruction, row.edit_type, row.object, row.source_caption, row.target_caption)
    return Example(row.id, picture, *texts)
