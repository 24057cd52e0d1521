"""Training data: `Example` and `Batch`, and the sources that make them (`imagefolder`, `toy`).

`Batch` has no field for an edited image, and no source of `Batch` opens one. Only `toy_pairs` makes `PairedBatch`,
which is for supervised baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from npedit.questions import IDENTITY_EDIT


@dataclass(frozen=True)
class Example:
    """One training example. `reference` is (3, H, W) in [0, 1], and so is each of `extra_references`. A caption that
    the data set does not have is "". `questions` is JSON, a list of {"question": text, "answer": "yes" or "no"}, or "".
    """

    id: str
    reference: Tensor
    instruction: str
    edit_type: str
    object: str
    source_caption: str
    target_caption: str
    extra_references: tuple[Tensor, ...] = ()
    questions: str = ""

    def as_identity_edit(self, instruction: str) -> Example:
        """The example with an instruction to change nothing. Its target caption is the reference's caption."""
        return replace(
            self,
            instruction=instruction,
            edit_type=IDENTITY_EDIT,
            object="",
            target_caption=self.source_caption or self.target_caption,
            questions="",
        )


@dataclass(frozen=True)
class Batch:
    """References (b, 3, H, W) of one size, and the texts of each example. `extra_references` (b, k, 3, H, W) are
    further reference images, None where examples have one reference each. `questions` are as in `Example`."""

    ids: tuple[str, ...]
    references: Tensor
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[str, ...]
    source_captions: tuple[str, ...]
    target_captions: tuple[str, ...]
    extra_references: Tensor | None = None
    questions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def all_references(self) -> list[Tensor]:
        """The references, and the further references if there are any, as one tensor each."""
        return [self.references, *([] if self.extra_references is None else [self.extra_references])]

    def to(self, device: torch.device) -> Self:
        """The batch with its references on a device."""
        extra = None if self.extra_references is None else self.extra_references.to(device)
        return replace(self, references=self.references.to(device), extra_references=extra)

    def slice(self, start: int, stop: int) -> Self:
        """The items from `start` to before `stop`, as a batch."""
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return replace(self, **{name: column[start:stop] for name, column in columns.items()})


@dataclass(frozen=True)
class PairedBatch(Batch):
    """A batch with the true edited images (b, 3, H, W). No step of NP-Edit takes one."""

    edited: Tensor = field(kw_only=True)


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """The batch of examples whose references have one size and one number."""
    extra = [torch.stack(e.extra_references) for e in examples if e.extra_references]
    return Batch(
        ids=tuple(e.id for e in examples),
        references=torch.stack([e.reference for e in examples]).to(device),
        instructions=tuple(e.instruction for e in examples),
        edit_types=tuple(e.edit_type for e in examples),
        objects=tuple(e.object for e in examples),
        source_captions=tuple(e.source_caption for e in examples),
        target_captions=tuple(e.target_caption for e in examples),
        extra_references=torch.stack(extra).to(device) if extra else None,
        questions=tuple(e.questions for e in examples),
    )
