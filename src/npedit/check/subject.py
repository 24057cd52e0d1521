"""What is checked: a recipe with its data, its opened models, and a sample of its examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npedit.data import Batch, Example
from npedit.questions import IDENTITY_EDIT
from npedit.recipe.config import Recipe, Stage
from npedit.steps.base import Parts
from npedit.training.parts import load_start_weights

Size = tuple[int, int]


@dataclass(frozen=True)
class CheckOptions:
    """How much is checked: `samples` examples are decoded and shown to the models, at most `rows` rows of text are
    read. `labelled` is a folder of edits with known answers (`labelled_edits.py`)."""

    samples: int = 48
    rows: int = 20_000
    labelled: Path | None = None


@dataclass
class Subject:
    """See the module's head. `examples` are the first `samples` examples of training, without those that are turned
    into "do nothing"."""

    recipe: Recipe
    data: Any
    parts: Parts
    options: CheckOptions
    examples: list[Example] = field(default_factory=list)
    _student: nn.Module | None = None

    def student(self) -> nn.Module:
        """The student as training starts with it; the same object at every call, as a role has one adapter at a
        time."""
        if self._student is None:
            self._student = self.parts.create_trainable("student", self.recipe.seed)
            load_start_weights(self.recipe, self.parts, self._student)
        return self._student

    @property
    def editing_stage(self) -> Stage | None:
        """The last stage that asks the critic with gradient (np_edit); None if the recipe has none."""
        stages = [s for s in self.recipe.stages if hasattr(s.settings, "critic_weight")]
        return stages[-1] if stages else None


def read_examples(data: Any, count: int) -> list[Example]:
    """At most `count` different examples of a data source, as training sees them.

    Raises:
        UserError: too many photos cannot be read.
    """
    found: dict[str, Example] = {}
    for index in range(4 * count):
        for example in split_batch(data.batch(index, 1)):
            if example.edit_type != IDENTITY_EDIT:
                found.setdefault(example.id, example)
        if len(found) >= min(count, len(data)):
            break
    return list(found.values())


def split_batch(batch: Batch) -> Iterator[Example]:
    """The examples of a batch, without masks and further references."""
    columns = (batch.instructions, batch.edit_types, batch.objects, batch.source_captions, batch.target_captions)
    rubrics = batch.questions or ("",) * len(batch)
    others = batch.references if batch.other_photos is None else batch.other_photos
    pictures = zip(batch.references, others, strict=True)
    for key, (reference, other), rubric, *texts in zip(batch.ids, pictures, rubrics, *columns, strict=True):
        other_photo = None if torch.equal(other, reference) else other
        yield replace(Example(key, reference, *texts), questions=rubric, other_photo=other_photo)
