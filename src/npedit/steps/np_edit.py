"""NP-Edit's training step: one student update from the critic's answers and from DMD, then N fake score updates.

    once:     x0 = few-step edit, with gradient
              critic: -log p(wanted answer) of each question, through the decoder to x0
              DMD: (fake - teacher) / w at a random time, both conditioned on the target caption
              identity edits ("do nothing"): the identity question alone, and || x0 - reference ||^2
    N times:  x0 = few-step edit, without gradient; or with `fake_samples: replay`, one of the last updates' edits
              fake score: flow matching on x0, conditioned on the target caption

Source: NP-Edit (arXiv 2510.14978), section 3 and its algorithm. Deviations:
- both gradients are taken at x0 and added there. The sum is the same, and the two can be logged and balanced. With
  `balance: match` the critic's gradient is scaled until its running norm is `critic_weight` times DMD's. With
  `balance: item` each item's gradient is scaled, in proportion to how wrong the critic finds the item.
- the reference's visual tokens are computed once per batch, without gradient.
- the first fake score update uses the x0 that the student has just made, which saves one of N + 1 generations. The
  other updates use further batches. With `fake_samples: replay` they use what the student made in its last
  `replay_updates` updates, with new noise and times, which saves all of these generations.
- with `keep_weight`, the region that must stay as it is gets the copy loss too, where the data have a mask of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from npedit import dmd, flow
from npedit.data import Batch
from npedit.generator import generate_few_step, sample_noise, sample_training_times, seeded_generator
from npedit.nets.distributed import global_batch_size, local_slice, norm_over_global_batch
from npedit.nets.learner import Learner, LearnerSettings
from npedit.questions import IDENTITY_EDIT
from npedit.steps._critic_gradient import CriticGradient, CriticGradientSettings
from npedit.steps._distribution_matching import DistributionMatching, DistributionMatchingSettings
from npedit.steps._gradient_balance import Balance, GradientBalance
from npedit.steps._replay import ReplayBuffer, Samples
from npedit.steps.base import ItemErrors, Parts, Timers
from npedit.steps.base import Step as Base

LossFn = Callable[[], tuple[Tensor, dict[str, float]]]  # computes a loss, a scalar, and what to log


class NpEditSettings(DistributionMatchingSettings, CriticGradientSettings):
    """Settings of the method. A weight of zero switches its part off, and models for this part alone are not loaded."""

    steps: int = Field(4, ge=1, le=64)  # of the few-step schedule
    dmd_weight: float = Field(1.0, ge=0)
    copy_weight: float = Field(1.0, ge=0)
    keep_weight: float = Field(0.0, ge=0)  # of the copy loss in the region that must stay, where the data have masks
    balance: Balance = "none"  # of the critic's gradient with DMD's
    fake_updates: int = Field(5, ge=1, le=50)
    fake_samples: Literal["fresh", "replay"] = "fresh"  # what fake score updates after the first are trained on
    replay_updates: int = Field(4, ge=1, le=64)  # with replay: updates whose samples are kept; at most fake_updates
    student: LearnerSettings = LearnerSettings()
    fake: LearnerSettings = LearnerSettings()


class Step(Base):
    """See the module's head."""

    Settings = NpEditSettings
    reports_item_errors = True

    def __init__(self, settings: NpEditSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates)}
        if settings.dmd_weight:
            self.learners["fake"] = Learner(
                parts.create_trainable("fake", seed), settings.fake, updates * settings.fake_updates
            )
            self.distribution_matching = DistributionMatching(settings, parts, self.learners["fake"])
        self.critic_gradient = CriticGradient(settings, parts)
        self.balance = GradientBalance(settings.balance, settings.critic_weight, has_dmd=bool(settings.dmd_weight))
        self.item_errors: list[ItemErrors] = []
        self.student_samples: list[Samples] = []  # the student's output in this update, by batch
        kept = min(settings.replay_updates, settings.fake_updates)  # no turn goes back further
        self.replay = ReplayBuffer(kept if settings.fake_samples == "replay" else 1, parts.device)

    @classmethod
    def batches_per_update(cls, settings: NpEditSettings) -> int:
        """One batch for the student, and one for each fake score update that needs fresh samples: those after the
        first."""
        return settings.fake_updates if settings.dmd_weight and settings.fake_samples == "fresh" else 1

    @classmethod
    def requirements(cls, settings: NpEditSettings) -> frozenset[str]:
        """The critic, unless its weight is zero, the target caption, unless DMD's weight is zero, and masks, if the
        keep loss has a weight."""
        weights = {"critic": settings.critic_weight, "target_caption": settings.dmd_weight}
        weights["keep_mask"] = settings.keep_weight
        return frozenset(need for need, weight in weights.items() if weight)

    @classmethod
    def check_parts(cls, settings: NpEditSettings, parts: Parts) -> None:
        """Refuse a critic that cannot answer what it is asked. Errors as in `CriticGradient`."""
        CriticGradient(settings, parts)

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One student update and `fake_updates` fake score updates. Returns what to log."""
        per_update = self.batches_per_update(self.settings)
        groups = [batches[i::per_update] for i in range(per_update)]
        timers = Timers()
        logged: dict[str, float] = {}
        with self._encode_ahead(batches, groups[0]):
            with timers("student"):
                logged |= self._update_student(groups[0], update, timers)
            if self.settings.dmd_weight:
                with timers("fake"):
                    for turn in range(self.settings.fake_updates):
                        logged |= self._update_fake_score(groups, update, turn)
        self.student_samples = []
        return logged | timers.seconds

    def _encode_ahead(self, batches: Sequence[Batch], of_student: Sequence[Batch]) -> AbstractContextManager[None]:
        """`Parts.encode_ahead` for all texts and references of an update."""
        has_dmd = bool(self.settings.dmd_weight)
        prompts = [b.instructions for b in batches] + [b.target_captions for b in batches if has_dmd]
        prompts += [*self.replay.local_captions(), *self._further_prompts(of_student)]
        negative = [[self.settings.negative_prompt] * len(b) for b in of_student if has_dmd]
        return self.parts.encode_ahead(prompts, [image for b in batches for image in b.all_references()], negative)

    def _further_prompts(self, of_student: Sequence[Batch]) -> list[tuple[str, ...]]:
        """Further texts that the student's update needs. There are none here; a step that adds a loss has its own."""
        return []

    # ------------------------------------------------------------------------------------------------ fake score

    def _update_fake_score(self, groups: Sequence[Sequence[Batch]], update: int, turn: int) -> dict[str, float]:
        values: list[float] = []
        replayed = self._replayed_samples(turn)

        def loss(micro: int) -> Tensor:
            family, generator = self.parts.family, seeded_generator(self.seed, "fake", update, turn, micro)
            with torch.no_grad():
                samples = replayed[micro] if replayed else self._fresh_samples(groups[turn][micro], update, generator)
            x0, rows = samples.x0, len(samples.captions)
            t = local_slice(torch.rand(global_batch_size(rows), generator=generator)).to(x0.device)
            (eps,) = sample_noise(x0, 1, generator)
            v = family.velocity(
                self.learners["fake"].net, flow.add_noise(x0, eps, t), t, self.parts.encode_text(samples.captions)
            )
            value = dmd.fake_score_loss(v, x0, eps)
            values.append(float(value.detach()))
            return value

        logged = self.learners["fake"].update([partial(loss, i) for i in range(len(replayed or groups[turn]))])
        return {"loss/fake": sum(values) / len(values), **{f"{k}/fake": v for k, v in logged.items()}}

    def _replayed_samples(self, turn: int) -> list[Samples]:
        """The samples that a fake score update need not make: the student's of this update for the first; with replay,
        those of `turn` updates ago for the others. Else none."""
        if turn == 0:
            return self.student_samples
        is_replay = self.settings.fake_samples == "replay"
        return (self.replay.local_samples(turn) or self.student_samples) if is_replay else []

    def _fresh_samples(self, batch: Batch, update: int, generator: torch.Generator) -> Samples:
        return Samples(self._generate(batch, update, generator), batch.target_captions)

    # --------------------------------------------------------------------------------------------------- student

    def _update_student(self, batches: Sequence[Batch], update: int, timers: Timers) -> dict[str, float]:
        metrics: list[dict[str, float]] = []
        self.item_errors = []

        def value(loss: LossFn) -> Tensor:
            found, seen = loss()
            metrics.append(seen)
            return found * (len(losses) / len(batches))  # the learner takes the mean of all

        losses = [loss for i, b in enumerate(batches) for loss in self._student_losses(b, update, i, timers)]
        logged = self.learners["student"].update([partial(value, loss) for loss in losses])
        if self.settings.dmd_weight and self.settings.fake_samples == "replay":
            self.replay.add(self.student_samples)
        self.balance.end_update()
        keys = {k for m in metrics for k in m}
        means = {k: sum(m[k] for m in metrics if k in m) / sum(k in m for m in metrics) for k in sorted(keys)}
        return means | {f"{k}/student": v for k, v in logged.items()}

    def _student_losses(self, batch: Batch, update: int, micro: int, timers: Timers) -> list[LossFn]:
        """The losses of the micro-th batch. They are added up, and each is differentiated by itself, so that only one
        has its graph in memory."""
        return [partial(self._student_loss, batch, update, micro, timers)]

    def _student_loss(self, batch: Batch, update: int, micro: int, timers: Timers) -> tuple[Tensor, dict[str, float]]:
        """A scalar with the gradient of the micro-th batch's losses, and what to log."""
        generator = seeded_generator(self.seed, "student", update, micro)
        with timers("draft"):
            references = self.parts.encode_images(batch.references)
            x0 = self._generate(batch, update, generator, references)
        self.student_samples.append(Samples(x0.detach(), batch.target_captions))
        gradient, seen = self._gradient_at_x0(batch, references, x0.detach(), update, generator, timers)
        return (x0.float() * gradient).sum(), seen  # the gradient of this sum at x0 is `gradient`

    def _generate(
        self, batch: Batch, update: int, generator: torch.Generator, references: Tensor | None = None
    ) -> Tensor:
        family, net = self.parts.family, self.learners["student"].net
        if references is None:
            references = self.parts.encode_images(batch.references)
        text, times = self.parts.encode_text(batch.instructions), self._sample_times(batch, update)
        noise, extra = sample_noise(references, len(times), generator), self.parts.encode_extra(batch)
        return generate_few_step(family, net, text, references, times, noise, extra)

    def _sample_times(self, batch: Batch, update: int) -> list[float]:
        """The times at which the student is called in this update, equal on all ranks."""
        shift = self.parts.family.noise_shift(*batch.references.shape[-2:])
        schedule = flow.few_step_times(self.settings.steps, shift)
        return sample_training_times(schedule, seeded_generator(self.seed, "times", update))

    def _gradient_at_x0(
        self, batch: Batch, references: Tensor, x0: Tensor, update: int, generator: torch.Generator, timers: Timers
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum of the weighted losses' gradients with respect to x0 (b, c, h, w), and what to log."""
        from_dmd, metrics = self._from_dmd(batch, x0, update, generator, timers)
        from_critic, answered = self._from_critic(batch, x0, from_dmd, update, timers)
        metrics |= answered
        metrics["grad_norm/from_dmd"] = float(norm_over_global_batch(from_dmd))
        metrics["grad_norm/from_critic"] = float(norm_over_global_batch(from_critic))
        from_copy, copied = self._from_copy(batch, references, x0)
        from_keep, kept = self._from_keep(batch, references, x0)
        return from_dmd + from_critic + from_copy + from_keep, metrics | copied | kept

    def _from_dmd(
        self, batch: Batch, x0: Tensor, update: int, generator: torch.Generator, timers: Timers
    ) -> tuple[Tensor, dict[str, float]]:
        """DMD's part of the gradient (b, c, h, w) in float32, zero if DMD is off, and what to log."""
        if not self.settings.dmd_weight:
            return torch.zeros_like(x0, dtype=torch.float32), {}
        with timers("dmd"):
            gradient = self.distribution_matching(batch, x0, self._sample_times(batch, update)[-1], generator)
        loss = float(0.5 * gradient.square().mean())
        return self.settings.dmd_weight * gradient / gradient.numel(), {"loss/dmd": loss}

    def _from_critic(
        self, batch: Batch, x0: Tensor, from_dmd: Tensor, update: int, timers: Timers
    ) -> tuple[Tensor, dict[str, float]]:
        """The critic's part of the gradient (b, c, h, w) in float32, zero if the critic is off, and what to log."""
        if not self.settings.critic_weight:
            return torch.zeros_like(x0, dtype=torch.float32), {}
        with timers("critic"), self.parts.on_device("vae", "critic"):
            feedback = self.critic_gradient(batch, x0, update)
        self.item_errors.append(ItemErrors(batch.ids, batch.edit_types, feedback.error.tolist()))
        return self.balance.scaled(feedback, from_dmd), feedback.metrics

    def _from_copy(self, batch: Batch, references: Tensor, x0: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The copy loss's part of the gradient (b, c, h, w): identity edits must return the reference."""
        is_identity_edit = torch.tensor([kind == IDENTITY_EDIT for kind in batch.edit_types], device=x0.device)
        if not self.settings.copy_weight or not is_identity_edit.any():
            return torch.zeros_like(x0, dtype=torch.float32), {}
        difference = (x0 - references).float() * is_identity_edit.view(-1, 1, 1, 1)
        loss = float(difference[is_identity_edit].square().mean())
        return self.settings.copy_weight * 2 * difference / difference.numel(), {"loss/copy": loss}

    def _from_keep(self, batch: Batch, references: Tensor, x0: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The keep loss's part of the gradient (b, c, h, w): outside the edit's region the edit must be the reference.

        The loss is in latents and not in pixels. The reference's own latents reach its minimum, zero; its decoded
        pixels do not equal the photo. It also needs no pass of the decoder.
        """
        if not self.settings.keep_weight or batch.keep_mask is None or not batch.keep_mask.any():
            return torch.zeros_like(x0, dtype=torch.float32), {}
        weight = kept_latents(batch.keep_mask, x0.shape[-2:])
        difference = weight * (x0 - references).float()
        loss = float((difference * (x0 - references).float()).sum() / (weight.sum() * x0.shape[1]).clamp_min(1))
        return self.settings.keep_weight * 2 * difference / difference.numel(), {"loss/keep": loss}

    def extra_state(self) -> dict[str, Tensor]:
        """The running norms of the two gradients, and the samples that are kept for replay."""
        return {"sizes": self.balance.running_norms} | self.replay.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load what `extra_state` returned."""
        self.balance.running_norms = state["sizes"].clone()
        self.replay.load_state(state)


def kept_latents(keep_mask: Float[Tensor, "b 1 H W"], size: Sequence[int]) -> Float[Tensor, "b 1 h w"]:
    """How far each cell of latents of `size` (h, w) must stay: as far as the least kept of the pixels that it stands
    for. So a cell at the border of the edit's region, of which some pixels must change, is free to change."""
    return 1 - nn.functional.adaptive_max_pool2d(1 - keep_mask.float(), tuple(size))
