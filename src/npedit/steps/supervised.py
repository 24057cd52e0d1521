"""Supervised baselines, trained on pairs, for comparison with NP-Edit. The setting `loss` chooses one:

    unrolled   || x0 - encode(edited) ||^2, x0 generated in few steps as in `np_edit`: the fair few-step variant
    flow       || v - (eps - encode(edited)) ||^2 at a random time: the usual fine-tuning, few steps at inference only

`unrolled` shows what a student of this size can learn in as many updates from pairs, an upper bound for the method.
`flow` samples its times uniformly and applies the noise shift of the base model, as the base model's sampler does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from npedit import flow
from npedit.data import Batch, PairedBatch
from npedit.generator import all_references, generate_few_step, sample_noise, sample_training_times, seeded_generator
from npedit.nets.distributed import global_batch_size, local_slice
from npedit.nets.learner import Learner, LearnerSettings
from npedit.recipe.config import Settings
from npedit.steps.base import Parts
from npedit.steps.base import Step as Base


class SupervisedSettings(Settings):
    """Settings of the baselines."""

    loss: Literal["unrolled", "flow"] = "unrolled"
    steps: int = Field(4, ge=1, le=64)
    student: LearnerSettings = LearnerSettings()


class Step(Base):
    """See the module's head."""

    Settings = SupervisedSettings

    def __init__(self, settings: SupervisedSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates)}

    @classmethod
    def requirements(cls, settings: SupervisedSettings) -> frozenset[str]:
        """The edited images: a data source of pairs."""
        return frozenset({"edited"})

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update on batches that hold the edited images."""
        values: list[float] = []
        edited = [_edited_images(batch) for batch in batches]

        def loss(batch: Batch, micro: int) -> Tensor:
            generator, encode = seeded_generator(self.seed, "supervised", update, micro), self.parts.encode_images
            references, wanted = encode(batch.references), encode(edited[micro])
            how = self._few_step_loss if self.settings.loss == "unrolled" else self._flow_matching_loss
            value = how(batch, references, wanted, update, generator)
            values.append(float(value.detach()))
            return value

        references = [image for b in batches for image in b.all_references()]
        with self.parts.encode_ahead([b.instructions for b in batches], references + edited):
            logged = self.learners["student"].update([partial(loss, b, i) for i, b in enumerate(batches)])
        return {"loss/supervised": sum(values) / len(values), **{f"{k}/student": v for k, v in logged.items()}}

    def _few_step_loss(
        self, batch: Batch, references: Tensor, wanted: Tensor, update: int, generator: torch.Generator
    ) -> Tensor:
        family, net = self.parts.family, self.learners["student"].net
        schedule = flow.few_step_times(self.settings.steps, family.noise_shift(*batch.references.shape[-2:]))
        times = sample_training_times(schedule, seeded_generator(self.seed, "times", update))
        text, noise = self.parts.encode_text(batch.instructions), sample_noise(references, len(times), generator)
        extra = self.parts.encode_extra(batch)
        return F.mse_loss(generate_few_step(family, net, text, references, times, noise, extra), wanted)

    def _flow_matching_loss(
        self, batch: Batch, references: Tensor, wanted: Tensor, update: int, generator: torch.Generator
    ) -> Tensor:
        family, net = self.parts.family, self.learners["student"].net
        even = local_slice(torch.rand(global_batch_size(len(batch)), generator=generator))
        t = flow.shift_times(even, family.noise_shift(*batch.references.shape[-2:])).to(wanted.device)
        text, (eps,) = self.parts.encode_text(batch.instructions), sample_noise(wanted, 1, generator)
        given = all_references(references, self.parts.encode_extra(batch))
        v = family.velocity(net, flow.add_noise(wanted, eps, t), t, text, given)
        return F.mse_loss(v.float(), flow.velocity(wanted, eps).float())


def _edited_images(batch: Batch) -> Tensor:
    """The wanted results (b, 3, H, W) of a batch, on the device of its references.

    Raises:
        TypeError: the batch has none.
    """
    if not isinstance(batch, PairedBatch):
        raise TypeError(
            f"expected batches with edited images, such as those of data toy_pairs; got {type(batch).__name__}"
        )
    return batch.edited.to(batch.references)
