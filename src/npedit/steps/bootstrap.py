"""Bootstrap Your Generator (ByG, arXiv 2606.03911), a baseline that needs neither pairs nor a critic.

The student learns from the base model's own velocities for the two captions of an item, and from the cycle: the reverse
instruction must give the reference back. `_bootstrap_losses.py` has the equations, and what differs from the paper.
Put a stage `reference_copy` first, as with `np_edit`. The target caption of a removal only leaves a thing out, so the
captions hardly say what to remove: there the authors' editor is weak.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field
from torch import Tensor, nn

from npedit.data import Batch
from npedit.nets.learner import Learner, LearnerSettings
from npedit.steps._bootstrap_losses import BootstrapLosses, BootstrapLossSettings
from npedit.steps.base import Parts, Timers
from npedit.steps.base import Step as Base


class BootstrapSettings(BootstrapLossSettings):
    """Settings of the baseline. The roll-outs are made with the student's EMA weights, so `student.ema` is their
    decay."""

    steps: int = Field(4, ge=1, le=64)  # of the few-step schedule, and of the roll-out
    student: LearnerSettings = LearnerSettings()


class Step(Base):
    """See the module's head."""

    Settings = BootstrapSettings

    def __init__(self, settings: BootstrapSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts = settings, parts
        self.learners = {"student": Learner(student, settings.student, updates)}
        self.losses = BootstrapLosses(settings, parts, settings.steps, seed)

    @classmethod
    def requirements(cls, settings: BootstrapSettings) -> frozenset[str]:
        """Both captions."""
        return frozenset({"source_caption", "target_caption"})

    @classmethod
    def passes_per_update(cls, settings: BootstrapSettings, items: int) -> tuple[int, int]:
        """Pictures that an update of so many items sends through the generator and through the critic."""
        return items * settings.passes(settings.steps), 0

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update of the student. Returns what to log."""
        metrics: list[dict[str, float]] = []
        learner, timers = self.learners["student"], Timers()

        def loss(batch: Batch, micro: int) -> Tensor:
            value, seen = self.losses.loss(learner.net, batch, update, micro)
            metrics.append(seen)
            return value

        prompts = [texts for batch in batches for texts in self.settings.prompts(batch)]
        images = [image for batch in batches for image in batch.all_references()]
        with self.parts.encode_ahead(prompts, images), timers("student"):
            with self.losses.with_rollouts(learner, batches, update):
                logged = learner.update([partial(loss, b, i) for i, b in enumerate(batches)])
        means = {k: sum(m[k] for m in metrics) / len(metrics) for k in metrics[0]}
        return means | {f"{k}/student": v for k, v in logged.items()} | timers.seconds
