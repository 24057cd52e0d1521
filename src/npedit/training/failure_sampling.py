"""Sampling by failure (`trainer.by_failure`): what the critic still finds wrong comes more often.

    error  = running mean of 1 - p(wanted answer), over the critic's questions about an item, in training
    weight = floor + (1 - floor) * error

An item of a finite data set has an error of its own once it has been seen. Before that, and in an endless data set, it
has the error of its edit type. The data source draws items in proportion to their weights (`reweigh`).

The weights change every `every` updates and are constant in between. So the items of an update are a function of the
seed, the update and the state that a checkpoint holds, and a resumed run draws the same ones. All processes gather the
errors of the global batch, so they have the same weights.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.questions import IDENTITY_EDIT
from npedit.recipe.config import FailureSampling, Recipe, find_class
from npedit.steps.base import Step

TYPE_RATE = 0.02  # a type's error is about that of its last 50 items
ITEM_RATE = 0.5  # an item comes rarely, and the student has changed since
PREFIX = "by_failure/"  # of the tensors in a checkpoint


@dataclass
class ErrorRecord:
    """Running means of the errors: by edit type, and by the ids of items."""

    types: dict[str, float] = field(default_factory=dict)
    items: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, edit_type: str, error: float, with_item: bool) -> None:
        """Take the error of one item into the means. An identity edit may be another task than the item's own edit, so
        its error counts for its type alone. An error that is not a number says nothing and is left out."""
        if not math.isfinite(error):
            return
        self.types[edit_type] = _moved(self.types.get(edit_type), error, TYPE_RATE)
        if with_item and edit_type != IDENTITY_EDIT:
            self.items[name] = _moved(self.items.get(name), error, ITEM_RATE)

    def error(self, name: str, edit_type: str) -> float:
        """The error of an item; 1 if neither the item nor its type has been seen."""
        return self.items.get(name, self.types.get(edit_type, 1.0))

    def copy(self) -> ErrorRecord:
        """A record that later errors do not change."""
        return ErrorRecord(dict(self.types), dict(self.items))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The record as tensors, to be saved."""
        return {
            f"{prefix}{part}.{what}": tensor
            for part, errors in (("types", self.types), ("items", self.items))
            if errors  # not every writer of checkpoints takes empty tensors
            for what, tensor in (("names", _to_bytes(errors)), ("errors", _to_floats(errors.values())))
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], prefix: str) -> ErrorRecord:
        """The record that `state` returned; an empty one if the tensors hold none."""
        return cls(*(_read_errors(tensors, f"{prefix}{part}.") for part in ("types", "items")))


class FailureSampler:
    """Observes the critic's errors, and gives the data source its weights. Without `trainer.by_failure` it does
    nothing."""

    def __init__(self, settings: FailureSampling | None, data: Any):
        self.settings, self.data = settings, data
        self.record = ErrorRecord()
        self.in_use = ErrorRecord()  # what the data source's weights are computed from
        self.has_items = settings is not None and len(data) < sys.maxsize

    def observe(self, step: Step) -> None:
        """Take the errors of an update's global batches into the record."""
        if self.settings is None:
            return
        of_processes = distributed.all_gather(list(step.item_errors))
        for batches in zip(*of_processes, strict=True):
            for errors in batches:  # by rank: the order of the global batch
                for one in zip(errors.ids, errors.edit_types, errors.errors, strict=True):
                    self.record.add(*one, with_item=self.has_items)

    def before_update(self, done: int) -> None:
        """Give the data source new weights if it is time; `done` is the number of updates made so far."""
        if self.settings is not None and done % self.settings.every == 0:
            self._use(self.record.copy())

    def weight(self, name: str, edit_type: str) -> float:
        """The weight of an item, in [floor, 1]."""
        floor = self.settings.floor if self.settings else 1.0
        return floor + (1 - floor) * self.in_use.error(name, edit_type)

    def metrics(self) -> dict[str, float]:
        """The error of each edit type that the weights in use come from."""
        return {f"by_failure/error/{name}": error for name, error in sorted(self.in_use.types.items())}

    def state(self) -> dict[str, Tensor]:
        """The record and the weights in use, for a checkpoint."""
        if self.settings is None:
            return {}
        return self.record.state(f"{PREFIX}record.") | self.in_use.state(f"{PREFIX}in_use.")

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self.settings is None:
            return
        self.record = ErrorRecord.from_state(tensors, f"{PREFIX}record.")
        self._use(ErrorRecord.from_state(tensors, f"{PREFIX}in_use."))

    def _use(self, record: ErrorRecord) -> None:
        self.in_use = record
        if record.types:  # before the first errors all items are equal
            self.data.reweigh(self.weight)


def check_failure_sampling(recipe: Recipe, data: Any) -> None:
    """Refuse sampling by failure where nothing says what fails, or where items cannot be chosen.

    Raises:
        UserError: no stage asks the critic about each item, or the data are a stream.
    """
    if recipe.trainer.by_failure is None:
        return
    if not any(_reports_errors(stage.step, stage.settings) for stage in recipe.stages):
        raise UserError(
            "trainer.by_failure: expected a stage whose critic says which items fail (np_edit with critic_weight above "
            f"0); got {', '.join(s.step for s in recipe.stages)}; add one, or set trainer.by_failure to null"
        )
    if not hasattr(data, "reweigh"):
        raise UserError(
            f"trainer.by_failure: expected data whose items can be chosen; got {recipe.data.name} that is read as a "
            "stream; set data.streaming to false, or trainer.by_failure to null"
        )


def _reports_errors(step: str, settings: Any) -> bool:
    kind = find_class("steps", step)
    return kind.reports_item_errors and "critic" in kind.requirements(settings)


def _moved(old: float | None, new: float, rate: float) -> float:
    return new if old is None else old + rate * (new - old)


def _read_errors(tensors: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """The errors of one part of a record, by their names; none if the tensors hold none."""
    names, errors = tensors.get(f"{prefix}names"), tensors.get(f"{prefix}errors")
    if names is None or errors is None:
        return {}
    return dict(zip(json.loads(bytes(names.tolist())), errors.tolist(), strict=True))


def _to_bytes(names: Iterable[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)


def _to_floats(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
