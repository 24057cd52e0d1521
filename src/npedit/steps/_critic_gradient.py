"""The critic's part of NP-Edit: ask the questions about the decoded x0, and return the gradient of their loss at x0.

    loss = mean over items of the sum over each item's questions of  weight * -log p(wanted answer)

The critic's logits are multiplied by an inverse temperature that rises from `ramp_from` to 1 in `ramp_updates` updates.
For a graded question, p is the expected grade on a scale from 0 to 1 (`critics/base.py`, `scale_margin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from npedit.critics.base import Critic, answer_loss, question_margins, vocabulary_loss
from npedit.data import Batch
from npedit.errors import UserError
from npedit.item_questions import QuestionChoice, Use, item_questions
from npedit.questions import GRADES, YES_NO, Question
from npedit.recipe.config import Settings
from npedit.steps.base import Parts


class CriticGradientSettings(Settings):
    """How the critic is asked, and how much the gradient of its loss counts."""

    critic_weight: float = Field(0.02, ge=0)
    identity_weight: float = Field(1.0, ge=0)  # of the identity question beside the edit question; 0 does not ask it
    answer: Literal["two_way", "vocabulary"] = "two_way"
    rubric: Use = "off"  # Yes/No questions from the data's column `questions`, beside the usual ones or instead of them
    rubric_weight: float = Field(1.0, gt=0)  # of all questions of an item's rubric together
    grade: Use = "off"  # "how far has it been carried out, 1 to 5?" beside the edit question or instead of it
    grade_weight: float = Field(1.0, gt=0)
    ramp_from: float = Field(0.1, gt=0, le=1)  # inverse temperature of the critic's logits at the start
    ramp_updates: int = Field(2000, ge=0)  # until it is 1

    def question_choice(self) -> QuestionChoice:
        """Which questions are asked, and their weights."""
        return QuestionChoice(self.rubric, self.grade, self.identity_weight, self.rubric_weight, self.grade_weight)


class AskedQuestion(NamedTuple):
    """A question, its weight and share as in `WeightedQuestion`, and the number in the batch of the item that it is
    asked about."""

    item: int
    question: Question
    weight: float
    share: float


class CriticFeedback(NamedTuple):
    """What the critic says about a batch. `error` is how wrong each item is: the mean of 1 - p(wanted answer) over the
    item's questions, where a rubric counts as one question or as those that it replaces. `metrics` is what to log."""

    gradient: Float[Tensor, "b c h w"]
    error: Float[Tensor, "b"]
    metrics: dict[str, float]


class CriticGradient:
    """The gradient of the critic's loss at x0. The decoder's and the critic's memory is freed before it returns.

    Raises:
        UserError: the critic cannot answer with a grade in one token, and the settings ask for a grade.
    """

    def __init__(self, settings: CriticGradientSettings, parts: Parts):
        self.settings, self.parts = settings, parts
        self.token_ids = {} if parts.critic is None else _token_ids(parts.critic, settings)

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
        answer = torch.tensor([a.question.answer for a in asked], device=logits.device)
        ramp = self._inverse_temperature(update)
        losses = self._losses(critic, logits, asked, answer, ramp)
        weight = torch.tensor([a.weight for a in asked], device=logits.device)
        (gradient,) = torch.autograd.grad((weight * losses).sum() / len(batch), latents)
        right = self._margins(logits.detach(), asked) * answer
        metrics = {"critic/inverse_temperature": ramp} | _answer_metrics(batch, asked, right, losses.detach())
        for name, own in critic.member_logits.items():
            metrics[f"critic/p_of/{name}"] = float((self._margins(own, asked) * answer).sigmoid().mean())
        return CriticFeedback(s.critic_weight * gradient.float(), _error_by_item(asked, right, len(batch)), metrics)

    def _ask(self, critic: Critic, batch: Batch, latents: Tensor) -> tuple[list[AskedQuestion], Tensor]:
        """The questions about the edited images, and the critic's logits for them (questions, vocabulary)."""
        asked = self._questions(batch)
        if not asked:
            return asked, torch.empty(0)
        images = _encode_photos(critic, batch, asked)
        images["edited"] = critic.encode_images(self.parts.decode_latents(latents))
        looks = [[images[name][a.item] for name in a.question.looks_at] for a in asked]
        texts = [a.question.text for a in asked]
        answers = [a.question.answers for a in asked]
        return asked, critic.logits(texts, looks, packed=self.parts.memory.packed_questions, answers=answers)

    def _questions(self, batch: Batch) -> list[AskedQuestion]:
        """The questions of all items, without those whose weight is zero."""
        choice, has_other = self.settings.question_choice(), batch.other_photos is not None
        rubrics = batch.questions or ("",) * len(batch)
        texts = zip(batch.edit_types, batch.instructions, batch.objects, rubrics, strict=True)
        return [
            AskedQuestion(item, *entry)
            for item, about in enumerate(texts)
            for entry in item_questions(*about, self.parts.wording, choice, has_other)
        ]

    def _losses(
        self, critic: Critic, logits: Tensor, asked: Sequence[AskedQuestion], answer: Tensor, ramp: float
    ) -> Tensor:
        """Each question's loss (questions,), from the logits (questions, vocabulary)."""
        losses = answer_loss(self._margins(logits, asked, ramp), answer)
        if self.settings.answer == "two_way":
            return losses
        is_graded = torch.tensor([a.question.answers != YES_NO for a in asked], device=logits.device)
        return torch.where(is_graded, losses, vocabulary_loss(logits, answer, critic.yes, critic.no, ramp))

    def _margins(self, logits: Tensor, asked: Sequence[AskedQuestion], inverse_temperature: float = 1.0) -> Tensor:
        """Each question's margin (questions,), from the logits (questions, vocabulary)."""
        return question_margins(logits, [a.question.answers for a in asked], self.token_ids, inverse_temperature)

    def _inverse_temperature(self, update: int) -> float:
        s = self.settings
        return 1.0 if update >= s.ramp_updates else s.ramp_from + (1 - s.ramp_from) * update / s.ramp_updates


@torch.no_grad()
def _encode_photos(critic: Critic, batch: Batch, asked: Sequence[AskedQuestion]) -> dict[str, Any]:
    """The critic's visual tokens of the references, and of the other photos that questions look at: by item.

    All photos pass the critic together, because processes that share a sharded critic must call it equally often.
    """
    rows = sorted({a.item for a in asked if "other" in a.question.looks_at})
    photos = [batch.references, *([] if batch.other_photos is None else [batch.other_photos[rows]])]
    tokens = critic.encode_images(torch.cat(photos) if rows else batch.references)
    return {"reference": tokens, "other": dict(zip(rows, tokens[len(batch) :], strict=True))}


def _token_ids(critic: Critic, settings: CriticGradientSettings) -> dict[tuple[str, ...], list[int]]:
    """The tokens of the answers that the settings need.

    Raises:
        UserError: the critic cannot answer with a grade in one token.
    """
    scales = [YES_NO] + ([GRADES] if settings.grade != "off" else [])
    try:
        return {scale: critic.answer_ids(scale) for scale in scales}
    except ValueError as error:
        raise UserError(f"grade: {error} Choose another critic, or set grade to off.") from None


def _error_by_item(asked: Sequence[AskedQuestion], right: Tensor, items: int) -> Tensor:
    """How wrong each item is (items,). `right` (questions,) is the margin of the wanted answer."""
    rows = torch.tensor([a.item for a in asked], device=right.device)
    share = torch.tensor([a.share for a in asked], device=right.device)
    error = torch.zeros(items, device=right.device).index_add(0, rows, share * (1 - right.sigmoid()))
    total = torch.zeros(items, device=right.device).index_add(0, rows, share)
    return error / torch.where(total > 0, total, 1)


def _answer_metrics(batch: Batch, asked: Sequence[AskedQuestion], right: Tensor, losses: Tensor) -> dict[str, float]:
    """Losses and probabilities of the wanted answer, by kind of question and by edit type."""
    metrics: dict[str, float] = {}
    for kind in ("edit", "identity", "rubric", "grade"):
        rows = [r for r, a in enumerate(asked) if a.question.kind == kind]
        if rows:
            metrics[f"loss/critic_{kind}"] = float(losses[rows].mean())
            metrics[f"critic/p_{kind}"] = float(right[rows].sigmoid().mean())
    for name in sorted(set(batch.edit_types)):
        rows = [r for r, a in enumerate(asked) if a.question.kind == "edit" and batch.edit_types[a.item] == name]
        if rows:
            metrics[f"critic/p_yes/{name}"] = float(right[rows].sigmoid().mean())
    return metrics
