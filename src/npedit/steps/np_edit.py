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
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from npedit import dmd, flow
from npedit.critics.base import Critic, answer_loss, vocabulary_loss
from npedit.data import Batch
from npedit.errors import did_you_mean
from npedit.generator import generate_few_step, sample_noise, sample_training_times, seeded_generator
from npedit.nets.distributed import all_gather, global_batch_size, local_slice, norm_over_global_batch
from npedit.nets.learner import Learner, LearnerSettings
from npedit.questions import EDIT_TYPES, IDENTITY_EDIT, Question, questions_for
from npedit.recipe.config import Settings
from npedit.steps._replay import ReplayBuffer, Samples
from npedit.steps.base import Parts, Timers
from npedit.steps.base import Step as Base


class NpEditSettings(Settings):
    """Settings of the method. A weight of zero switches its part off, and models for this part alone are not loaded."""

    steps: int = Field(4, ge=1, le=64)  # of the few-step schedule
    critic_weight: float = Field(0.02, ge=0)
    dmd_weight: float = Field(1.0, ge=0)
    copy_weight: float = Field(1.0, ge=0)
    identity_weight: float = Field(1.0, ge=0)  # of the identity question beside the edit question; 0 does not ask it
    balance: Literal["none", "match", "item"] = "none"
    answer: Literal["two_way", "vocabulary"] = "two_way"
    fake_updates: int = Field(5, ge=1, le=50)
    fake_samples: Literal["fresh", "replay"] = "fresh"  # what fake score updates after the first are trained on
    replay_updates: int = Field(4, ge=1, le=64)  # with replay: from how many updates samples are kept
    ramp_from: float = Field(0.1, gt=0, le=1)  # inverse temperature of the critic's logits at the start
    ramp_updates: int = Field(2000, ge=0)  # until it is 1
    guidance: float = Field(3.5, ge=0)  # of the teacher
    guidance_by_type: dict[str, Annotated[float, Field(ge=0)]] = {}
    negative_prompt: str = ""
    normaliser: Literal["sample", "pixel"] = "sample"  # of DMD's gradient
    t_min: float = Field(0.02, gt=0, lt=1)  # DMD's range of times
    t_max: float = Field(0.98, gt=0, lt=1)
    student: LearnerSettings = LearnerSettings()
    fake: LearnerSettings = LearnerSettings()

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


class Step(Base):
    """See the module's head."""

    Settings = NpEditSettings

    def __init__(self, settings: NpEditSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates)}
        if settings.dmd_weight:
            self.learners["fake"] = Learner(
                parts.create_trainable("fake", seed), settings.fake, updates * settings.fake_updates
            )
        self.running_norms = torch.ones(2)  # running gradient norms at x0: critic, DMD
        self.observed_norms: list[Tensor] = []  # the same norms in this update's batches
        self.student_samples: list[Samples] = []  # the student's output in this update, by batch
        self.replay = ReplayBuffer(settings.replay_updates if settings.fake_samples == "replay" else 1, parts.device)

    @classmethod
    def batches_per_update(cls, settings: NpEditSettings) -> int:
        """One batch for the student, and one for each fake score update that needs fresh samples: those after the
        first."""
        return settings.fake_updates if settings.dmd_weight and settings.fake_samples == "fresh" else 1

    @classmethod
    def requirements(cls, settings: NpEditSettings) -> frozenset[str]:
        """The critic, unless its weight is zero, and the target caption, unless DMD's weight is zero."""
        return frozenset({"critic"} if settings.critic_weight else ()) | (
            {"target_caption"} if settings.dmd_weight else set()
        )

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
        prompts += self.replay.local_captions()
        negative = [[self.settings.negative_prompt] * len(b) for b in of_student if has_dmd]
        return self.parts.encode_ahead(prompts, [image for b in batches for image in b.all_references()], negative)

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

        def loss(batch: Batch, micro: int) -> Tensor:
            generator = seeded_generator(self.seed, "student", update, micro)
            with timers("draft"):
                references = self.parts.encode_images(batch.references)
                x0 = self._generate(batch, update, generator, references)
            self.student_samples.append(Samples(x0.detach(), batch.target_captions))
            gradient, seen = self._gradient_at_x0(batch, references, x0.detach(), update, generator, timers)
            metrics.append(seen)
            return (x0.float() * gradient).sum()  # the gradient of this sum at x0 is `gradient`

        logged = self.learners["student"].update([partial(loss, b, i) for i, b in enumerate(batches)])
        if self.settings.dmd_weight and self.settings.fake_samples == "replay":
            self.replay.add(self.student_samples)
        self.running_norms, self.observed_norms = self._updated_norms(), []
        keys = {k for m in metrics for k in m}
        means = {k: sum(m[k] for m in metrics if k in m) / sum(k in m for m in metrics) for k in sorted(keys)}
        return means | {f"{k}/student": v for k, v in logged.items()}

    def _generate(
        self, batch: Batch, update: int, generator: torch.Generator, references: Tensor | None = None
    ) -> Tensor:
        family, net = self.parts.family, self.learners["student"].net
        if references is None:
            references = self.parts.encode_images(batch.references)
        schedule = flow.few_step_times(self.settings.steps, family.noise_shift(*batch.references.shape[-2:]))
        times = sample_training_times(schedule, seeded_generator(self.seed, "times", update))  # equal on all ranks
        text = self.parts.encode_text(batch.instructions)
        noise, extra = sample_noise(references, len(times), generator), self.parts.encode_extra(batch)
        return generate_few_step(family, net, text, references, times, noise, extra)

    def _gradient_at_x0(
        self, batch: Batch, references: Tensor, x0: Tensor, update: int, generator: torch.Generator, timers: Timers
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum of the weighted losses' gradients with respect to x0 (b, c, h, w), and what to log."""
        s = self.settings
        from_dmd, from_critic = torch.zeros_like(x0, dtype=torch.float32), torch.zeros_like(x0, dtype=torch.float32)
        metrics: dict[str, float] = {}
        if s.dmd_weight:
            with timers("dmd"):
                dmd_gradient = self._dmd_gradient(batch, x0, generator)
            from_dmd = s.dmd_weight * dmd_gradient / dmd_gradient.numel()
            metrics["loss/dmd"] = float(0.5 * dmd_gradient.square().mean())
        if s.critic_weight:
            with timers("critic"), self.parts.on_device("vae", "critic"):
                from_critic, wrong, answered = self._critic_gradient(batch, x0, update)
            metrics |= answered
            if s.balance == "item":
                from_critic = s.critic_weight * self._weight_by_error(from_critic, wrong)
            from_critic = from_critic * self._critic_scale(from_critic, from_dmd)
        metrics["grad_norm/from_dmd"] = float(norm_over_global_batch(from_dmd))
        metrics["grad_norm/from_critic"] = float(norm_over_global_batch(from_critic))
        gradient = from_dmd + from_critic
        is_identity_edit = torch.tensor([kind == IDENTITY_EDIT for kind in batch.edit_types], device=x0.device)
        if s.copy_weight and is_identity_edit.any():
            difference_to_reference = (x0 - references).float() * is_identity_edit.view(-1, 1, 1, 1)
            gradient = gradient + s.copy_weight * 2 * difference_to_reference / difference_to_reference.numel()
            metrics["loss/copy"] = float(difference_to_reference[is_identity_edit].square().mean())
        return gradient, metrics

    @torch.no_grad()
    def _dmd_gradient(self, batch: Batch, x0: Tensor, generator: torch.Generator) -> Tensor:
        s, family = self.settings, self.parts.family
        t = local_slice(
            s.t_min + (s.t_max - s.t_min) * torch.rand(global_batch_size(len(batch)), generator=generator)
        ).to(x0.device)
        (eps,) = sample_noise(x0, 1, generator)
        x = flow.add_noise(x0, eps, t)
        text = self.parts.encode_text(batch.target_captions)
        fake = flow.predict_x0(x, family.velocity(self.learners["fake"].net, x, t, text), t)
        real = flow.predict_x0(x, family.velocity(family.base, x, t, text), t)
        scale = torch.tensor([s.guidance_by_type.get(kind, s.guidance) for kind in batch.edit_types])
        rows = self._guided_rows(scale)
        if len(rows):
            blank = self.parts.encode_negative_text([s.negative_prompt] * len(batch)).select(rows)
            v = family.velocity(family.base, x[rows], t[rows], blank)
            unconditional = flow.predict_x0(x[rows], v, t[rows])
            real[rows] = dmd.classifier_free_guidance(real[rows], unconditional, scale[rows])
        return dmd.dmd_gradient(x0, real, fake, s.normaliser)

    def _guided_rows(self, scale: Tensor) -> Tensor:
        """The items for which the teacher runs without its prompt too: those whose guidance is not 1. The processes
        that share a sharded teacher must all run it, so one without such an item runs it for its first."""
        rows = (scale != 1).nonzero().flatten()
        s = self.settings
        if 1 in (s.guidance, *s.guidance_by_type.values()) and any(all_gather(len(rows) > 0)) and not len(rows):
            return torch.zeros(1, dtype=torch.long)
        return rows

    def _critic_gradient(self, batch: Batch, x0: Tensor, update: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The gradient of the critic's loss at x0, how wrong each item is, and what to log.

        The loss is the mean over items of the sum over each item's questions. How wrong an item is (b,): the mean of
        1 - p(wanted answer) over its questions.
        """
        s, critic = self.settings, self.parts.critic
        assert critic is not None  # `requirements` has asked for it
        latents = x0.detach().requires_grad_(True)
        with critic.gradient_checkpointing(self.parts.memory.critic_checkpointing):
            asked, logits = self._ask_critic(critic, batch, latents)
        if not asked:  # identity edits alone, and identity_weight is 0
            return torch.zeros_like(x0, dtype=torch.float32), torch.zeros(len(batch), device=x0.device), {}
        margin = logits[:, critic.yes] - logits[:, critic.no]
        answer = torch.tensor([q.answer for _, q in asked], device=margin.device)
        ramp = 1.0 if update >= s.ramp_updates else s.ramp_from + (1 - s.ramp_from) * update / s.ramp_updates
        if s.answer == "two_way":
            losses = answer_loss(margin, answer, ramp)
        else:
            losses = vocabulary_loss(logits, answer, critic.yes, critic.no, ramp)
        weight = torch.tensor([1.0 if q.kind == "edit" else s.identity_weight for _, q in asked], device=margin.device)
        (gradient,) = torch.autograd.grad((weight * losses).sum() / len(batch), latents)
        right = margin.detach() * answer
        rows = torch.tensor([i for i, _ in asked], device=right.device)
        wrong = torch.zeros(len(batch), device=right.device).index_add(0, rows, 1 - right.sigmoid())
        wrong = wrong / torch.bincount(rows, minlength=len(batch)).clamp_min(1)
        answered = self._answer_metrics(batch, asked, right, losses.detach(), ramp)
        answered |= {
            f"critic/p_of/{k}": float((said * answer).sigmoid().mean()) for k, said in critic.member_margins.items()
        }
        return s.critic_weight * gradient.float(), wrong, answered

    def _ask_critic(self, critic: Critic, batch: Batch, latents: Tensor) -> tuple[list[tuple[int, Question]], Tensor]:
        """The questions about the edited images, each with its item's number, and the critic's logits for them
        (questions, vocabulary)."""
        asked = [
            (i, q)
            for i, (kind, words, thing) in enumerate(zip(batch.edit_types, batch.instructions, batch.objects))
            for q in questions_for(kind, words, thing, self.parts.wording)
            if q.kind == "edit" or self.settings.identity_weight
        ]
        if not asked:
            return asked, torch.empty(0)
        with torch.no_grad():
            references = critic.encode_images(batch.references)
        edited = critic.encode_images(self.parts.decode_latents(latents))
        looks = [[references[i] if name == "reference" else edited[i] for name in q.looks_at] for i, q in asked]
        return asked, critic.logits([q.text for _, q in asked], looks, packed=self.parts.memory.packed_questions)

    @staticmethod
    def _weight_by_error(from_critic: Tensor, wrong: Tensor) -> Tensor:
        """Each item's gradient with the norm set to how wrong the item is. Otherwise the few items whose answer is
        uncertain have norms a hundred times larger than all others."""
        size = from_critic.flatten(1).norm(dim=1).clamp_min(1e-12)
        return from_critic * (wrong / size).view(-1, 1, 1, 1)

    @staticmethod
    def _answer_metrics(batch: Batch, asked: list, right: Tensor, losses: Tensor, ramp: float) -> dict[str, float]:
        metrics = {"critic/inverse_temperature": ramp}
        for kind in ("edit", "identity"):
            rows = [r for r, (_, q) in enumerate(asked) if q.kind == kind]
            if rows:
                metrics[f"loss/critic_{kind}"] = float(losses[rows].mean())
                metrics[f"critic/p_{kind}"] = float(right[rows].sigmoid().mean())
        for name in sorted(set(batch.edit_types)):
            rows = [r for r, (i, q) in enumerate(asked) if q.kind == "edit" and batch.edit_types[i] == name]
            if rows:
                metrics[f"critic/p_yes/{name}"] = float(right[rows].sigmoid().mean())
        return metrics

    def _critic_scale(self, from_critic: Tensor, from_dmd: Tensor) -> float:
        """The factor that brings the critic's gradient norm to `critic_weight` times DMD's, on average over updates.

        With `balance: match` the norm is that of the whole batch. With `item` it is that of an item with p = 0, so the
        critic's gradient vanishes when all answers are right. The factor uses this batch and those before it; the
        running norms are updated once per update.
        """
        s = self.settings
        if s.balance == "none" or not s.dmd_weight:
            return 1.0
        processes = global_batch_size(1)
        all_wrong = processes * norm_over_global_batch(
            torch.ones(len(from_critic))
        )  # the global batch's items, each of norm 1
        ours = all_wrong if s.balance == "item" else norm_over_global_batch(from_critic) / s.critic_weight
        now = torch.stack([ours.cpu(), norm_over_global_batch(from_dmd).cpu()])
        if bool(now.isfinite().all()):  # an update that the learner skips must not change the running norms
            self.observed_norms.append(now)
        critic_norm, dmd_norm = self._updated_norms()
        scale = float(dmd_norm / critic_norm.clamp_min(1e-12))
        return scale * processes if s.balance == "item" else scale  # averaging over processes divides by it again

    def _updated_norms(self) -> Tensor:
        """The running norms, updated with the mean over the batches of this update so far."""
        if not self.observed_norms:
            return self.running_norms
        now = torch.stack(self.observed_norms).mean(0)
        return now if bool((self.running_norms == 1).all()) else torch.lerp(self.running_norms, now, 0.05)

    def extra_state(self) -> dict[str, Tensor]:
        """The running norms of the two gradients, and the samples that are kept for replay."""
        return {"sizes": self.running_norms} | self.replay.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load what `extra_state` returned."""
        self.running_norms = state["sizes"].clone()
        self.replay.load_state(state)
