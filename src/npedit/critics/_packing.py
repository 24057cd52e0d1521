"""Ask several questions about the same images in one row: the images once, then the tokens of each question.

A row is the prefix that all its questions have in common, then the rest of each question. A token sees the prefix and
the earlier tokens of its own question (a block-causal mask). The positions of each question continue from the end of
the prefix. So each question has the logits that it has alone, up to rounding, and the prefix is computed once.

A question can share a row only if its images stand before the words in which it differs from the others. A chat
template that puts the words first leaves each question in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """One row of token ids about `pictures`, the visual tokens of its images in order.

    `questions[i]` is the number of the question whose last token is at `ends[i]`. The first `prefix` tokens belong to
    all questions of the row.
    """

    ids: list[int]
    prefix: int
    questions: list[int]
    ends: list[int]
    pictures: Sequence[Tensor]

    def blocks(self) -> Iterator[int]:
        """For each token: 0 in the prefix, else the number of its question in this row, from 1."""
        yield from [0] * self.prefix
        for number, length in enumerate(self._lengths(), 1):
            yield from [number] * length

    def shifts(self) -> Iterator[int]:
        """For each token: how far its position in this row is behind its position in a row of its question alone."""
        yield from [0] * self.prefix
        shift = 0
        for length in self._lengths():
            yield from [shift] * length
            shift += length

    def _lengths(self) -> list[int]:
        starts = [self.prefix, *(end + 1 for end in self.ends)]
        return [end + 1 - start for start, end in zip(starts, self.ends)]


def can_pack(model: Any) -> bool:
    """Can the language model of this transformers model take packed rows? Layers with a sliding window cannot: the
    mask of a packed row stands in place of the window's."""
    return "sliding_attention" not in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def pack_rows(
    rows: Sequence[list[int]], visual_tokens: Sequence[Sequence[Tensor]], image_token: int
) -> list[PackedRow]:
    """Rows of token ids -> rows that ask all questions about the same images in the same order.

    Images are the same if they are the same tensor objects. Questions whose common prefix does not contain all their
    images stay in rows of their own.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, pictures in enumerate(visual_tokens):
        groups.setdefault(tuple(id(picture) for picture in pictures), []).append(number)
    packed = []
    for numbers in groups.values():
        packed += _pack_group(rows, numbers, visual_tokens[numbers[0]], image_token)
    return packed


def _pack_group(
    rows: Sequence[list[int]], numbers: list[int], pictures: Sequence[Tensor], image_token: int
) -> list[PackedRow]:
    together = [rows[number] for number in numbers]
    prefix = min(_common_length(together), min(len(row) for row in together) - 1)  # each question keeps its last token
    if len(numbers) == 1 or together[0][:prefix].count(image_token) != together[0].count(image_token):
        return [PackedRow(rows[n], len(rows[n]) - 1, [n], [len(rows[n]) - 1], pictures) for n in numbers]
    ids, ends = list(together[0][:prefix]), []
    for row in together:
        ids += row[prefix:]
        ends.append(len(ids) - 1)
    return [PackedRow(ids, prefix, numbers, ends, pictures)]


def _common_length(rows: Iterable[Sequence[int]]) -> int:
    """How many tokens at the start are the same in all rows."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows)))


def block_causal_mask(rows: Sequence[PackedRow], device: torch.device) -> Tensor:
    """(b, 1, length, length) bool, true where a token (row) sees a token (column). Padding is on the right."""
    blocks = _padded([list(row.blocks()) for row in rows], -1)
    same = blocks[:, :, None] == blocks[:, None, :]
    prefix = (blocks == 0)[:, None, :]
    causal = torch.ones(2 * blocks.shape[-1:], dtype=torch.bool).tril()
    return ((same | prefix) & causal)[:, None].to(device)


def position_shifts(rows: Sequence[PackedRow], device: torch.device) -> Tensor:
    """(b, length): what to subtract from the positions of each token. Padding is on the right."""
    return _padded([list(row.shifts()) for row in rows], 0).to(device)


def packed_inputs(rows: Sequence[PackedRow], extras: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs of a language model for these rows: the mask and the positions, and the `extras` that it has anyway."""
    shifts = position_shifts(rows, device)
    positions = extras.get("position_ids", torch.arange(shifts.shape[-1], device=device))
    return {**extras, "attention_mask": block_causal_mask(rows, device), "position_ids": positions - shifts}


def answer_positions(rows: Sequence[PackedRow], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of the last token of each question, in the order of the questions, each (questions,)."""
    places = {n: (i, end) for i, row in enumerate(rows) for n, end in zip(row.questions, row.ends)}
    found = torch.tensor([places[n] for n in range(len(places))], device=device)
    return found[:, 0], found[:, 1]


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
