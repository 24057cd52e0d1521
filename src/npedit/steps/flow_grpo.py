"""Flow-GRPO (arXiv 2505.05470), a baseline without pairs. The same critic gives a reward only, and no gradient.

    sample    each item `group` times by the flow's SDE, with the current weights: states x and log-probabilities
    reward    the critic's P(all wanted answers) of the decoded image; advantage: relative to the item's other samples
    update    `policy_updates` times: clipped ratios and beta KL(policy || start), over all samples and SDE steps

The training must start from a model that can edit. If no sample of an item is ever right, all its rewards are equal
and its advantages zero. So put a stage `supervised` first, or set `start` in the recipe. The model at the
start of this stage is the reference policy of the KL.

The reward is the product of the answers' probabilities (edit and identity), not their mean: a mean would reward an
unchanged copy with a half. The logarithm of the reward is minus NP-Edit's critic loss, so both have the same goal.

Deviations from the paper:
- the last step, to t = 0, is the ODE's and is not trained. The SDE's noise would stay in the critic's image.
- log-probabilities and KL are means over a latent's elements, as in the authors' code, and `clip` applies to these
  means. The KL is that of the steps themselves, as in the paper. The code omits the step's length, so a `beta` of the
  authors corresponds here to a `kl_weight` of beta times the mean length of a step.
- no classifier-free guidance, in training and at inference. At inference the images come from the few-step sampler.

What the authors' code (github.com/yifan123/flow_grpo) does and the paper does not is behind settings that are off by
default: `sampler: cps`, `window` (Flow-GRPO-Fast), `split_samples`, `advantage_clip`. docs/method.md compares all
settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from npedit import flow, grpo
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families.base import EncodedText, References
from npedit.generator import sample_noise, seeded_generator
from npedit.nets.distributed import all_gather, global_batch_size, rank
from npedit.nets.learner import Learner, LearnerSettings
from npedit.nets.master_weights import master_weight, set_weight
from npedit.recipe.config import Settings
from npedit.scoring.critic_scores import score_with_critic
from npedit.steps.base import Parts, Timers
from npedit.steps.base import Step as Base


class FlowGrpoSettings(Settings):
    """Settings of the baseline; those that the paper has too have its values, except the group size."""

    sampling_steps: int = Field(10, ge=2, le=64)  # of the SDE in training; independent of the few-step sampler
    group: int = Field(8, ge=2)  # samples of one item (paper: 24)
    noise_level: float = Field(0.7, gt=0)  # a
    sampler: Literal["sde", "cps"] = "sde"  # of the noisy steps: `grpo.sde_step`, `grpo.cps_step`
    window: int = Field(0, ge=0)  # so many steps in a row, drawn among the first half, are noisy and trained; 0: all
    advantage_std: Literal["group", "batch"] = "group"  # what advantages are divided by: `grpo.advantages`
    clip: float = Field(1e-4, gt=0, lt=1)  # of ratios of mean log-probabilities; smaller latents need a larger one
    kl_weight: float = Field(0.04, ge=0)  # beta
    advantage_clip: float = Field(0, ge=0)  # largest size of an advantage (the authors' code: 5); 0: no limit
    policy_updates: int = Field(2, ge=1)  # on each set of samples; with one, every ratio is 1 and nothing is clipped
    split_samples: bool = False  # each policy update uses another part of the samples, as in the authors' code
    student: LearnerSettings = LearnerSettings()

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.window > self.sampling_steps // 2:
            raise ValueError(
                f"window: expected at most half of the {self.sampling_steps} sampling_steps; got {self.window}"
            )
        if self.sampler == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level: expected at most 1 with sampler cps; got {self.noise_level}")
        if self.split_samples and self.policy_updates > self.group:  # a part without samples has no loss
            raise ValueError(
                f"policy_updates: expected at most {self.group}, the group, with split_samples; got "
                f"{self.policy_updates}"
            )
        return self


@dataclass(frozen=True)
class Trajectories:
    """What the policy did on one batch: n = group * b trajectories, sample g of item i in row g * b + i.

    `states` holds x (n, c, h, w) at each of `times`. `trained` are the numbers of the steps that are noisy. For each of
    these, `before` holds the log-probability (n,), and `reference` the mean (n, c, h, w) that the reference policy
    gives it (nothing, if the KL's weight is 0). `advantages` (n,) are those of the rewards (n,), and zero until the
    rewards of the whole update are known. `weight` is how much these samples count in the mean over the processes.
    """

    text: EncodedText
    references: Tensor
    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    trained: tuple[int, ...]
    before: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    rewards: Tensor
    advantages: Tensor
    weight: float = 1.0

    def select(self, rows: Tensor) -> Trajectories:
        """These rows of all."""
        return replace(
            self,
            text=self.text.select(rows),
            references=self.references[rows],
            rewards=self.rewards[rows],
            advantages=self.advantages[rows],
            states=tuple(x[rows] for x in self.states),
            before=tuple(x[rows] for x in self.before),
            reference=tuple(x[rows] for x in self.reference),
        )


class Step(Base):
    """See the module's head."""

    Settings = FlowGrpoSettings
    most_references = 1

    def __init__(self, settings: FlowGrpoSettings, parts: Parts, student: nn.Module, updates: int, seed: int):
        self.settings, self.parts, self.seed = settings, parts, seed
        self.learners = {"student": Learner(student, settings.student, updates * settings.policy_updates)}
        self.start = self._weights() if settings.kl_weight else {}

    @classmethod
    def requirements(cls, settings: FlowGrpoSettings) -> frozenset[str]:
        """The critic; neither captions nor pairs."""
        return frozenset({"critic"})

    @classmethod
    def passes_per_update(cls, settings: FlowGrpoSettings, items: int) -> tuple[int, int]:
        """Pictures that an update of so many items sends through the generator and through the critic, which is asked
        two questions about each. "Do nothing" items are asked one, so the critic's number is an upper bound."""
        s, n = settings, settings.group * items
        trained = s.window or s.sampling_steps - 1
        uses = (1 if s.split_samples else s.policy_updates) + bool(s.kl_weight)
        return n * (s.sampling_steps + trained * uses), 2 * n

    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update: sample, compute rewards, improve the policy. Returns what to log."""
        timers = Timers()
        metrics: list[dict[str, float]] = []
        texts, images = [b.instructions for b in batches], [b.references for b in batches]
        with timers("sample"), self.parts.encode_ahead(texts, images):
            taken = self._with_advantages([self._sample(b, update, i, metrics) for i, b in enumerate(batches)])
        with timers("student"):
            for used in self._samples_of_updates(taken, update):
                losses = [partial(self._loss, s, k, metrics) for s in used for k in range(len(s.trained))]
                logged = self.learners["student"].update(losses)
        keys = sorted({k for m in metrics for k in m})
        means = {k: sum(m[k] for m in metrics if k in m) / sum(k in m for m in metrics) for k in keys}
        return means | {f"{k}/student": v for k, v in logged.items()} | timers.seconds

    def _samples_of_updates(self, taken: list[Trajectories], update: int) -> Iterator[list[Trajectories]]:
        """The samples that each policy update uses: all of them, or with `split_samples` a part, drawn at random among
        those of the global batch."""
        count = self.settings.policy_updates
        if not self.settings.split_samples:
            yield from [taken] * count
            return
        generator = seeded_generator(self.seed, "flow_grpo split", update, 0)
        sizes = [global_batch_size(len(s.advantages)) for s in taken]
        parts = [torch.randperm(size, generator=generator).tensor_split(count) for size in sizes]
        for k in range(count):
            yield [self._select_own(s, rows[k]) for s, rows in zip(taken, parts)]

    def _select_own(self, samples: Trajectories, rows: Tensor) -> Trajectories:
        """This process's samples among these rows of the global batch, weighted by their number: a mean over the
        processes is then that over all rows. A process without any makes a pass with weight 0 all the same, because
        sharded models need equal numbers of passes."""
        items = len(samples.advantages) // self.settings.group
        sample, item = rows // global_batch_size(items), rows % global_batch_size(items)
        own = item // items == rank()
        mine = (sample * items + item % items)[own]
        chosen = mine if len(mine) else torch.zeros(1, dtype=torch.long)
        weight = global_batch_size(len(mine)) / len(rows)
        return replace(samples.select(chosen.to(samples.advantages.device)), weight=weight)

    # -------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def _sample(self, batch: Batch, update: int, micro: int, metrics: list[dict[str, float]]) -> Trajectories:
        """Trajectories of a batch with the current weights, their rewards, and the means of the reference policy."""
        s, generator = self.settings, seeded_generator(self.seed, "flow_grpo", update, micro)
        if batch.extra_references is not None:
            raise UserError("flow_grpo: expected one reference an example; got several; remove reference_file_names")
        latents = self.parts.encode_images(batch.references)
        rows = torch.arange(len(batch)).repeat(s.group)
        text, references = self.parts.encode_text(batch.instructions).select(rows), latents.repeat(s.group, 1, 1, 1)
        shift = self.parts.family.noise_shift(*batch.references.shape[-2:])
        times = (1.0, *flow.few_step_times(s.sampling_steps, shift)[1:].tolist())
        given = self.parts.family.prepare_references(self.learners["student"].net, (references,), text)
        x = torch.cat(sample_noise(latents, s.group, generator))
        states, before, trained = [x], [], self._draw_window(generator)
        for k, (t, after) in enumerate(zip(times, times[1:])):
            v = self._velocity(x, t, text, given)
            if k in trained:
                mean, std = self._noisy_step(x, v, t, after)
                x = mean + std * torch.cat(sample_noise(latents, s.group, generator))
                before.append(grpo.log_prob(x, mean, std))
            else:
                x = x + (after - t) * v
            states.append(x)
        x0 = x - times[-1] * self._velocity(x, times[-1], text, given)
        rewards = self._compute_rewards(batch, x0, metrics).flatten()
        none_yet = torch.zeros_like(rewards)
        found = Trajectories(text, references, times, tuple(states), trained, tuple(before), (), rewards, none_yet)
        return replace(found, reference=self._reference_means(found)) if s.kl_weight else found

    def _with_advantages(self, taken: Sequence[Trajectories]) -> list[Trajectories]:
        """The trajectories of an update with their advantages. With `advantage_std: batch` these are divided by the
        standard deviation of all rewards of the update, in all batches and processes."""
        s = self.settings
        rewards = [samples.rewards.view(s.group, -1) for samples in taken]
        if s.advantage_std == "batch":
            advantages = _advantages_in_update(rewards)
        else:
            advantages = [grpo.advantages(r) for r in rewards]
        if s.advantage_clip:
            advantages = [a.clamp(-s.advantage_clip, s.advantage_clip) for a in advantages]
        return [replace(samples, advantages=a.flatten()) for samples, a in zip(taken, advantages, strict=True)]

    def _draw_window(self, generator: torch.Generator) -> tuple[int, ...]:
        """The numbers of the steps that are noisy and trained. The last step never is."""
        s = self.settings
        if not s.window:
            return tuple(range(s.sampling_steps - 1))
        begin = int(torch.randint(s.sampling_steps // 2 - s.window + 1, (), generator=generator))
        return tuple(range(begin, begin + s.window))

    def _noisy_step(self, x: Tensor, v: Tensor, t: float, after: float) -> tuple[Tensor, float]:
        """The mean and standard deviation of one noisy step."""
        step = grpo.sde_step if self.settings.sampler == "sde" else grpo.cps_step
        return step(x, v, t, after, self.settings.noise_level)

    def _velocity(self, x: Tensor, t: float, text: EncodedText, references: References) -> Tensor:
        net, times = self.learners["student"].net, torch.full((len(x),), t, device=x.device)
        return self.parts.family.velocity(net, x, times, text, references).float()

    def _compute_rewards(self, batch: Batch, x0: Tensor, metrics: list[dict[str, float]]) -> Tensor:
        """P(all wanted answers) of each sample, (group, b)."""
        group = self.settings.group
        with self.parts.on_device("vae", "critic"):
            edited = self.parts.decode_latents(x0)
            texts = ("ids", "instructions", "edit_types", "objects", "questions")
            photos = {k: getattr(batch, k) for k in ("references", "other_photos")}
            again = replace(
                batch,
                **{k: getattr(batch, k) * group for k in texts},
                **{k: photo.repeat(group, 1, 1, 1) for k, photo in photos.items() if photo is not None},
            )
            assert self.parts.critic is not None  # `requirements` has asked for it
            scores = score_with_critic(self.parts.critic, self.parts.wording, again, edited)
        rewards = scores.joint_probability().view(group, -1).to(x0.device)
        spread = float(rewards.std(0, unbiased=False).mean())
        metrics.append({"reward/mean": float(rewards.mean()), "reward/group_std": spread})
        metrics.append(scores.mean_by_kind("critic", again.edit_types))
        return rewards

    def _reference_means(self, samples: Trajectories) -> tuple[Tensor, ...]:
        with self._use_reference_weights():
            steps = [self._policy_step(samples, k) for k in range(len(samples.before))]
        return tuple(mean for mean, _ in steps)

    # ---------------------------------------------------------------------------------------------------- update

    def _policy_step(self, samples: Trajectories, k: int) -> tuple[Tensor, float]:
        """The mean and standard deviation of the k-th trained step under the current weights."""
        step = samples.trained[k]
        x, (t, after) = samples.states[step], samples.times[step : step + 2]
        return self._noisy_step(x, self._velocity(x, t, samples.text, (samples.references,)), t, after)

    def _loss(self, samples: Trajectories, k: int, metrics: list[dict[str, float]]) -> Tensor:
        s = self.settings
        mean, std = self._policy_step(samples, k)
        now = grpo.log_prob(samples.states[samples.trained[k] + 1], mean, std)
        loss = grpo.policy_loss(now, samples.before[k], samples.advantages, s.clip)
        far = (now.detach() - samples.before[k]).exp().sub(1).abs() > s.clip
        seen = {"loss/policy": float(loss.detach()), "policy/outside_clip": float(far.float().mean())}
        if s.kl_weight:
            kl = grpo.kl_divergence(mean, samples.reference[k], std)
            seen["loss/kl"] = float(kl.detach())
            loss = loss + s.kl_weight * kl
        metrics.append({key: samples.weight * value for key, value in seen.items()})
        return samples.weight * loss

    # ------------------------------------------------------------------------------------------- reference policy

    def _trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.learners["student"].net.named_parameters() if p.requires_grad]

    @contextmanager
    def _use_reference_weights(self) -> Iterator[None]:
        """Inside the `with` block the student's net has the weights of the reference policy."""
        kept = self._weights()
        self._set_weights(self.start)
        try:
            yield
        finally:
            self._set_weights(kept)

    def _weights(self) -> dict[str, Tensor]:
        return {n: master_weight(p).detach().clone() for n, p in self._trainable_parameters()}

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, param in self._trainable_parameters():
            set_weight(param, weights[name])

    def extra_state(self) -> dict[str, Tensor]:
        """The weights of the reference policy."""
        return self.start

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load what `extra_state` returned."""
        self.load_extra_tensors(state.items())

    def load_extra_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load what `extra_state` returned, one tensor at a time."""
        loaded = set()
        for name, tensor in tensors:
            if name in self.start:
                self.start[name].copy_(tensor)
            loaded.add(name)
        if loaded != self.start.keys():
            raise ValueError(f"expected {len(self.start)} tensors of the start; got {len(loaded)}")


def _advantages_in_update(rewards: Sequence[Tensor]) -> list[Tensor]:
    """The advantages (group, b) of each of this process's batches, by the standard deviation of all rewards."""
    sizes, device = [r.shape[1] for r in rewards], rewards[0].device
    everyone = torch.cat(all_gather(torch.cat(list(rewards), 1).cpu()), 1).to(device)
    mine = grpo.advantages(everyone, whole_batch=True).split(sum(sizes), 1)[rank()]
    return list(mine.split(sizes, 1))
