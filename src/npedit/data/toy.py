"""The toy world as an endless data set of scenes, instructions and captions, without edited images.

Item i is a pure function of (seed, i), and only its reference is rendered. With `items` the data set is finite: it has
so many items, beginning with `first`, and is repeated in a new random order each time. A smaller set is part of a
larger one. In scene edits, `PHOTOS` items are photos of one subject.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from pydantic import Field, field_validator
from torch import Tensor

from npedit.data import Batch, Example, collate
from npedit.data._prefetch import check_batch_key
from npedit.questions import IDENTITY_INSTRUCTIONS
from npedit.recipe.config import Settings as Base
from npedit.toy.caption_pairs import with_paired_captions
from npedit.toy.edits import EDIT_TYPES, Edit
from npedit.toy.language import questions_about
from npedit.toy.scene_edits import ALL_EDIT_TYPES, PHOTOS, SCENE, Photo, sample_item, sample_photos
from npedit.toy.world import BACKGROUNDS, CELL, COLOURS, SIDE, STYLES, render

REDRAWN = 10**12  # from one of the items that may stand at a place of the stream to the next
SUBJECTS = 64  # of a block of scene items: the photos of one subject do not stand in one batch


class Settings(Base):
    """How the toy world is sampled."""

    nothing_share: float = Field(0.01, ge=0, le=1, description="share of items turned into 'do nothing'")
    items: int = Field(0, ge=0, description="number of different items; 0: endless")
    first: int = Field(
        0, ge=0, repr=False, description="the first item's number; a start may have been trained on those before it"
    )
    edit_types: tuple[str, ...] = Field(
        EDIT_TYPES,
        min_length=1,
        repr=False,
        description="the edit types of the items: any of the toy's local ones, and `scene`",
    )
    other_photos: bool = Field(
        True, repr=False, description="of scene items: another photo of the subject is for the critic"
    )
    masks: bool = Field(
        False, repr=False, description="each item has a mask of the cells that its edit leaves as they are"
    )
    paired_captions: bool = Field(
        False, repr=False, description="the two captions of an item use the same words, and differ by the edit alone"
    )

    @field_validator("edit_types")
    @classmethod
    def _check_edit_types(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [kind for kind in kinds if kind not in ALL_EDIT_TYPES]:
            raise ValueError(f"expected edit types among {', '.join(ALL_EDIT_TYPES)}; got {', '.join(unknown)}")
        return kinds


class Source:
    """A stream of toy items in the training phrasings. There are no rows, hence no bad ones."""

    has_target_captions = True
    has_source_captions = True

    def __init__(self, settings: Settings, seed: int):
        self.settings = settings
        self.seed = seed
        self._order = lru_cache(4)(self._shuffled_order)
        self._weight: Callable[[str, str], float] | None = None

    def __len__(self) -> int:
        return self.settings.items or sys.maxsize

    @property
    def has_keep_masks(self) -> bool:
        """Whether items have masks of what must stay."""
        return self.settings.masks

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the references, in pixels."""
        return [(SIDE, SIDE)]

    @property
    def bad_rows(self) -> list[dict]:
        """Always empty: every item is drawn."""
        return []

    def texts(self) -> Iterator[tuple[str, str]]:
        """Nothing: the toy's text encoders take every text of the toy world."""
        return iter(())

    def held_out_batches(self, count: int) -> list[Batch]:
        """Nothing: the toy's benchmark has scenes and phrasings that are never trained on."""
        return []

    def fingerprint(self) -> str:
        """A hash of the settings, the first items' scenes and words, and the colours they are drawn in.

        Not of pixels: many lie halfway between two bytes, where a sum's last bit, which is the processor's, decides.
        """
        edits = [self._sample_edit(*numbered) for numbered in self._numbered_generators(0, 32)]
        facts = (self.settings, edits, SIDE, COLOURS, BACKGROUNDS, STYLES)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, 32, 32) in [0, 1].

        Ranks are disjoint, and two ranks together see what one process with twice the size sees.

        Raises:
            ValueError: a size, index or rank that cannot be.
        """
        check_batch_key(index, size, rank, world)
        numbers, rngs = zip(*self._numbered_generators((index * world + rank) * size, size), strict=True)
        edits = [self._sample_edit(number, rng) for number, rng in zip(numbers, rngs, strict=True)]
        pictures = render([e.reference for e in edits])
        others = [self._draw_other_photo(number, edit) for number, edit in zip(numbers, edits, strict=True)]
        return collate(
            [self._make_example(*parts) for parts in zip(numbers, edits, pictures, others, rngs, strict=True)]
        )

    def reweigh(self, weight: Callable[[str, str], float]) -> None:
        """Draw the items of later batches in proportion to their weights; `weight` gives the weight in (0, 1] of an id
        and its edit type. Batches stay a function of the seed and their number until the next change."""
        self._weight = weight

    def _numbered_generators(self, first: int, size: int) -> list[tuple[int, random.Random]]:
        """Which items stand at these positions of the stream, each with its own random generator."""
        numbers = [self._number_at(place) for place in range(first, first + size)]
        return [(i, self._generator(i)) for i in numbers]

    def _generator(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{number}")

    def _number_at(self, place: int) -> int:
        """The item at a place of the stream: the first of the place's candidates that is not rejected. An item is kept
        with the probability that is its weight, so items come in proportion to their weights."""
        for attempt in itertools.count():
            number = self.settings.first + self._candidate(place, attempt)
            if self._weight is None:
                return number
            kind = self._generator(number).choice(self.settings.edit_types)  # as `_sample_edit` draws it
            if random.Random(f"{self.seed}/keep/{place}/{attempt}").random() < self._weight(self._id(number), kind):
                return number
        raise AssertionError

    def _candidate(self, place: int, attempt: int) -> int:
        """An item that may stand at a place of the stream. The first one is the item without weights."""
        count = self.settings.items
        if not count:
            return place + attempt * REDRAWN
        if attempt == 0:
            return self._order(place // count)[place % count]
        return random.Random(f"{self.seed}/candidate/{place}/{attempt}").randrange(count)

    def _id(self, number: int) -> str:
        return f"{self.seed}/{number}"

    def _sample_edit(self, number: int, rng: random.Random) -> Edit:
        kind = rng.choice(self.settings.edit_types)
        edit = sample_item(rng, kind, photos=self._photos(number) if kind == SCENE else ())
        if not self.settings.paired_captions or kind == SCENE:
            return edit
        return with_paired_captions(edit, random.Random(f"{self.seed}/captions/{number}"))

    def _photos(self, number: int) -> list[Photo]:
        """The photos of an item's subject, the item's own first. Items of one subject stand `SUBJECTS` apart."""
        block, rest = divmod(number, SUBJECTS * PHOTOS)
        photo, subject = divmod(rest, SUBJECTS)
        photos = sample_photos(random.Random(f"{self.seed}/subject/{block * SUBJECTS + subject}"))
        return photos[photo:] + photos[:photo]

    def _draw_other_photo(self, number: int, edit: Edit) -> Tensor | None:
        """Another photo of the subject (3, 32, 32), which the edit's reference is not; None for other edit types."""
        if edit.edit_type != SCENE or not self.settings.other_photos:
            return None
        scene, _ = self._photos(number)[1]
        return render([scene])[0]

    def _shuffled_order(self, epoch: int) -> list[int]:
        order = list(range(self.settings.items))
        random.Random(f"{self.seed}/pass/{epoch}").shuffle(order)
        return order

    def _make_example(
        self, number: int, edit: Edit, picture: Tensor, other: Tensor | None, rng: random.Random
    ) -> Example:
        item = Example(
            id=self._id(number),
            reference=picture,
            instruction=edit.instruction,
            edit_type=edit.edit_type,
            object=edit.object,
            source_caption=edit.source_caption,
            target_caption=edit.target_caption,
            questions="" if edit.edit_type == SCENE else json.dumps(questions_about(edit)),
            other_photo=other,
            keep_mask=_keep_mask(edit) if self.settings.masks else None,
        )
        return (
            item.as_identity_edit(rng.choice(IDENTITY_INSTRUCTIONS))
            if rng.random() < self.settings.nothing_share
            else item
        )


def _keep_mask(edit: Edit) -> Tensor:
    """A mask (1, 32, 32) that is 1 in the cells that the edit leaves as they are. A thing that is added without a place
    may stand in any empty cell."""
    is_anywhere = edit.edit_type == "add" and edit.to_cell < 0
    mask = torch.ones(1, SIDE, SIDE)
    for cell in edit.reference.empty if is_anywhere else edit.changed_cells:
        top, left = CELL * (cell // 2), CELL * (cell % 2)
        mask[:, top : top + CELL, left : left + CELL] = 0
    return mask
