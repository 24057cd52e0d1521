"""Warm-up: the student must return the reference image. It learns to read the reference's tokens (NP-Edit,
section 3).

Deviations from the paper:
- the text is the reference's caption, never the edit's instruction. With the instruction the student would learn to
  ignore its text.
- the times are those of the few-step sampler, since no other time is used later. Half of the items have t = 1. The
  others have one of all times, t = 1 included. With four steps this gives t = 1 for 62.5 % of the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from npedit import flow
from npedit.data import Batch
from npedit.generator import all_references, sample_noise, seeded_generator
from npedit.nets.distributed import global_batch_size, local_slice
from npedit.nets.learner import Learner, LearnerSettings
from npedit.recipe.config import Settings
from npedit.steps.base import Parts
from npedit.steps.base import Step as Base


class CopySettings(Settings):
    """Settings of the warm-up."""

    steps: int = Field(4, ge=1, le=64)
    student: LearnerSettings = LearnerSettings()


class Step(Base):
    """Flow matching towards the reference: || v - (eps - reference) ||^2."""

    Settings = CopySettings

    def __init__(self, settings: CopySettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates)}

    @classmethod
    def requirements(cls, settings: CopySettings) -> frozenset[str]:
        """The reference's caption, which is the text."""
        return frozenset({"source_caption"})

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update on these batches. Returns what to log."""
        values: list[float] = []

        def loss(batch: Batch, micro: int) -> torch.Tensor:
            family, generator, rows = (
                self.parts.family,
                seeded_generator(self.seed, "copy", update, micro),
                global_batch_size(len(batch)),
            )
            latents = self.parts.encode_images(batch.references)
            text = self.parts.encode_text(batch.source_captions)
            times = flow.few_step_times(self.settings.steps, family.noise_shift(*batch.references.shape[-2:]))
            later = times[torch.randint(len(times), (rows,), generator=generator)]
            t = torch.where(torch.rand(rows, generator=generator) < 0.5, times[0], later)
            t, (eps,) = local_slice(t).to(latents.device), sample_noise(latents, 1, generator)
            given = all_references(latents, self.parts.encode_extra(batch))
            v = family.velocity(self.learners["student"].net, flow.add_noise(latents, eps, t), t, text, given)
            value = F.mse_loss(v.float(), flow.velocity(latents, eps).float())
            values.append(float(value.detach()))
            return value

        images = [image for b in batches for image in b.all_references()]
        with self.parts.encode_ahead([b.source_captions for b in batches], images):
            logged = self.learners["student"].update([partial(loss, b, i) for i, b in enumerate(batches)])
        return {"loss/copy": sum(values) / len(values), **{f"{k}/student": v for k, v in logged.items()}}
