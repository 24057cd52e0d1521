"""The toy world as an endless data set: scenes drawn on the way, instructions and captions, and never an edited image.

Item i is a pure function of (seed, i), and only the reference of its edit is drawn.
"""

from __future__ import annotations

import hashlib
import random
import sys

from pydantic import Field
from torch import Tensor

from npedit.config import Settings as Base
from npedit.data import Batch, Example, collate
from npedit.toy.edits import NOTHING, Edit, sample_edit
from npedit.toy.world import SIDE, render


class Settings(Base):
    """How the toy world is sampled."""

    nothing_share: float = Field(0.01, ge=0, le=1, description="share of items turned into 'do nothing'")


class Source:
    """An endless stream of toy items in the training phrasings. There are no rows, hence no bad ones."""

    has_target_captions = True
    has_source_captions = True

    def __init__(self, settings: Settings, seed: int):
        self.settings = settings
        self.seed = seed

    def __len__(self) -> int:
        return sys.maxsize

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the references, in pixels."""
        return [(SIDE, SIDE)]

    @property
    def bad_rows(self) -> list[dict]:
        """Always empty: every item is drawn."""
        return []

    def fingerprint(self) -> str:
        """A hash of the first items: it changes with the seed and with the world's drawing or language."""
        first = self.batch(0, 32)
        words = repr((first.instructions, first.edit_types, first.source_captions, first.target_captions))
        pixels = (first.references * 255).round().byte().numpy().tobytes()
        return hashlib.sha256(words.encode() + pixels).hexdigest()

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The index-th batch of this rank: references (size, 3, 32, 32) in [0, 1].

        Ranks are disjoint, and two ranks together see what one process with twice the size sees.

        Raises:
            ValueError: a size, index or rank that cannot be.
        """
        if size < 1 or index < 0 or not 0 <= rank < world:
            raise ValueError(f"expected size >= 1, index >= 0, rank < world; got {size}, {index}, {rank} of {world}")
        first = (index * world + rank) * size
        rngs = [random.Random(f"{self.seed}/{i}") for i in range(first, first + size)]
        edits = [sample_edit(rng) for rng in rngs]
        pictures = render([e.reference for e in edits])
        items = (self._example(*parts) for parts in zip(range(first, first + size), edits, pictures, rngs, strict=True))
        return collate(list(items))

    def _example(self, number: int, edit: Edit, picture: Tensor, rng: random.Random) -> Example:
        item = Example(
            id=f"{self.seed}/{number}",
            reference=picture,
            instruction=edit.instruction,
            edit_type=edit.edit_type,
            object=edit.object,
            source_caption=edit.source_caption,
            target_caption=edit.target_caption,
        )
        return item.doing_nothing(rng.choice(NOTHING)) if rng.random() < self.settings.nothing_share else item
