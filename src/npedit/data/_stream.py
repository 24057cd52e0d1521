"""A source of batches from samples that can only be read one after the other: tar files behind a URL or a command, and
streamed data sets of the Hub.

An epoch reads all samples once, through a buffer that mixes them (`shuffle_buffer`). Samples wait until a batch of one
picture size is full; what waits at the end of an epoch begins the next. Each process reads the whole stream and decodes
the pictures of its own items alone. To resume, the stream is read again from its start, without decoding, up to the
batch that comes next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import count, islice
from typing import Any

from npedit.data import Batch, Example, collate
from npedit.data._buckets import choose_size
from npedit.data._example import load_example, with_identity_edits
from npedit.data._metadata import Row
from npedit.data._photos import BadImage, read_photo_size
from npedit.data._prefetch import Prefetcher, check_batch_key
from npedit.data._settings import PhotoSettings
from npedit.data._subjects import has_critic_photos, shuffled_other_photos
from npedit.errors import BadRowsError, UserError

log = logging.getLogger(__name__)

CAPTIONS = ("source_caption", "target_caption")
PEEKED = 32  # samples that are looked at when the source is opened
LEAST_SEEN = 200  # samples before which few bad ones do not stop training
Shape = tuple[tuple[int, int], int]  # (H, W) of the references, number of further references


@dataclass(frozen=True)
class Sample:
    """One row and the bytes of its photo, of its further references and of its mask."""

    row: Row
    photo: bytes
    references: tuple[bytes, ...] = ()
    mask: bytes = b""

    def find_picture(self, row: Row, name: str) -> bytes:
        """The bytes of one of the row's pictures, by its name."""
        names = (row.file_name, row.mask, *row.references)
        return (self.photo, self.mask, *self.references)[names.index(name)]

    def shape(self, settings: PhotoSettings) -> Shape:
        """The shape of the sample's bucket.

        Raises:
            BadImage: no size of the settings fits the photo, or its header cannot be read.
        """
        photo = read_photo_size(BytesIO(self.photo), settings.max_pixels)
        size = choose_size(photo, settings.sizes, settings.min_kept_share, settings.max_enlargement)
        return size, 0 if has_critic_photos(self.row.edit_type, settings.other_photos) else len(self.references)

    def load(self, settings: PhotoSettings, size: tuple[int, int], rng: random.Random) -> Example:
        """The sample as an example. Errors as in `load_example`."""
        if has_critic_photos(self.row.edit_type, settings.other_photos):
            others = shuffled_other_photos(self.row, (), rng)
            return load_example(self.row, size, self.find_picture, (), others)
        return load_example(self.row, size, self.find_picture, self.row.references)


class StreamSource:
    """Samples in the order of the stream as batches. `samples(epoch)` reads all of them."""

    def __init__(
        self, settings: PhotoSettings, seed: int, samples: Callable[[int], Iterator[Sample]], shuffle_buffer: int
    ):
        self.settings, self.seed = settings, seed
        self._samples, self._shuffle_buffer = samples, shuffle_buffer
        _require_no_selection({"held_out": settings.held_out, "share": settings.share != 1, "shares": settings.shares})
        self._bad: dict[str, dict] = {}
        self._lock = threading.Lock()
        self._seen = 0
        first = list(islice(samples(0), PEEKED))
        if not first:
            raise UserError(f"expected at least one sample; got an empty {settings.path!r}; correct data.path")
        rows = [_described_row(sample.row) for sample in first]
        self._digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self._lacks = {field: [s.row for s in first if not getattr(s.row, field)] for field in CAPTIONS}
        self.has_keep_masks = any(sample.mask for sample in first)  # whether one of the first samples has a mask
        self._n, self._next = 0, 0  # items of a batch over all ranks, number of the next batch
        self._groups: Iterator[tuple[int, tuple[Shape, list[Sample]]]] = iter(())
        # one thread, as the stream has one place
        self._prefetcher = Prefetcher(self._make_batch, settings.prefetch, 1, "stream")

    def __len__(self) -> int:
        return sys.maxsize  # not known before all has been read

    @property
    def has_target_captions(self) -> bool:
        """Whether the first samples have target captions; a later one without stops training."""
        return not self._lacks["target_caption"]

    @property
    def has_source_captions(self) -> bool:
        """Whether the first samples have source captions; a later one without stops training."""
        return not self._lacks["source_caption"]

    def rows_without(self, caption: str) -> str:
        """Which of the first samples lack "source_caption" or "target_caption"."""
        rows = self._lacks[caption]
        return f"{len(rows)} of the first {PEEKED} samples without it: {rows[0].location}" if rows else ""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every picture size in pixels."""
        return list(self.settings.sizes)

    @property
    def bad_rows(self) -> list[dict]:
        """{"id", "file", "line", "reason"} of each sample found unusable so far; new ones come last."""
        with self._lock:
            return list(self._bad.values())

    def texts(self) -> Iterator[tuple[str, str]]:
        """Nothing: the texts are not known before all has been read."""
        return iter(())

    def held_out_batches(self, count: int) -> list[Batch]:
        """Nothing: a stream holds no rows out."""
        return []

    def fingerprint(self) -> str:
        """A hash of the first samples' rows and of the size of the buffer."""
        return hashlib.sha256(f"{self._digest}/{self._shuffle_buffer}".encode()).hexdigest()

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, H, W) in [0, 1], H and W those of one bucket.

        Ranks are disjoint, and two ranks together see what one process with twice the size sees. Batches in increasing
        order are fast; a smaller index than the last one reads the stream from its start.

        Raises:
            UserError: too many bad samples, or one that is wrong.
            ValueError: a size, index or rank that cannot be.
        """
        check_batch_key(index, size, rank, world)
        return self._prefetcher.batch(index, size, rank, world)

    def _make_batch(self, index: int, size: int, rank: int, world: int) -> Batch:
        if self._n != size * world or index < self._next:
            self._n, self._next, self._groups = size * world, 0, self._full_groups(size * world)
        for number, (shape, samples) in self._groups:
            self._next = number + 1
            if number == index:
                return collate([self._example(shape, samples, index, rank * size + k) for k in range(size)])
        raise UserError(f"expected readable samples in {self.settings.path!r}; got none; correct data.path")

    def _full_groups(self, size: int) -> Iterator[tuple[int, tuple[Shape, list[Sample]]]]:
        """(number, (shape, samples)) of each batch of `size` samples over all ranks, epoch after epoch."""
        waiting, number = defaultdict[Shape, list[Sample]](list), 0
        for epoch in count():
            usable = 0
            mixed = _mix(self._samples(epoch), self._shuffle_buffer, random.Random(f"{self.seed}/stream/{epoch}"))
            for sample in mixed:
                self._seen += 1
                self._check_captions(sample.row)
                try:
                    shape = sample.shape(self.settings)
                except BadImage as error:
                    self._record_bad(sample.row, str(error))
                    continue
                usable += 1
                waiting[shape].append(sample)
                if len(waiting[shape]) == size:
                    yield number, (shape, waiting.pop(shape))
                    number += 1
            if not usable:
                return

    def _example(self, shape: Shape, samples: Sequence[Sample], index: int, place: int) -> Example:
        """The item at a place of a batch; the next one of the batch replaces one whose picture is broken."""
        for k in range(len(samples)):
            sample = samples[(place + k) % len(samples)]
            try:
                other = random.Random(f"{self.seed}/other photo/{index}/{place}")
                example = sample.load(self.settings, shape[0], other)
            except BadImage as error:
                self._record_bad(sample.row, str(error))
                continue
            rng = random.Random(f"{self.seed}/nothing/{index}/{place}")
            return with_identity_edits(example, rng, self.settings.nothing_share)
        raise UserError(f"expected a readable picture in a batch of {len(samples)}; got none; correct the data")

    def _check_captions(self, row: Row) -> None:
        for field, lacks in self._lacks.items():
            if not lacks and not getattr(row, field):
                raise UserError(f"{row.location}: expected a {field}, as the first samples have; got none; add it")

    def _record_bad(self, row: Row, reason: str) -> None:
        with self._lock:
            if row.location not in self._bad:
                log.warning("bad row: %s: %s: %s", row.location, row.file_name, reason)
            self._bad[row.location] = {"id": row.id, "file": row.photo, "line": row.line, "reason": reason}
            bad = list(self._bad.values())
        if len(bad) > self.settings.max_bad_share * max(self._seen, LEAST_SEEN):
            raise BadRowsError(
                f"expected at most {self.settings.max_bad_share:.1%} bad samples; got {len(bad)} of {self._seen} so "
                f"far, the last {row.location}: {reason}. Correct them, or raise data.max_bad_share",
                bad,
            )


def _described_row(row: Row) -> dict[str, Any]:
    """What a hash of the rows covers. A stream has no use for groups."""
    unused = {"group", *(() if row.mask else ("mask",))}
    return {name: value for name, value in (asdict(row) | {"metadata": ""}).items() if name not in unused}


def _require_no_selection(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if value:
            raise UserError(f"data.{name}: expected none, as a stream cannot choose rows; got one; remove it")


def _mix(samples: Iterator[Sample], buffer: int, rng: random.Random) -> Iterator[Sample]:
    """The samples, mixed by a buffer of this many: each leaves it at random, and the next one takes its place."""
    held: list[Sample] = []
    for sample in samples:
        if len(held) < buffer:
            held.append(sample)
            continue
        place = rng.randrange(buffer)
        yield held[place]
        held[place] = sample
    rng.shuffle(held)
    yield from held
