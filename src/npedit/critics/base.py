"""What a vision-language model must offer to serve as a critic. One file in this folder is one family of models.

The critic is frozen; gradient flows from its answer to the image it looks at. Only the logits of a question's answers
("Yes" and "No", or the digits of a grade) at the answer position are compared, in one forward pass, as in NP-Edit,
section 3. Every question has one loss: `answer_loss` of its margin (`scale_margin`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from npedit.critics._checkpointing import checkpointed_layers


class Critic(ABC):
    """See the module's head. `yes` and `no` are token ids, found in the model's own tokenizer and chat template."""

    yes: int
    no: int
    device: torch.device
    model: Any  # a transformers model: all weights, frozen; its attributes are set at run time
    member_logits: Mapping[str, Tensor] = MappingProxyType({})  # of an ensemble: each member's last logits, as `logits`

    @classmethod
    @abstractmethod
    def load(
        cls, weights: str | Path, dtype: torch.dtype, device: torch.device, resolution: int = 0, bits: int = 0
    ) -> Self:
        """Open a Hub id or a local folder. `resolution` is the side in pixels that images are scaled to; 0 is the
        model's own. A model that takes one side only refuses any other. `bits` 8 or 4 holds most weights in so few
        (`_bits.py`); 0 holds all in `dtype`.

        Raises:
            FileNotFoundError, ValueError: a part is missing, another model lies there, Yes and No are not single
            tokens, or this machine has not what few bits need.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int) -> Self:
        """The same real classes at toy size with random weights, for tests."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> list[Any]:
        """Images (n, 3, H, W) in [0, 1] -> one tensor of visual tokens (tokens, dim) an image. Differentiable; call it
        under `no_grad`, once, for images that need no gradient."""

    @abstractmethod
    def logits(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[Any]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """Next-token logits (b, vocabulary) at the answer position, in float32. `visual_tokens[i]` are those (from
        `encode_images`) of the images that question i looks at, in order. Any batch, any mix of one image and several.

        `packed` asks the questions about the same images (the same objects in the same order) in one row, which
        computes the images once; see `_packing.py`. The logits differ by rounding only.

        `answers[i]` are the answers that question i expects, Yes and No by default. Where a tokenizer writes a token
        before all of them, such as a space before digits, the answer position is after that token.
        """

    @abstractmethod
    def generate_text(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]], max_tokens: int) -> list[str]:
        """Free text for prompts about images (each (3, H, W) in [0, 1]). No gradient."""

    @abstractmethod
    def answer_id(self, word: str) -> int:
        """The token that `word` is as an answer, in the model's own chat template.

        Raises:
            ValueError: it is not a single token there.
        """

    @contextmanager
    def gradient_checkpointing(self, enabled: bool = True) -> Iterator[None]:
        """Inside the block, the model's layers keep only their inputs for the backward pass, which runs them again.
        Values are the same bit for bit. With `enabled` false nothing changes."""
        if not enabled:
            yield
            return
        with checkpointed_layers(self.model):
            yield

    def margin(self, questions: Sequence[str], visual_tokens: Sequence[Sequence[Any]], packed: bool = False) -> Tensor:
        """logit(Yes) - logit(No), (b,). `packed` as in `logits`."""
        logits = self.logits(questions, visual_tokens, packed=packed)
        return logits[:, self.yes] - logits[:, self.no]

    def answer_ids(self, answers: Sequence[str]) -> list[int]:
        """The tokens of a question's answers, at the answer position. Errors as in `answer_id`."""
        known = {"Yes": self.yes, "No": self.no}
        return [known[word] if word in known else self.answer_id(word) for word in answers]


def scale_margin(logits: Tensor, inverse_temperature: float = 1.0) -> Tensor:
    """log(e) - log(1 - e) per question (b,), where e in [0, 1] is the expected score: the sum of p_k k / (n - 1). p is
    the softmax of `inverse_temperature` times the logits (b, n) of the n answers, the lowest first.

    Two answers (No, Yes) give inverse_temperature * (logit(Yes) - logit(No)), and e = p(Yes). With five grades
    e = (expected grade - 1) / 4. So `answer_loss` is -log(e) where the highest answer is wanted, and -log(1 - e) where
    the lowest is. Unlike the squared distance of e to the wanted score, this loss has a gradient where the critic is
    sure of the wrong end of the scale. Where the critic is sure of an answer in the middle, both have almost none.
    """
    if logits.shape[1] == 2:
        return inverse_temperature * (logits[:, 1] - logits[:, 0])
    scores = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    scaled = inverse_temperature * logits
    return torch.logsumexp(scaled + scores.log(), 1) - torch.logsumexp(scaled + scores.flip(0).log(), 1)


def question_margins(
    logits: Tensor,
    answers: Sequence[tuple[str, ...]],
    token_ids: Mapping[tuple[str, ...], Sequence[int]],
    inverse_temperature: float = 1.0,
) -> Tensor:
    """`scale_margin` of each question (b,). logits (b, vocabulary); `answers` are each question's answers, the lowest
    first; `token_ids` has the tokens of each of these scales."""
    margins, order = [], list[int]()
    for scale in dict.fromkeys(answers):
        rows = [row for row, those in enumerate(answers) if those == scale]
        chosen = logits[torch.tensor(rows)[:, None], torch.tensor(token_ids[scale])]
        margins.append(scale_margin(chosen, inverse_temperature))
        order += rows
    return torch.cat(margins)[torch.tensor(order).argsort()]


def answer_loss(margin: Tensor, answer: Tensor, inverse_temperature: float = 1.0) -> Tensor:
    """-log p(answer) per question (b,), p = sigmoid(answer * inverse_temperature * margin); answer is +1 (Yes) or -1
    (No).

    Gradient flows to `margin`. Source: NP-Edit, section 3, the two-way form.
    """
    return F.softplus(-answer.to(margin.dtype) * inverse_temperature * margin)


def vocabulary_loss(logits: Tensor, answer: Tensor, yes: int, no: int, inverse_temperature: float = 1.0) -> Tensor:
    """-log p(answer) per question (b,) over the whole vocabulary, the paper's ablation. logits (b, vocabulary)."""
    target = torch.where(answer > 0, yes, no).to(logits.device)
    return F.cross_entropy(inverse_temperature * logits, target, reduction="none")


def answer_scale(tokenizer, prompt: str, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """(tokens that begin all of these answers, the one further token of each answer), right after `prompt`.

    Raises:
        ValueError: an answer has more or fewer further tokens, or is an unknown word.
    """
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    rows = [tokenizer(prompt + word, add_special_tokens=False).input_ids for word in words]
    lead = [same[0] for same in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]
    ids = [row[len(lead) :] for row in rows]
    known = all(len(new) == 1 and new[0] != tokenizer.unk_token_id for new in ids)
    if not known or lead[: len(before)] != before:
        got = ", ".join(str(tokenizer.convert_ids_to_tokens(row[len(before) :])) for row in rows)
        raise ValueError(
            f"expected the answers {', '.join(map(repr, words))} to differ in one token each after the prompt; got "
            f"{got}. This model cannot be asked questions with these answers."
        )
    return lead[len(before) :], [new for (new,) in ids]


def answer_token(tokenizer, prompt: str, word: str) -> int:
    """The id of the one token that `word` becomes right after `prompt`, as the tokenizer really splits the two
    together.

    Raises:
        ValueError: the answer is not a single token there, or is an unknown word.
    """
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(prompt + word, add_special_tokens=False).input_ids
    new = after[len(before) :]
    if after[: len(before)] != before or len(new) != 1 or new[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"expected the answer {word!r} to be one token after the prompt; got {new} "
            f"({tokenizer.convert_ids_to_tokens(new)}). This model cannot be asked questions with this answer."
        )
    return new[0]
