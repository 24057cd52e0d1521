"""The toy world with its true edits: the same items as `toy`, and each one's edited image. For supervised baselines
only."""

from __future__ import annotations

from pydantic import Field

from npedit.data import PairedBatch
from npedit.data.toy import Settings as ToySettings
from npedit.data.toy import Source as ToySource
from npedit.recipe.config import Settings as Base
from npedit.toy.world import render


class Settings(Base):
    """How many pairs there are."""

    items: int = Field(0, ge=0, description="number of different pairs; 0: endless")


class Source(ToySource):
    """A stream of paired toy items; item i is the edit of `toy`'s item i, never "do nothing"."""

    has_pairs = True

    def __init__(self, settings: Settings, seed: int):
        super().__init__(ToySettings(nothing_share=0.0, items=settings.items), seed)

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> PairedBatch:
        """The index-th batch of this rank, with edited images (size, 3, 32, 32) in [0, 1]."""
        batch = super().batch(index, size, rank, world)
        edits = [
            self._sample_edit(*numbered) for numbered in self._numbered_generators((index * world + rank) * size, size)
        ]
        return PairedBatch(**vars(batch), edited=render([e.target for e in edits]))
