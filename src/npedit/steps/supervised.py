"""The supervised bound: the same few-step unroll, regressed on the true edited image. A baseline on pairs, not NP-Edit.

It shows what a student of this size can learn in as many updates when it is told the answer, and so what limits the
method.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from npedit import flow
from npedit.config import Settings
from npedit.data import Batch, PairedBatch
from npedit.generator import draft, fresh_noise, seeded, training_times
from npedit.learner import Learner, LearnerSettings
from npedit.steps.base import Parts
from npedit.steps.base import Step as Base


class SupervisedSettings(Settings):
    """Settings of the baseline."""

    steps: int = Field(4, ge=1, le=64)
    student: LearnerSettings = LearnerSettings()


class Step(Base):
    """|| draft - encode(edited) ||^2, the draft unrolled as in `np_edit`."""

    Settings = SupervisedSettings

    def __init__(self, settings: SupervisedSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates)}

    @classmethod
    def needs(cls, settings: Settings) -> frozenset[str]:
        """Pairs: a data source whose batches hold the edited image."""
        return frozenset({"edited"})

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update on batches that hold the edited images."""
        values: list[float] = []

        def loss(batch: Batch, micro: int) -> Tensor:
            if not isinstance(batch, PairedBatch):
                raise TypeError(
                    f"expected batches with edited images, as data toy_pairs gives; got {type(batch).__name__}"
                )
            family, generator = self.parts.family, seeded(self.seed, "supervised", update, micro)
            encode = self.parts.encode
            references, wanted = encode(batch.references), encode(batch.edited.to(batch.references))
            schedule = flow.few_step_times(self.settings.steps, family.shift(*batch.references.shape[-2:]))
            times = training_times(schedule, seeded(self.seed, "times", update))
            text, noise = self.parts.text(batch.instructions), fresh_noise(references, len(times), generator)
            value = F.mse_loss(draft(family, self.learners["student"].net, text, references, times, noise), wanted)
            values.append(float(value.detach()))
            return value

        logged = self.learners["student"].update([lambda b=b, i=i: loss(b, i) for i, b in enumerate(batches)])
        return {"loss/supervised": sum(values) / len(values), **{f"{k}/student": v for k, v in logged.items()}}
