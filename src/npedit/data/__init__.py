"""Training data: `Example` and `Batch`, and the sources that make them (`imagefolder`, `toy`).

`Batch` has no field for an edited image, and no source of `Batch` opens one. Only `toy_pairs` makes `PairedBatch`,
which is for supervised baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from npedit.questions import IDENTITY_EDIT


@dataclass(frozen=True)
class Example:
    """One training example. `reference` is (3, H, W) in [0, 1]. A caption that the data set does not have is ""."""

    id: str
    reference: Tensor
    instruction: str
    edit_type: str
    object: str
    source_caption: str
    target_caption: str

    def as_identity_edit(self, instruction: str) -> Example:
        """The example with an instruction to change nothing. Its target caption is the reference's caption."""
        return Example(
            self.id,
            self.reference,
            instruction,
            IDENTITY_EDIT,
            "",
            self.source_caption,
            self.source_caption or self.target_caption,
        )


@dataclass(frozen=True)
class Batch:
    """References (b, 3, H, W) of one size, and the texts of each example."""

    ids: tuple[str, ...]
    references: Tensor
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[str, ...]
    source_captions: tuple[str, ...]
    target_captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Self:
        """The items from `start` to before `stop`, as a batch."""
        return replace(self, **{name: column[start:stop] for name, column in vars(self).items()})


@dataclass(frozen=True)
class PairedBatch(Batch):
    """A batch with the true edited images (b, 3, H, W). No step of NP-Edit takes one."""

    edited: Tensor


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """The batch of examples whose references have one size."""
    return Batch(
        ids=tuple(e.id for e in examples),
        references=torch.stack([e.reference for e in examples]).to(device),
        instructions=tuple(e.instruction for e in examples),
        edit_types=tuple(e.edit_type for e in examples),
        objects=tuple(e.object for e in examples),
        source_captions=tuple(e.source_caption for e in examples),
        target_captions=tuple(e.target_caption for e in examples),
    )
