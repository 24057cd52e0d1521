"""The losses of Bootstrap Your Generator (ByG, arXiv 2606.03911): no pairs, and no model but the base model.

    roll-out:  y_t, y0     an edit by the EMA copy of the student, without gradient: a state of it and its end
    forward:   v = student(y_t, t | instruction, reference),        y = y_t - t v
    prior:     1 - cos(v - source, target - source) + a || v - target ||^2
               source and target: the frozen base's velocities at y_t for the two captions
    cycle:     back = student(x_t, t' | reverse instruction, y'),   || back - (eps - reference) ||^2
               x_t: the reference with noise.  y' = y0 in value, and y in gradient (`straight_through`)
    reverse:   the prior of `back` at x_t, with the captions exchanged
    identity:  || student(x_t, t' | reverse instruction, reference) - (eps - reference) ||^2

Written from public texts about the paper and from the documentation of one port (github.com/sorryhyun/anima_lora); the
paper's code is not public. What they leave open, or what differs here:
- the weights 1, 1 and 0.2 and a = 0.1 are those of the port. Squared norms are means over elements, as there.
- the roll-out is the few-step sampler with fresh noise, with which this editor is used. The paper solves the ODE. y_t
  and x_t are at times of the few-step schedule: no other time is used later. Each item has times of its own.
- the paper's reverse instructions were written by a vision-language model. Data here have none, so a template on the
  source caption stands for it. The student learns the template as a further kind of instruction.
- the identity loss is part of every update. The text of an identity edit ("do nothing") is its own instruction there.
- an item whose captions are equal has no direction, and no prior.
- the base is asked without guidance. Whether the paper's is guided is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from npedit import flow
from npedit.data import Batch
from npedit.families.base import EncodedText
from npedit.generator import all_references, sample_noise, seeded_generator
from npedit.nets.distributed import global_batch_size, local_slice
from npedit.nets.learner import Learner
from npedit.questions import IDENTITY_EDIT
from npedit.recipe.config import Settings
from npedit.steps.base import Parts

Latents = Float[Tensor, "b c h w"]


class BootstrapLossSettings(Settings):
    """Weights of the losses; with a weight of 0 for prior or identity, the passes for this loss alone are not made."""

    prior_weight: float = Field(1.0, ge=0)  # of the forward and of the reverse prior
    prior_mse: float = Field(0.1, ge=0)  # in the prior, the weight of || v - target ||^2
    cycle_weight: float = Field(1.0, ge=0)
    identity_weight: float = Field(0.2, ge=0)
    reverse_instruction: str = "change the picture to {source_caption}"

    @field_validator("reverse_instruction")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count("{source_caption}") != 1 or set("{}") & set(template.replace("{source_caption}", "")):
            raise ValueError(f"expected a text with {{source_caption}} in it once; got {template!r}")
        return template

    def reverse_instructions(self, batch: Batch) -> list[str]:
        """The instructions that ask for the reference again, given its edit."""
        return [self.reverse_instruction.replace("{source_caption}", caption) for caption in batch.source_captions]

    def identity_instructions(self, batch: Batch) -> list[str]:
        """Instructions that ask for no change of the reference."""
        texts = zip(batch.edit_types, batch.instructions, self.reverse_instructions(batch), strict=True)
        return [own if kind == IDENTITY_EDIT else reverse for kind, own, reverse in texts]

    def prompts(self, batch: Batch) -> list[Sequence[str]]:
        """All texts that the losses of a batch need."""
        captions = [batch.source_captions, batch.target_captions]
        return [batch.instructions, self.reverse_instructions(batch), self.identity_instructions(batch), *captions]

    def passes(self, steps: int) -> int:
        """How many times an item passes the generator in an update, with a roll-out of so many steps."""
        return steps + 2 + 4 * bool(self.prior_weight) + bool(self.identity_weight)


class Rollout(NamedTuple):
    """One edit by the EMA copy: the state `x` that it had at the time `t`, and its end `x0`."""

    x: Latents
    t: Float[Tensor, "b"]
    x0: Latents


def direction_cosine(v: Latents, source: Latents, target: Latents) -> Float[Tensor, "b"]:
    """The cosine between v - source and target - source, each item as one vector. It is 0 where one of them is 0."""
    return F.cosine_similarity((v - source).flatten(1), (target - source).flatten(1), dim=1)


def prior_loss(v: Latents, source: Latents, target: Latents, mse_weight: float) -> Float[Tensor, "b"]:
    """1 - cos(v - source, target - source) + mse_weight || v - target ||^2, in float32; the square is the mean."""
    v, source, target = v.float(), source.float(), target.float()
    return 1 - direction_cosine(v, source, target) + mse_weight * (v - target).square().mean((1, 2, 3))


def straight_through(value: Latents, gradient: Latents) -> Latents:
    """`value`, with the gradient of `gradient`: the paper's gradient routing."""
    return value.detach() + (gradient - gradient.detach())


class BootstrapLosses:
    """The losses of a batch. `steps` is the number of steps of the roll-out. The state is that of the learner alone."""

    def __init__(self, settings: BootstrapLossSettings, parts: Parts, steps: int, seed: int):
        self.settings, self.parts, self.steps, self.seed = settings, parts, steps, seed
        self.rollouts: list[Rollout] = []  # of this update, by batch

    @contextmanager
    def with_rollouts(self, learner: Learner, batches: Sequence[Batch], update: int) -> Iterator[None]:
        """Inside the `with` block `rollouts` has one roll-out per batch, by the learner's EMA weights."""
        with learner.use_ema_weights() as net, torch.no_grad():
            self.rollouts = [self.roll_out(net, batch, update, micro) for micro, batch in enumerate(batches)]
        try:
            yield
        finally:
            self.rollouts = []

    @torch.no_grad()
    def roll_out(self, net: nn.Module, batch: Batch, update: int, micro: int) -> Rollout:
        """One edit of each item. Its state is kept at a random time of the schedule."""
        family, generator = self.parts.family, seeded_generator(self.seed, "rollout", update, micro)
        text, references, extra = self._given(batch, batch.instructions)
        given = family.prepare_references(net, all_references(references, extra), text)
        kept, times = self._sample_times(batch, generator)
        x0, state = torch.zeros_like(references), torch.zeros_like(references)
        for i, (time, eps) in enumerate(zip(times, sample_noise(references, self.steps, generator), strict=True)):
            t = time.expand(len(batch))
            x = flow.add_noise(x0, eps, t)
            state = torch.where((kept == i).view(-1, 1, 1, 1), x, state)
            x0 = flow.predict_x0(x, family.velocity(net, x, t, text, given), t)
        return Rollout(state, times[kept], x0)

    def loss(self, net: nn.Module, batch: Batch, update: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the losses of the micro-th batch, whose roll-out is known; and what to log."""
        s, family = self.settings, self.parts.family
        generator = seeded_generator(self.seed, "bootstrap", update, micro)
        x, t, x0 = self.rollouts[micro]
        text, references, extra = self._given(batch, batch.instructions)
        v = family.velocity(net, x, t, text, all_references(references, extra))
        edit = straight_through(x0, flow.predict_x0(x, v, t))
        noisy, noisy_t, wanted = self._noised(batch, references, generator)
        text = self.parts.encode_text(s.reverse_instructions(batch))
        back = family.velocity(net, noisy, noisy_t, text, all_references(edit, extra))
        losses = {"loss/cycle": s.cycle_weight * F.mse_loss(back.float(), wanted)}
        metrics: dict[str, float] = {}
        if s.prior_weight:
            forward, metrics["prior/cosine"] = self._prior(batch, v, x, t, is_reverse=False)
            reverse, metrics["prior/cosine_reverse"] = self._prior(batch, back, noisy, noisy_t, is_reverse=True)
            losses |= {"loss/prior": s.prior_weight * forward, "loss/prior_reverse": s.prior_weight * reverse}
        if s.identity_weight:
            text = self.parts.encode_text(s.identity_instructions(batch))
            same = family.velocity(net, noisy, noisy_t, text, all_references(references, extra))
            losses["loss/identity"] = s.identity_weight * F.mse_loss(same.float(), wanted)
        total = torch.stack(list(losses.values())).sum()
        return total, metrics | {name: float(value.detach()) for name, value in losses.items()}

    def _prior(self, batch: Batch, v: Tensor, x: Tensor, t: Tensor, is_reverse: bool) -> tuple[Tensor, float]:
        """The prior's loss, the mean over the batch, and the mean cosine of the items that have a direction."""
        captions = (batch.source_captions, batch.target_captions)
        old, new = captions[::-1] if is_reverse else captions
        source, target = self._base_velocity(x, t, old), self._base_velocity(x, t, new)
        has_direction = _has_direction(batch).to(v.device)
        losses = prior_loss(v, source, target, self.settings.prior_mse)
        cosines = direction_cosine(v.detach().float(), source.float(), target.float())[has_direction]
        mean = float(cosines.mean()) if len(cosines) else 0.0
        return torch.where(has_direction, losses, 0).mean(), mean

    @torch.no_grad()
    def _base_velocity(self, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        family = self.parts.family
        return family.velocity(family.base, x, t, self.parts.encode_text(captions))

    def _given(self, batch: Batch, instructions: Sequence[str]) -> tuple[EncodedText, Tensor, Tensor | None]:
        """Encoded instructions, the references' latents, and those of further references."""
        parts = self.parts
        return parts.encode_text(instructions), parts.encode_images(batch.references), parts.encode_extra(batch)

    def _sample_times(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each item (b,) the number of a time of the few-step schedule; and the schedule (steps,)."""
        times = flow.few_step_times(self.steps, self.parts.family.noise_shift(*batch.references.shape[-2:]))
        numbers = torch.randint(self.steps, (global_batch_size(len(batch)),), generator=generator)
        return local_slice(numbers).to(self.parts.device), times.to(self.parts.device)

    def _noised(self, batch: Batch, references: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The references with noise, their times (b,), and the velocity that leads back to them, in float32."""
        numbers, times = self._sample_times(batch, generator)
        (eps,) = sample_noise(references, 1, generator)
        t = times[numbers]
        return flow.add_noise(references, eps, t), t, flow.velocity(references, eps).float()


def _has_direction(batch: Batch) -> Bool[Tensor, "b"]:
    """Which items have two captions that differ."""
    return torch.tensor([a != b for a, b in zip(batch.source_captions, batch.target_captions, strict=True)])
