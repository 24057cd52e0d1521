"""The DMD part of NP-Edit: noise x0, predict x0 with the teacher and with the fake score, return the gradient at x0.

    gradient = (fake(x_t) - target) / w        target = T(x_t) + (g - 1) (T(x_s) - T_negative(x_s))

T is the teacher, conditioned on the target caption as the fake score is, and g is the guidance of the edit type.
`npedit.dmd` has the equations. DMD uses one time and one noise: s = t, x_s = x_t, and the target is the usual
classifier-free guidance. Decoupled DMD (arXiv 2511.22677, section 4) gives the guidance part a time s and a noise of
its own. The paper's four schedules are pairs of `matching_times` and `guidance_times`:

    coupled-shared          full, shared       DMD
    decoupled-full          full, full         as good as DMD, says the paper
    decoupled-constrained   below, below       finer details
    decoupled-hybrid        full, below        the best of the four, says the paper; Z-Image-Turbo is trained with it

"below" is the interval from `t_min` to the time at which the student made x0: above this time the student's input
has decided the picture already. Times are uniform, as with `full`. The paper's authors draw them uniform before the
base model's noise shift, and shift them.
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
from npedit.families.base import EncodedText
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
    matching_times: Literal["full", "below"] = "full"  # below: not above the time at which x0 was made
    guidance_times: Literal["shared", "full", "below"] = "shared"  # shared: the time and noise of the matching part

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
        self, batch: Batch, x0: Float[Tensor, "b c h w"], generated_at: float, generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """`dmd.dmd_gradient` of each item, at random times and with random noise. The student has made x0 in its last
        call, at the time `generated_at`."""
        s, family = self.settings, self.parts.family
        t, x = self._noised(x0, s.matching_times == "below", generated_at, generator)
        text = self.parts.encode_text(batch.target_captions)
        fake = flow.predict_x0(x, family.velocity(self.fake.net, x, t, text), t)
        target = self._teacher(x, t, text)
        if s.guidance_times == "shared":
            target = self._guide(target, batch, x, t)
        else:
            t, x = self._noised(x0, s.guidance_times == "below", generated_at, generator)
            target = self._add_guidance_part(target, batch, x, t, text)
        return dmd.dmd_gradient(x0, target, fake, s.normaliser)

    def _guide(self, target: Tensor, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's x0 (b, c, h, w) with classifier-free guidance. `target` is its conditional x0, at x and t."""
        scale, rows = self._guidance(batch)
        if len(rows):
            unconditional = self._teacher(x[rows], t[rows], self._negative(batch, rows))
            target[rows] = dmd.classifier_free_guidance(target[rows], unconditional, scale[rows])
        return target

    def _add_guidance_part(self, target: Tensor, batch: Batch, x: Tensor, t: Tensor, text: EncodedText) -> Tensor:
        """`target` (b, c, h, w) with the guidance part at x and t, which are not those of `target`."""
        scale, rows = self._guidance(batch)
        if len(rows):
            conditional = self._teacher(x[rows], t[rows], text.select(rows))
            unconditional = self._teacher(x[rows], t[rows], self._negative(batch, rows))
            target[rows] += dmd.guidance_part(conditional, unconditional, scale[rows])
        return target

    def _noised(
        self, x0: Tensor, is_below: bool, generated_at: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random times (b,), uniform between `t_min` and `t_max`, and x0 with noise of these times. `is_below` lowers
        the upper end to `generated_at`, but never below `t_min`."""
        s = self.settings
        end = max(s.t_min, min(s.t_max, generated_at)) if is_below else s.t_max
        t = s.t_min + (end - s.t_min) * torch.rand(global_batch_size(len(x0)), generator=generator)
        t = local_slice(t).to(x0.device)
        (eps,) = sample_noise(x0, 1, generator)
        return t, flow.add_noise(x0, eps, t)

    def _teacher(self, x: Tensor, t: Tensor, text: EncodedText) -> Tensor:
        """The teacher's prediction of x0, without guidance."""
        family = self.parts.family
        return flow.predict_x0(x, family.velocity(family.base, x, t, text), t)

    def _negative(self, batch: Batch, rows: Tensor) -> EncodedText:
        """The negative prompt for some items of a batch."""
        return self.parts.encode_negative_text([self.settings.negative_prompt] * len(batch)).select(rows)

    def _guidance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The guidance of each item (b,), and the items for which the teacher runs without its prompt too: those whose
        guidance is not 1. The processes that share a sharded teacher must all run it, so one without such an item runs
        it for its first."""
        s = self.settings
        scale = torch.tensor([s.guidance_by_type.get(kind, s.guidance) for kind in batch.edit_types])
        rows = (scale != 1).nonzero().flatten()
        if 1 in (s.guidance, *s.guidance_by_type.values()) and any(all_gather(len(rows) > 0)) and not len(rows):
            rows = torch.zeros(1, dtype=torch.long)
        return scale, rows
