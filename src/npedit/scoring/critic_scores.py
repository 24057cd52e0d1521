"""P(wanted answer) of a critic for each question about each finished edit, without gradient.

Used by Flow-GRPO for its reward, and for the held-out judge. `steps/np_edit.py` asks the critic with gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.questions import questions_for


@dataclass(frozen=True)
class CriticScores:
    """One entry for each question: `items` is the item's number in the batch, `kinds` the kind of question, `p` (q,) is
    P(wanted answer) in [0, 1] on the CPU."""

    items: tuple[int, ...]
    kinds: tuple[str, ...]
    p: Float[Tensor, "q"]

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
    critic: Critic, wording: str, batch: Batch, edited: Float[Tensor, "b 3 H W"], chunk: int = 64
) -> CriticScores:
    """The critic's scores of `edited`, (b, 3, H, W), clamped to [0, 1], as edits of a batch's references. All questions
    about `chunk` items are asked at a time."""
    items, kinds, probabilities = [], [], []
    for start in range(0, len(batch), chunk):
        chunk_items = range(start, min(start + chunk, len(batch)))
        before = critic.encode_images(batch.references[start : start + chunk].to(critic.device))
        after = critic.encode_images(edited[start : start + chunk].to(critic.device).clamp(0, 1))
        questions = [
            (i, q)
            for i in chunk_items
            for q in questions_for(batch.edit_types[i], batch.instructions[i], batch.objects[i], wording)
        ]
        visible = [[(before if n == "reference" else after)[i - start] for n in q.looks_at] for i, q in questions]
        answer = torch.tensor([q.answer for _, q in questions])
        margin = critic.margin([q.text for _, q in questions], visible).float().cpu()
        probabilities.append((margin * answer).sigmoid())
        items += [i for i, _ in questions]
        kinds += [q.kind for _, q in questions]
    return CriticScores(tuple(items), tuple(kinds), torch.cat(probabilities))
