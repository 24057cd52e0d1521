"""How large the critic's gradient at x0 is beside DMD's: a factor for each batch, from running norms."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from npedit.nets.distributed import global_batch_size, norm_over_global_batch
from npedit.steps._critic_gradient import CriticFeedback

Balance = Literal["none", "match", "item"]


class GradientBalance:
    """Scales the critic's gradient. Its state is the running norms of the critic's gradient and of DMD's.

    With "none" the gradient stays. With "match" the norm of the batch's gradient becomes `critic_weight` times DMD's,
    on average over updates. With "item" each item's gradient gets a norm in proportion to the item's error; an item
    with p = 0 gets `critic_weight` times DMD's norm. So the critic's gradient vanishes when all answers are right.
    Without DMD there is no norm to compare with: "match" leaves the gradient as it is, and with "item" the norms are
    those of a mean over the batch.
    """

    def __init__(self, balance: Balance, critic_weight: float, has_dmd: bool):
        self.balance: Balance = balance
        self.critic_weight, self.has_dmd = critic_weight, has_dmd
        self.running_norms = torch.ones(2)  # of the gradients at x0: critic, DMD
        self.observed_norms: list[Tensor] = []  # the same norms in this update's batches

    def scaled(self, feedback: CriticFeedback, from_dmd: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The critic's gradient, scaled. `from_dmd` is DMD's gradient, zero if DMD is off."""
        gradient = feedback.gradient
        if self.balance == "item":
            gradient = self.critic_weight * weight_by_error(gradient, feedback.error)
        return gradient * self.batch_scale(gradient, from_dmd)

    def batch_scale(self, from_critic: Tensor, from_dmd: Tensor) -> float:
        """The factor for all items of a batch. It uses the norms of this batch and of those before it."""
        if self.balance == "none" or not self.has_dmd:
            return 1.0 / len(from_critic) if self.balance == "item" else 1.0
        processes = global_batch_size(1)
        one_each = torch.ones(len(from_critic))  # the norms if every item's answer is entirely wrong
        all_wrong = processes * norm_over_global_batch(one_each)
        if self.balance == "item":
            self._fit_batch_size(float(all_wrong))
        ours = all_wrong if self.balance == "item" else norm_over_global_batch(from_critic) / self.critic_weight
        now = torch.stack([ours.cpu(), norm_over_global_batch(from_dmd).cpu()])
        if bool(now.isfinite().all()):  # an update that the learner skips must not change the running norms
            self.observed_norms.append(now)
        critic_norm, dmd_norm = self.updated_norms()
        scale = float(dmd_norm / critic_norm.clamp_min(1e-12))
        return scale * processes if self.balance == "item" else scale  # averaging over processes divides by it again

    def _fit_batch_size(self, all_wrong: float) -> None:
        """Adapt the running norms of a run that was resumed with batches of another size. With "item" the critic's norm
        is the root of the number of items, by which DMD's norm, of a mean over items, is too small."""
        kept = float(self.running_norms[0])
        has_run = not bool((self.running_norms == 1).all())
        if has_run and round(kept**2) != round(all_wrong**2):
            self.running_norms = self.running_norms * torch.tensor([all_wrong / kept, kept / all_wrong])

    def updated_norms(self) -> Tensor:
        """The running norms, updated with the mean over the batches of this update so far."""
        if not self.observed_norms:
            return self.running_norms
        now = torch.stack(self.observed_norms).mean(0)
        return now if bool((self.running_norms == 1).all()) else torch.lerp(self.running_norms, now, 0.05)

    def end_update(self) -> None:
        """Move the running norms, once per update."""
        self.running_norms, self.observed_norms = self.updated_norms(), []


def weight_by_error(from_critic: Float[Tensor, "b c h w"], error: Float[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
    """Each item's gradient with its norm set to the item's error. Otherwise the few items whose answer is uncertain
    have norms a hundred times larger than all others."""
    norm = from_critic.flatten(1).norm(dim=1).clamp_min(1e-12)
    return from_critic * (error / norm).view(-1, 1, 1, 1)
