"""Do instruction, source caption and target caption of a row belong together? Judged by their words alone.

A caption may leave things out, so one row proves little. The findings are about shares of many rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from npedit.questions import IDENTITY_EDIT

STOP_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "into", "with", "from", "by", "for", "is", "are",
     "there", "it", "its", "this", "that", "be", "make", "made", "change", "turn", "put", "as", "photo", "picture",
     "image", "scene", "shows", "show")
)  # fmt: skip
OTHERS = 8  # other rows that each row's target caption is compared with


class Texts(Protocol):
    """The texts of one row, as this file needs them."""

    @property
    def id(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def edit_type(self) -> str: ...
    @property
    def object(self) -> str: ...
    @property
    def source_caption(self) -> str: ...
    @property
    def target_caption(self) -> str: ...


@dataclass(frozen=True)
class CaptionAgreement:
    """How captions and instructions agree. `repeated` and `against` are rows: the target caption repeats the source's;
    the captions say the opposite of the instruction. `own` is the probability that a row's target caption shares more
    words with its own row than with another row (0.5: captions belong to no row in particular); None where too few
    rows have the texts."""

    compared: int
    repeated: tuple[str, ...]
    directed: int  # rows whose captions have words for or against their instruction
    against: tuple[str, ...]
    own: float | None


def content_words(text: str) -> frozenset[str]:
    """The words of a text in lower case, without articles, prepositions and the like."""
    return frozenset(re.findall(r"\w+", text.lower())) - STOP_WORDS


def compare_captions(rows: Sequence[Texts], seed: int = 0) -> CaptionAgreement:
    """How the captions of these rows agree with each other and with their instructions."""
    both = [r for r in rows if r.source_caption and r.target_caption and r.edit_type != IDENTITY_EDIT]
    repeated = [r.id for r in both if _plain(r.source_caption) == _plain(r.target_caption)]
    directions = {r.id: _direction(r) for r in both}
    return CaptionAgreement(
        compared=len(both),
        repeated=tuple(repeated),
        directed=sum(direction != 0 for direction in directions.values()),
        against=tuple(key for key, direction in directions.items() if direction < 0),
        own=_own_probability(both, random.Random(seed)),
    )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _direction(row: Texts) -> int:
    """+1 if the captions change as the instruction asks, -1 if they change the other way, 0 if they do not tell.

    The words of the instruction that the target caption gains are what the edit brings; those that it loses are what
    the edit takes away. Only the types whose direction is certain count: adding gains, removing loses.
    """
    asked = content_words(f"{row.instruction} {row.object}")
    source, target = content_words(row.source_caption), content_words(row.target_caption)
    gained, lost = len(asked & (target - source)), len(asked & (source - target))
    if row.edit_type == "add":
        return (gained > lost) - (gained < lost)
    if row.edit_type == "remove":
        return (lost > gained) - (lost < gained)
    return int(gained > 0) - int(gained == 0 and lost > 0)


def _own_probability(rows: Sequence[Texts], rng: random.Random) -> float | None:
    """See `CaptionAgreement.own`. None for fewer than ten rows, and for captions that are not written in words."""
    if len(rows) < 10 or sum(len(content_words(r.target_caption)) for r in rows) < 2 * len(rows):
        return None
    known = [content_words(f"{r.source_caption} {r.instruction} {r.object}") for r in rows]
    total = 0.0
    for number, row in enumerate(rows):
        target = content_words(row.target_caption)
        mine = len(target & known[number])
        for _ in range(OTHERS):
            other = len(target & known[(number + rng.randrange(1, len(rows))) % len(rows)])
            total += (mine > other) + 0.5 * (mine == other)
    return total / (len(rows) * OTHERS)
