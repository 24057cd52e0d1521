"""A source of batches from rows with photos, wherever rows and photos are stored: what `imagefolder`, `hub` and
`webdataset` share.

A wrong row is an error that stops the run at once. A picture that cannot be used is a *bad row*: it is recorded and
replaced by the next good row of its bucket. Too many bad rows stop the run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import threading
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from npedit.data import Batch, Example, collate
from npedit.data._buckets import assign_sizes
from npedit.data._example import load_example, with_identity_edits
from npedit.data._groups import Groups
from npedit.data._held_out import draw_rows, find_rows, read_held_out_ids
from npedit.data._metadata import FieldName, Row
from npedit.data._order import Order, plain_groups, shared_groups, weighted_groups
from npedit.data._photos import BadImage
from npedit.data._prefetch import Prefetcher, check_batch_key
from npedit.data._rows import CHUNK, Cache, Rows
from npedit.data._scan import Facts
from npedit.data._settings import PhotoSettings
from npedit.data._subjects import has_critic_photos, shuffled_other_photos
from npedit.errors import BadRowsError, UserError
from npedit.questions import SCENE

log = logging.getLogger(__name__)

LISTED_PHOTOS = 100_000  # the inventory of a larger set does not name its photos
Shape = tuple[tuple[int, int], int]  # of a bucket: (H, W) of the references, number of further references


def subsample(rows: Rows, share: float, kept: Sequence[int] = ()) -> Rows:
    """The rows with the numbers `kept` and a random share of the others, at least one, in their order. The choice does
    not depend on the seed, and a smaller share is part of a larger one."""
    if share == 1:
        return rows
    others = np.setdiff1d(np.arange(len(rows)), np.array(kept, dtype=np.int64))
    shuffled = array("i", range(len(others)))
    random.Random("share").shuffle(shuffled)
    drawn = others[np.array(shuffled[: max(1, round(share * len(others)))], dtype=np.int64)]
    return rows.select(np.union1d(drawn, np.array(kept, dtype=np.int64)))


class PhotoSource:
    """Rows as batches. A row belongs to the bucket (picture size) with the nearest aspect ratio.

    Each bucket is repeated in epochs, in a new random order each time; no row is repeated before all others of its
    bucket have been used. A batch is from one bucket. The rows that are left at the end of an epoch begin the next
    batch. Buckets are mixed in proportion to their rows, so an epoch uses every row once, except for at most one
    unfinished batch per bucket. `data.shares` changes how often the rows of an edit type are used (`_order.py`).
    """

    def __init__(self, settings: PhotoSettings, seed: int):
        self.settings = settings
        self.seed = seed
        self._cache: Cache | None = None
        rows = self._open_rows(settings.path, settings.columns)
        self._named = self._find_named_rows(rows) if settings.share < 1 else []
        self.rows = subsample(rows, settings.share, self._named)
        self._subjects = Groups(self.rows) if settings.other_photos and self.rows.has_scenes else None
        self._without = {field: self.rows.numbers_without(field) for field in ("source_caption", "target_caption")}
        self._bad: dict[int, dict] = {}  # by the row's number
        self._lock = threading.Lock()
        self._shapes, self._bucket_of, self._bytes = self._choose_buckets(self._scan_photos(settings.max_pixels))
        self.hold_out(self._choose_held_out())
        ahead = settings.prefetch
        self._prefetcher = Prefetcher(self._make_batch, ahead, ahead, "photos") if ahead else None

    # ---- what a source of photos defines

    folder: Path  # that messages and `held_out` are relative to

    @abstractmethod
    def _open_rows(self, path: str, columns: Mapping[FieldName, str]) -> Rows:
        """All rows of the data set; sets `folder`, and `_cache` if a cache is used."""

    @abstractmethod
    def _scan_photos(self, max_pixels: int) -> Facts:
        """What is known of the photo of each row in `rows`."""

    @abstractmethod
    def _find_picture(self, row: Row, name: str) -> Path | bytes:
        """The picture of a row with this name: its photo or one of its references.

        Raises:
            BadImage: there is none.
        """

    def _hash_rows(self, digest: Any, with_names: bool) -> None:
        """Add to a hash what the rows say, and with `with_names` the names of the files they are in."""
        digest.update(self._rows_digest().encode())

    def _rows_digest(self) -> str:
        found = self._cache.load_note("digest.json") if self._cache and self.settings.share == 1 else None
        if not isinstance(found, str):
            found = self.rows.digest()
            if self._cache and self.settings.share == 1:
                self._cache.save_note("digest.json", found)
        return found

    # ---- the interface of a data source

    def __len__(self) -> int:
        with self._lock:
            out = self._bad.keys() | set(self._held_out)
        return len(self.rows) - len(out)

    @property
    def has_target_captions(self) -> bool:
        """Whether each row has a target caption."""
        return not len(self._without["target_caption"])

    @property
    def has_source_captions(self) -> bool:
        """Whether each row has a source caption."""
        return not len(self._without["source_caption"])

    @property
    def has_keep_masks(self) -> bool:
        """Whether a row has a mask of what must stay."""
        return self.rows.has_masks

    def rows_without(self, caption: str) -> str:
        """Which rows lack "source_caption" or "target_caption": their number, and file and line of the first ones."""
        numbers = self._without[caption]
        places = ", ".join(self.rows[int(number)].location for number in numbers[:3])
        more = ", ..." if len(numbers) > 3 else ""
        return f"{len(numbers)} of {len(self.rows)} rows without it: {places}{more}" if len(numbers) else ""

    @property
    def most_references(self) -> int:
        """The largest number of references that a row has, its photo included."""
        return 1 + int(self._reference_counts().max())

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every bucket in pixels, with or without rows."""
        return list(self.settings.sizes)

    @property
    def bad_rows(self) -> list[dict]:
        """{"id", "file", "line", "reason"} of each row found unusable so far, and "metadata" for one that is not in a
        metadata file of the data folder itself; new ones come last."""
        with self._lock:
            return list(self._bad.values())

    def texts(self) -> Iterator[tuple[str, str]]:
        """(the row's place in its file, text) of every text that a text encoder may read."""
        columns = ("instruction", "source_caption", "target_caption", "line", "file")
        for *texts, line, file in self.rows.values(*columns):
            location = self.rows.location(line, file)
            for text in texts:
                yield location, text

    def fingerprint(self) -> str:
        """A hash of the rows and of the size in bytes of each photo, wherever the data lie."""
        digest = hashlib.sha256()
        self._hash_rows(digest, with_names=False)
        for start in range(0, len(self._bytes), CHUNK):
            words = ", ".join(map(str, self._bytes[start : start + CHUNK].tolist()))
            digest.update(f"{', ' if start else '['}{words}".encode())
        digest.update(b"]")
        if self.settings.held_out:
            digest.update(json.dumps(self._held_out).encode())
        return digest.hexdigest()

    def inventory(self) -> dict[str, Any]:
        """What the fingerprint covers, in parts: a hash of the rows, each photo's size in bytes (-1: none that can be
        used), and the numbers of the rows that are held out. The sizes of a large set are packed, without names:
        64-bit numbers, compressed, in base 64."""
        digest = hashlib.sha256()
        self._hash_rows(digest, with_names=True)
        if len(self.rows) > LISTED_PHOTOS:
            sizes = base64.b64encode(zlib.compress(self._bytes.astype("<i8").tobytes(), 1)).decode()
            return {"metadata": digest.hexdigest(), "packed_sizes": sizes, "held_out": self._held_out}
        names = (self.rows.photo_name(*values) for values in self.rows.values("file_name", "file"))
        photos = dict(zip(names, self._bytes.tolist(), strict=True))
        return {"metadata": digest.hexdigest(), "photos": photos, "held_out": self._held_out}

    # ---- held-out rows

    def _choose_held_out(self) -> list[int]:
        chosen = self.settings.held_out
        if isinstance(chosen, str):
            return self._find_named_rows(self.rows)
        return draw_rows(self.rows, self._bucket_of, chosen)

    def _find_named_rows(self, rows: Rows) -> list[int]:
        """The numbers of the rows that the file of `data.held_out` names; [] if there is no file."""
        chosen = self.settings.held_out
        return find_rows(rows, read_held_out_ids(chosen, self.folder)) if isinstance(chosen, str) else []

    def hold_out(self, numbers: Sequence[int]) -> None:
        """Keep the rows with these numbers out of training, and no others. A run that resumes gives the numbers that it
        started with: the lot would fall otherwise once a photo is lost.

        Raises:
            UserError: no row is left to train on.
        """
        self._held_out = list(numbers)
        bucket_of = self._bucket_of.copy()
        bucket_of[np.array(self._held_out, dtype=np.int64)] = -1
        members = [np.flatnonzero(bucket_of == k) for k in range(len(self._shapes))]
        self._bucket_sizes = [shape for shape, rows in zip(self._shapes, members, strict=True) if len(rows)]
        buckets = [rows for rows in members if len(rows)]
        if not buckets:
            raise UserError("data.held_out: expected rows to be left for training; got all of them; hold out fewer")
        if self.settings.shares:
            types = self.rows.column("edit_type").to_numpy().astype(str)
            groups, _ = shared_groups(buckets, types, self.settings.shares)
            kept = [k for k, bucket in enumerate(groups) if bucket]
            self._bucket_sizes, groups = [self._bucket_sizes[k] for k in kept], [groups[k] for k in kept]
        else:
            groups = plain_groups(buckets)
        self._groups, self._order = groups, Order(self.seed, groups)

    def reweigh(self, weight: Callable[[str, str], float]) -> None:
        """Draw the rows of later batches in proportion to their weights; `weight` gives the weight in (0, 1] of an id
        and its edit type. Batches stay a function of the seed and their number until the next change."""
        weights = np.array([weight(*row) for row in self.rows.values("id", "edit_type")])
        self._order = Order(self.seed, weighted_groups(self._groups, weights))
        if self._prefetcher is not None:
            self._prefetcher.clear()

    @property
    def has_drawn_held_out(self) -> bool:
        """Whether the held-out rows are drawn by lot, which depends on which photos can be read."""
        return isinstance(self.settings.held_out, int) and self.settings.held_out > 0

    def held_out_batches(self, count: int) -> list[Batch]:
        """The first `count` held-out rows whose photos can be read, in batches of one picture size each. Their
        instructions are as written: none is turned into "do nothing"."""
        examples: dict[int, list[Example]] = {}
        for number in self._held_out:
            bucket = int(self._bucket_of[number])
            if sum(map(len, examples.values())) == count or bucket < 0:
                continue
            row = self.rows[number]
            try:
                example = self._load_example(number, self._shapes[bucket][0], f"held out/{row.id}")
                examples.setdefault(bucket, []).append(example)
            except BadImage as error:
                self._record_bad_row(number, row, str(error))
        return [collate(group) for group in examples.values() if group]

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, H, W) in [0, 1], H and W those of one bucket.

        Ranks are disjoint, and two ranks together see what one process with twice the size sees.

        Raises:
            UserError: too many bad rows.
            ValueError: a size, index or rank that cannot be.
        """
        check_batch_key(index, size, rank, world)
        self._check_bad_share()  # bad rows that prefetched batches have found
        if self._prefetcher is None:
            return self._make_batch(index, size, rank, world)
        return self._prefetcher.batch(index, size, rank, world)

    # ---- rows

    def _record_bad_row(self, number: int, row: Row, reason: str) -> None:
        entry = {"id": row.id, "file": row.photo, "line": row.line, "reason": reason}
        if row.metadata.parent != self.folder or row.offset >= 0:
            inside = row.metadata.is_relative_to(self.folder)  # tar files may lie in several folders
            entry["metadata"] = (row.metadata.relative_to(self.folder) if inside else row.metadata).as_posix()
        with self._lock:
            if number in self._bad:
                return  # another thread found it at the same time
            self._bad[number] = entry
        log.warning("bad row: %s: %s: %s", row.location, row.file_name, reason)

    def _stop_early(self, bad: int) -> None:
        """Stop while the photos of a large set are looked for, if too many are bad."""
        if len(self.rows) > CHUNK and bad > self.settings.max_bad_share * len(self.rows):
            raise UserError(
                f"expected at most {self.settings.max_bad_share:.1%} bad rows; got {bad} of the first ones of "
                f"{len(self.rows)} in {self.folder}; correct data.path, or raise data.max_bad_share"
            )

    def _check_bad_share(self) -> None:
        with self._lock:
            bad = dict(self._bad)
        if len(bad) <= self.settings.max_bad_share * len(self.rows) and len(bad) < len(self.rows):
            return
        some = [(self.rows[number].location, entry) for number, entry in list(bad.items())[:3]]
        first = "; ".join(f"{place}: {entry['file']}: {entry['reason']}" for place, entry in some)
        raise BadRowsError(
            f"expected at most {self.settings.max_bad_share:.1%} bad rows; got {len(bad)} of {len(self.rows)}: {first}"
            f"{'; ...' if len(bad) > 3 else ''}. Correct or delete these rows, or raise data.max_bad_share",
            list(bad.values()),
        )

    def _references_of(self, references: Sequence[str] = (), edit_type: str = "") -> Sequence[str]:
        """The further references of a row without which it cannot be used: those that the student sees."""
        return () if has_critic_photos(edit_type, self.settings.other_photos) else references

    def _scan_name(self, max_pixels: int) -> str:
        """The name under which a cache keeps what the scan of the photos found. It has every setting that the result
        depends on."""
        named = f"-{hashlib.sha256(repr(sorted(self._named)).encode()).hexdigest()[:16]}" if self._named else ""
        return f"photos-{self.settings.share:g}-{max_pixels}-{self.settings.other_photos:d}{named}"

    def _reference_counts(self) -> np.ndarray:
        """How many further references the student sees of each row."""
        counts = pc.list_value_length(self.rows.column("references")).to_numpy()
        is_for_critic = pc.equal(self.rows.column("edit_type"), SCENE).to_numpy() & self.settings.other_photos
        return np.where(is_for_critic, 0, counts)

    def _choose_buckets(self, facts: Facts) -> tuple[list[Shape], np.ndarray, np.ndarray]:
        """(shapes of the buckets, bucket of each row, size in bytes of each photo); both are -1 for a bad row."""
        sizes = list(dict.fromkeys(self.settings.sizes))
        size_of, reasons = assign_sizes(facts, sizes, self.settings.min_kept_share, self.settings.max_enlargement)
        for number, reason in reasons.items():
            self._record_bad_row(number, self.rows[number], reason)
        self._check_bad_share()
        more = self._reference_counts()
        counts = np.unique(more).tolist()
        bucket_of = np.where(size_of < 0, -1, np.searchsorted(counts, more) * len(sizes) + size_of).astype(np.int32)
        bytes_ = np.where(size_of < 0, -1, facts.values["bytes"])
        return [(size, count) for count in counts for size in sizes], bucket_of, bytes_

    # ---- batches

    def _make_batch(self, index: int, size: int, rank: int, world: int) -> Batch:
        bucket, number = self._order.locate_batch(index, size * world)
        first = number * size * world + rank * size
        return collate([self._example_at(bucket, position) for position in range(first, first + size)])

    def _example_at(self, bucket: int, position: int) -> Example:
        """The example at a position of a bucket's endless stream. The next good row replaces a bad one."""
        size, count = self._bucket_sizes[bucket]
        for number in self._order.candidates(bucket, position):
            if number in self._bad or self._shapes[self._bucket_of[number]][1] != count:
                continue
            row = self.rows[number]
            try:
                example = self._load_example(number, size, f"{bucket}/{position}")
            except BadImage as error:
                self._record_bad_row(number, row, str(error))
                self._check_bad_share()
                continue
            rng = random.Random(f"{self.seed}/nothing/{bucket}/{position}")
            return with_identity_edits(example, rng, self.settings.nothing_share)
        raise UserError(f"expected at least one readable photo in {self.folder}; got none; correct the data")

    def _load_example(self, number: int, size: tuple[int, int], item: str) -> Example:
        """A row as an example, with its pictures cropped to `size`. `item` names its place, for the draw of another
        photo of the subject."""
        row = self.rows[number]
        if not has_critic_photos(row.edit_type, self.settings.other_photos):
            return load_example(row, size, self._find_picture, row.references)
        rng = random.Random(f"{self.seed}/other photo/{item}")
        members = self._subjects.members(number) if self._subjects else []
        others = shuffled_other_photos(row, [self.rows[k] for k in members], rng)
        return load_example(row, size, self._find_picture, (), others)
