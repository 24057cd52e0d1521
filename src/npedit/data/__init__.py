"""Training data: `Example` and `Batch`, and the sources that make them (`imagefolder`, `toy`).

`Batch` has no field for an edited image, and no source of `Batch` opens one. Only `toy_pairs` makes `PairedBatch`,
which is for supervised baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from npedit.questions import IDENTITY_EDIT


@dataclass(frozen=True)
class Example:
    """One training example. `reference` is (3, H, W) in [0, 1], and so is each of `extra_references`. A caption that
    the data set does not have is "". `questions` is JSON or "": a list of {"question": text, "answer": "yes" or "no"},
    with "images": "both" if a question looks at the reference too.

    `other_photo` (3, H, W) in [0, 1] is another photo of the subject, for the critic alone. `keep_mask` (1, H, W) in
    [0, 1] is 1 where the edited image must stay as the reference is. Both are None where the data set has none.
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
    other_photo: Tensor | None = None
    keep_mask: Tensor | None = None

    def as_identity_edit(self, instruction: str) -> Example:
        """The example with an instruction to change nothing. Its target caption is the reference's caption."""
        return replace(
            self,
            instruction=instruction,
            edit_type=IDENTITY_EDIT,
            object="",
            target_caption=self.source_caption or self.target_caption,
            questions="",
            other_photo=None,
            keep_mask=None,
        )


@dataclass(frozen=True)
class Batch:
    """References (b, 3, H, W) of one size, and the texts of each example. `extra_references` (b, k, 3, H, W) are
    further reference images, None where examples have one reference each. `questions` are as in `Example`.

    `other_photos` (b, 3, H, W) are other photos of the subjects, for the critic alone; an example that has none has its
    reference there. `keep_mask` (b, 1, H, W) is 1 where the edited image must stay as the reference is; an example
    that has none has zeros there. Both are None where no example has one.
    """

    ids: tuple[str, ...]
    references: Tensor
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[str, ...]
    source_captions: tuple[str, ...]
    target_captions: tuple[str, ...]
    extra_references: Tensor | None = None
    questions: tuple[str, ...] = ()
    other_photos: Tensor | None = None
    keep_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def all_references(self) -> list[Tensor]:
        """The references, and the further references if there are any, as one tensor each."""
        return [self.references, *([] if self.extra_references is None else [self.extra_references])]

    def to(self, device: torch.device) -> Self:
        """The batch with its images on a device."""
        moved: dict[str, Any] = {name: c.to(device) for name, c in vars(self).items() if isinstance(c, Tensor)}
        return replace(self, **moved)

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
    others = [e.reference if e.other_photo is None else e.other_photo for e in examples]
    masks = [torch.zeros_like(e.reference[:1]) if e.keep_mask is None else e.keep_mask for e in examples]
    has_others, has_masks = (any(getattr(e, n) is not None for e in examples) for n in ("other_photo", "keep_mask"))
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
        other_photos=torch.stack(others).to(device) if has_others else None,
        keep_mask=torch.stack(masks).to(device) if has_masks else None,
    )
