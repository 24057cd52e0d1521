"""Several critics at once: the margin is the mean of theirs, so that no single one's weaknesses are all that counts.

`weights` is a YAML file with a list of members, each with the keys of `Member`; paths are as in a recipe:

    - {name: llava_onevision, weights: llava-hf/llava-onevision-qwen2-7b-ov-hf}
    - {name: internvl, weights: OpenGVLab/InternVL3-8B-hf, resolution: 336}

The members share no vocabulary. The ensemble's own has the words Yes and No, with plus and minus half the mean margin
as their logits; so over these two the answer loss is the two-way one. If all members can answer with a grade in one
token, the five digits follow, each with the mean of the members' log-probabilities among the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from npedit.critics.base import Critic
from npedit.errors import UserError
from npedit.questions import GRADES
from npedit.recipe.config import EMBEDDED, Settings, embedded_weights, find_class, validate_settings
from npedit.recipe.yaml_file import parse_yaml


class Member(Settings):
    """One critic of an ensemble; the keys mean what they mean in a recipe's `critic`."""

    name: str
    weights: str
    resolution: int = Field(0, ge=0)
    bits: Literal[0, 4, 8] = 0

    def open(self, dtype: torch.dtype, device: torch.device) -> Critic:
        """Load it."""
        folder = embedded_weights("critic") if self.weights == EMBEDDED else self.weights
        return find_class("critics", self.name).load(folder, dtype, device, self.resolution, self.bits)


def read_members(weights: str | Path) -> list[Member]:
    """The critics that a file lists.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no YAML, holds something else than a list, or has unknown keys.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(f"expected a YAML file that lists critics; got {weights}, which is none")
    listed = parse_yaml(Path(weights).read_text(encoding="utf-8"), str(weights))
    if not isinstance(listed, list):
        raise UserError(f"expected a list of critics in {weights}; got a {type(listed).__name__}; begin each with '- '")
    return [validate_settings(Member, entry, f"{weights}: {i}") for i, entry in enumerate(listed)]


class Ensemble(Critic):
    """See `critics/base.py` for the contract. `encode_images` gives a tuple an image: each member's visual tokens."""

    yes, no = 0, 1

    def __init__(self, members: Sequence[Critic]):
        if len(members) < 2:
            raise ValueError(f"expected two critics or more; got {len(members)}. Choose a single one by its own name.")
        self.members, self.device = list(members), members[0].device
        self.model = nn.ModuleList(m.model for m in members)
        self.names = [f"{i}-{type(m).__name__}" for i, m in enumerate(members)]
        try:
            self.grade_ids, self.grade_fault = [m.answer_ids(GRADES) for m in members], ""
        except ValueError as error:
            self.grade_ids, self.grade_fault = [], str(error)

    @classmethod
    def load(
        cls, weights: str | Path, dtype: torch.dtype, device: torch.device, resolution: int = 0, bits: int = 0
    ) -> Self:
        """Open all members that the file `weights` lists. Errors as in `Critic.load`, and UserError for unknown keys
        and names."""
        for key, value in (("resolution", resolution), ("bits", bits)):
            if value:
                raise ValueError(f"expected {key} 0, for each member has its own; got {value}; set it in {weights}")
        return cls([m.open(dtype, device) for m in read_members(weights)])

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Two members of different families."""
        return cls([find_class("critics", name).tiny(seed) for name in ("llava_onevision", "smolvlm")])

    def encode_images(self, images: Tensor) -> list[tuple]:
        """(n, 3, H, W) in [0, 1] -> n tuples, what each member sees of the image."""
        return list(zip(*(m.encode_images(images) for m in self.members)))

    def logits(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[tuple]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """(b, 2) or (b, 7), the mean of the members': plus and minus half the margin, and the digits if all members
        have them."""
        each = []
        for i, member in enumerate(self.members):
            seen = [[tokens[i] for tokens in looks] for looks in visual_tokens]
            each.append(self._shared_words(i, member.logits(questions, seen, packed, answers)))
        self.member_logits = dict(zip(self.names, (own.detach() for own in each), strict=True))
        return torch.stack(each).mean(0)

    def _shared_words(self, number: int, logits: Tensor) -> Tensor:
        """A member's logits (b, vocabulary) for the words of the ensemble, (b, 2) or (b, 7)."""
        member = self.members[number]
        half = (logits[:, member.yes] - logits[:, member.no]) / 2
        yes_no = torch.stack([half, -half], 1)
        if not self.grade_ids:
            return yes_no
        return torch.cat([yes_no, logits[:, self.grade_ids[number]].log_softmax(1)], 1)

    def answer_id(self, word: str) -> int:
        """Yes, No or a grade; the members share no other word."""
        if word in GRADES and self.grade_fault:
            raise ValueError(f"a member of the ensemble cannot answer with a grade: {self.grade_fault}")
        words = ("Yes", "No", *GRADES)
        if word not in words:
            raise ValueError(f"expected one of {', '.join(words)}, the words that members share; got {word!r}")
        return words.index(word)

    def generate_text(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]], max_tokens: int) -> list[str]:
        """The first member writes."""
        return self.members[0].generate_text(prompts, images, max_tokens)
