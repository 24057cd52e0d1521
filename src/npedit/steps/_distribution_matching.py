"""The DMD part of NP-Edit: noise x0, predict x0 with the teacher and with the fake score, return the gradient at x0.

Both models are conditioned on the target caption. The teacher has classifier-free guidance, whose scale may depend on
the edit type. `npedit.dmd` has the equations.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from npedit import dmd, flow
from npedit.data import Batch
from npedit.errors import did_you_mean
from npedit.generator import sample_noise
from npedit.nets.distributed import all_gather, global_batch_size, local_slice
from npedit.nets.learner import Learner
from npedit.questions import EDIT_TYPES
from npedit.recipe.config import Settings
from npedit.steps.base import Parts


class DistributionMatchingSettings(Settings):
    """The teacher's guidance, and the times that x0 is noised to."""

    guidance: float = Field(3.5, ge=0)  # of the teacher
    guidance_by_type: dict[str, Annotated[float, Field(ge=0)]] = {}
    negative_prompt: str = ""
    normaliser: Literal["sample", "pixel"] = "sample"  # of DMD's gradient
    t_min: float = Field(0.02, gt=0, lt=1)  # DMD's range of times
    t_max: float = Field(0.98, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        """Check the values that depend on each other."""
        if self.t_min > self.t_max:
            raise ValueError(f"expected t_min <= t_max; got {self.t_min} and {self.t_max}")
        for name in self.guidance_by_type:
            if name not in EDIT_TYPES:
                raise ValueError(
                    f"expected edit types in guidance_by_type; got {name!r}.{did_you_mean(name, EDIT_TYPES)}"
                )
        return self


class DistributionMatching:
    """DMD's gradient at x0, from the frozen teacher and the fake score."""

    def __init__(self, settings: DistributionMatchingSettings, parts: Parts, fake: Learner):
        self.settings, self.parts, self.fake = settings, parts, fake

    @torch.no_grad()
    def __call__(
        self, batch: Batch, x0: Float[Tensor, "b c h w"], generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """`dmd.dmd_gradient` of each item, at a random time and with random noise."""
        family = self.parts.family
        t = self._sample_times(len(batch), generator).to(x0.device)
        (eps,) = sample_noise(x0, 1, generator)
        x = flow.add_noise(x0, eps, t)
        text = self.parts.encode_text(batch.target_captions)
        fake = flow.predict_x0(x, family.velocity(self.fake.net, x, t, text), t)
        real = flow.predict_x0(x, family.velocity(family.base, x, t, text), t)
        return dmd.dmd_gradient(x0, self._guide(batch, x, t, real), fake, self.settings.normaliser)

    def _sample_times(self, items: int, generator: torch.Generator) -> Tensor:
        """Times (items,), uniform in [t_min, t_max]."""
        s = self.settings
        return local_slice(s.t_min + (s.t_max - s.t_min) * torch.rand(global_batch_size(items), generator=generator))

    def _guide(self, batch: Batch, x: Tensor, t: Tensor, real: Tensor) -> Tensor:
        """The teacher's x0 with classifier-free guidance. `real` (b, c, h, w) is its x0 with the target caption."""
        s, family = self.settings, self.parts.family
        scale = torch.tensor([s.guidance_by_type.get(kind, s.guidance) for kind in batch.edit_types])
        rows = self._guided_rows(scale)
        if len(rows):
            blank = self.parts.encode_negative_text([s.negative_prompt] * len(batch)).select(rows)
            v = family.velocity(family.base, x[rows], t[rows], blank)
            unconditional = flow.predict_x0(x[rows], v, t[rows])
            real[rows] = dmd.classifier_free_guidance(real[rows], unconditional, scale[rows])
        return real

    def _guided_rows(self, scale: Tensor) -> Tensor:
        """The items for which the teacher runs without its prompt too: those whose guidance is not 1. The processes
        that share a sharded teacher must all run it, so one without such an item runs it for its first."""
        rows = (scale != 1).nonzero().flatten()
        s = self.settings
        if 1 in (s.guidance, *s.guidance_by_type.values()) and any(all_gather(len(rows) > 0)) and not len(rows):
            return torch.zeros(1, dtype=torch.long)
        return rows
