"""The critic's part of NP-Edit: ask the questions about the decoded x0, and return the gradient of their loss at x0.

    loss = mean over items of the sum over each item's questions of  -log p(wanted answer)

The critic's logits are multiplied by an inverse temperature that rises from `ramp_from` to 1 in `ramp_updates` updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from npedit.critics.base import Critic, answer_loss, vocabulary_loss
from npedit.data import Batch
from npedit.questions import Question, questions_for
from npedit.recipe.config import Settings
from npedit.steps.base import Parts


class CriticGradientSettings(Settings):
    """How the critic is asked, and how much the gradient of its loss counts."""

    critic_weight: float = Field(0.02, ge=0)
    identity_weight: float = Field(1.0, ge=0)  # of the identity question beside the edit question; 0 does not ask it
    answer: Literal["two_way", "vocabulary"] = "two_way"
    ramp_from: float = Field(0.1, gt=0, le=1)  # inverse temperature of the critic's logits at the start
    ramp_updates: int = Field(2000, ge=0)  # until it is 1


class AskedQuestion(NamedTuple):
    """A question, and the number in the batch of the item that it is asked about."""

    item: int
    question: Question


class CriticFeedback(NamedTuple):
    """What the critic says about a batch. `error` is how wrong each item is: the mean of 1 - p(wanted answer) over the
    item's questions. `metrics` is what to log."""

    gradient: Float[Tensor, "b c h w"]
    error: Float[Tensor, "b"]
    metrics: dict[str, float]


class CriticGradient:
    """The gradient of the critic's loss at x0. The decoder's and the critic's memory is freed before it returns."""

    def __init__(self, settings: CriticGradientSettings, parts: Parts):
        self.settings, self.parts = settings, parts

    def __call__(self, batch: Batch, x0: Float[Tensor, "b c h w"], update: int) -> CriticFeedback:
        """The critic's feedback. Its gradient has the factor `critic_weight`."""
        s, critic = self.settings, self.parts.critic
        assert critic is not None  # the step's `requirements` has asked for it
        latents = x0.detach().requires_grad_(True)
        with critic.gradient_checkpointing(self.parts.memory.critic_checkpointing):
            asked, logits = self._ask(critic, batch, latents)
        if not asked:  # identity edits alone, and identity_weight is 0
            zeros = torch.zeros_like(x0, dtype=torch.float32)
            return CriticFeedback(zeros, torch.zeros(len(batch), device=x0.device), {})
        answer = torch.tensor([q.answer for _, q in asked], device=logits.device)
        ramp = self._inverse_temperature(update)
        losses = self._losses(critic, logits, answer, ramp)
        weight = torch.tensor([1.0 if q.kind == "edit" else s.identity_weight for _, q in asked], device=logits.device)
        (gradient,) = torch.autograd.grad((weight * losses).sum() / len(batch), latents)
        right = (logits[:, critic.yes] - logits[:, critic.no]).detach() * answer
        metrics = {"critic/inverse_temperature": ramp} | _answer_metrics(batch, asked, right, losses.detach())
        metrics |= _member_metrics(critic, answer)
        return CriticFeedback(s.critic_weight * gradient.float(), _error_by_item(asked, right, len(batch)), metrics)

    def _ask(self, critic: Critic, batch: Batch, latents: Tensor) -> tuple[list[AskedQuestion], Tensor]:
        """The questions about the edited images, and the critic's logits for them (questions, vocabulary)."""
        asked = self._questions(batch)
        if not asked:
            return asked, torch.empty(0)
        images = _encode_photos(critic, batch, asked)
        images["edited"] = critic.encode_images(self.parts.decode_latents(latents))
        looks = [[images[name][i] for name in q.looks_at] for i, q in asked]
        return asked, critic.logits([q.text for _, q in asked], looks, packed=self.parts.memory.packed_questions)

    def _questions(self, batch: Batch) -> list[AskedQuestion]:
        """The questions of all items, without identity questions if their weight is zero."""
        return [
            AskedQuestion(i, q)
            for i, (kind, words, thing) in enumerate(zip(batch.edit_types, batch.instructions, batch.objects))
            for q in questions_for(kind, words, thing, self.parts.wording, batch.other_photos is not None)
            if q.kind == "edit" or self.settings.identity_weight
        ]

    def _losses(self, critic: Critic, logits: Tensor, answer: Tensor, ramp: float) -> Tensor:
        """Each question's loss (questions,), from the logits (questions, vocabulary)."""
        if self.settings.answer == "two_way":
            return answer_loss(logits[:, critic.yes] - logits[:, critic.no], answer, ramp)
        return vocabulary_loss(logits, answer, critic.yes, critic.no, ramp)

    def _inverse_temperature(self, update: int) -> float:
        s = self.settings
        return 1.0 if update >= s.ramp_updates else s.ramp_from + (1 - s.ramp_from) * update / s.ramp_updates


@torch.no_grad()
def _encode_photos(critic: Critic, batch: Batch, asked: Sequence[AskedQuestion]) -> dict[str, Any]:
    """The critic's visual tokens of the references, and of the other photos that questions look at: by item.

    All photos pass the critic together, because processes that share a sharded critic must call it equally often.
    """
    rows = sorted({i for i, q in asked if "other" in q.looks_at})
    photos = [batch.references, *([] if batch.other_photos is None else [batch.other_photos[rows]])]
    tokens = critic.encode_images(torch.cat(photos) if rows else batch.references)
    return {"reference": tokens, "other": dict(zip(rows, tokens[len(batch) :], strict=True))}


def _error_by_item(asked: Sequence[AskedQuestion], right: Tensor, items: int) -> Tensor:
    """How wrong each item is (items,). `right` (questions,) is the margin of the wanted answer."""
    rows = torch.tensor([i for i, _ in asked], device=right.device)
    error = torch.zeros(items, device=right.device).index_add(0, rows, 1 - right.sigmoid())
    return error / torch.bincount(rows, minlength=items).clamp_min(1)


def _answer_metrics(batch: Batch, asked: Sequence[AskedQuestion], right: Tensor, losses: Tensor) -> dict[str, float]:
    """Losses and probabilities of the wanted answer, by kind of question and by edit type."""
    metrics: dict[str, float] = {}
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


def _member_metrics(critic: Critic, answer: Tensor) -> dict[str, float]:
    """The probability of the wanted answer for each member of an ensemble."""
    return {
        f"critic/p_of/{name}": float((margin * answer).sigmoid().mean())
        for name, margin in critic.member_margins.items()
    }
