"""NP-Edit with a second signal without pairs: the losses of Bootstrap Your Generator are added to the student's.

    loss = loss of NP-Edit + bootstrap_weight * losses of Bootstrap Your Generator

`np_edit.py` and `_bootstrap_losses.py` have the two. The roll-outs are made with the student's EMA weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field
from torch import Tensor, nn

from npedit.data import Batch
from npedit.steps import np_edit
from npedit.steps._bootstrap_losses import BootstrapLosses, BootstrapLossSettings
from npedit.steps.base import Parts, Timers


class NpEditBootstrapSettings(np_edit.NpEditSettings):
    """The settings of `np_edit`, and those of the added losses."""

    bootstrap_weight: float = Field(1.0, gt=0)
    bootstrap: BootstrapLossSettings = BootstrapLossSettings()


class Step(np_edit.Step):
    """See the module's head."""

    Settings = NpEditBootstrapSettings

    def __init__(self, settings: NpEditBootstrapSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        super().__init__(settings, parts, student, updates, seed)
        self.weight = settings.bootstrap_weight
        self.bootstrap = BootstrapLosses(settings.bootstrap, parts, settings.steps, seed)

    @classmethod
    def requirements(cls, settings: np_edit.NpEditSettings) -> frozenset[str]:
        """Those of `np_edit`, and both captions."""
        return super().requirements(settings) | {"source_caption", "target_caption"}

    def _further_prompts(self, of_student: Sequence[Batch]) -> list[tuple[str, ...]]:
        return [tuple(texts) for batch in of_student for texts in self.bootstrap.settings.prompts(batch)]

    def _update_student(self, batches: Sequence[Batch], update: int, timers: Timers) -> dict[str, float]:
        with self.bootstrap.with_rollouts(self.learners["student"], batches, update):
            return super()._update_student(batches, update, timers)

    def _student_losses(self, batch: Batch, update: int, micro: int, timers: Timers) -> list[np_edit.LossFn]:
        return [
            *super()._student_losses(batch, update, micro, timers),
            partial(self._bootstrap_loss, batch, update, micro),
        ]

    def _bootstrap_loss(self, batch: Batch, update: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        added, losses = self.bootstrap.loss(self.learners["student"].net, batch, update, micro)
        return self.weight * added, losses
