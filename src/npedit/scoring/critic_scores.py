"""P(wanted answer) of a critic for each question about each finished edit, without gradient.

Used by Flow-GRPO for its reward, and for the held-out judge. `steps/np_edit.py` asks the critic with gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from npedit.critics.base import Critic, question_margins
from npedit.data import Batch
from npedit.item_questions import USUAL_QUESTIONS, QuestionChoice, item_questions
from npedit.questions import Question


@dataclass(frozen=True)
class CriticScores:
    """One entry for each question: `items` is the item's number in the batch, `kinds` the kind of question, `p` (q,) is
    P(wanted answer) in [0, 1] on the CPU, `names` are the questions' names (`Question.name`)."""

    items: tuple[int, ...]
    kinds: tuple[str, ...]
    p: Float[Tensor, "q"]
    names: tuple[str, ...] = ()

    def joint_probability(self) -> Float[Tensor, "b"]:
        """P(all wanted answers) of each item: the product over its questions."""
        out = torch.ones(max(self.items) + 1)
        for item, p in zip(self.items, self.p):
            out[item] *= p
        return out

    def is_accepted(self) -> list[bool]:
        """Whether P(wanted answer) is above 0.5 for all of an item's questions; one value for each item."""
        out = [True] * (max(self.items) + 1)
        for item, p in zip(self.items, self.p.tolist()):
            out[item] = out[item] and p > 0.5
        return out

    def mean_by_kind(self, prefix: str, edit_types: Sequence[str]) -> dict[str, float]:
        """Figures to log: PREFIX/p_edit and PREFIX/p_identity, and the edit question's mean by edit type as
        PREFIX/p_yes/TYPE. `edit_types` are the items'."""
        rows: dict[str, list[float]] = {}
        for item, kind, p in zip(self.items, self.kinds, self.p.tolist()):
            rows.setdefault(f"{prefix}/p_{kind}", []).append(p)
            if kind == "edit":
                rows.setdefault(f"{prefix}/p_yes/{edit_types[item]}", []).append(p)
        return {key: sum(values) / len(values) for key, values in sorted(rows.items())}


@torch.no_grad()
def score_with_critic(
    critic: Critic,
    wording: str,
    batch: Batch,
    edited: Float[Tensor, "b 3 H W"],
    chunk: int = 64,
    choice: QuestionChoice = USUAL_QUESTIONS,
) -> CriticScores:
    """The critic's scores of `edited`, (b, 3, H, W), clamped to [0, 1], as edits of a batch's references. All questions
    about `chunk` items are asked at a time. `choice` says which questions are asked; the p of a graded one is the
    expected grade, scaled to [0, 1]. Errors as in `Critic.answer_id`."""
    items, kinds, names, probabilities = [], [], [], []
    rubrics = batch.questions or ("",) * len(batch)
    texts = list(zip(batch.edit_types, batch.instructions, batch.objects, rubrics, strict=True))
    for start in range(0, len(batch), chunk):
        chunk_items = range(start, min(start + chunk, len(batch)))
        pictures = {"reference": batch.references, "edited": edited.clamp(0, 1)}
        pictures |= {} if batch.other_photos is None else {"other": batch.other_photos}
        seen = {n: critic.encode_images(p[start : start + chunk].to(critic.device)) for n, p in pictures.items()}
        questions = [
            (i, entry.question)
            for i in chunk_items
            for entry in item_questions(*texts[i], wording, choice, "other" in seen)
        ]
        visible = [[seen[n][i - start] for n in q.looks_at] for i, q in questions]
        probabilities.append(_probabilities(critic, [q for _, q in questions], visible))
        items += [i for i, _ in questions]
        kinds += [q.kind for _, q in questions]
        names += [q.name for _, q in questions]
    return CriticScores(tuple(items), tuple(kinds), torch.cat(probabilities), tuple(names))


def _probabilities(critic: Critic, questions: Sequence[Question], visible: Sequence[Sequence[Any]]) -> Tensor:
    """P(wanted answer) of each question (q,), on the CPU. `visible` are the visual tokens that each one looks at."""
    scales = [q.answers for q in questions]
    logits = critic.logits([q.text for q in questions], visible, answers=scales)
    ids = {scale: critic.answer_ids(scale) for scale in dict.fromkeys(scales)}
    answer = torch.tensor([q.answer for q in questions])
    return (question_margins(logits, scales, ids).float().cpu() * answer).sigmoid()
