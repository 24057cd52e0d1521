"""What a critic says of finished edits: P(wanted answer) to each question about each edit, without gradient.

Training's critic as a reward, and the held-out judge, ask here; NP-Edit's own step asks with gradient.
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
    """One row a question: the item it is about, its kind, and P(wanted answer) in [0, 1] on the CPU."""

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
        """Whether every wanted answer is the likelier one, item by item."""
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
    """Ask all questions about edits of a batch's references; the images are held to [0, 1]. `chunk` items are asked
    about at a time."""
    items, kinds, found = [], [], []
    for start in range(0, len(batch), chunk):
        part = range(start, min(start + chunk, len(batch)))
        before = critic.encode_images(batch.references[start : start + chunk].to(critic.device))
        after = critic.encode_images(edited[start : start + chunk].to(critic.device).clamp(0, 1))
        asked = [
            (i, q)
            for i in part
            for q in questions_for(batch.edit_types[i], batch.instructions[i], batch.objects[i], wording)
        ]
        looks = [[(before if n == "reference" else after)[i - start] for n in q.looks_at] for i, q in asked]
        answer = torch.tensor([q.answer for _, q in asked])
        margin = critic.margin([q.text for _, q in asked], looks).float().cpu()
        found.append((margin * answer).sigmoid())
        items += [i for i, _ in asked]
        kinds += [q.kind for _, q in asked]
    return CriticScores(tuple(items), tuple(kinds), torch.cat(found))
