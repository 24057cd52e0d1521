"""What a text encoder does not read: the end of a prompt that has more tokens than the encoder takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 80


def text_after_tokens(tokenizer: PreTrainedTokenizerBase, limit: int, text: str) -> str:
    """The end of a text, from its token number `limit` on; "" for a text of at most `limit` tokens."""
    if text.isascii() and len(text) < limit:  # an ASCII character gives one token at most, and one may stand before
        return ""
    offsets = tokenizer.is_fast
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=offsets)
    if len(found.input_ids) <= limit:
        return ""
    return text[found["offset_mapping"][limit][0] :] if offsets else tokenizer.decode(found.input_ids[limit:])


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many tokens a text has, without those that a tokenizer puts around it."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


class TruncatesPrompts(Protocol):
    """A family, as far as this file needs it."""

    def truncated_part(self, texts: Sequence[str]) -> list[str]:
        """See `Family.truncated_part`."""


def truncation_message(family: TruncatesPrompts, texts: Iterable[tuple[str, str]]) -> str:
    """A sentence that counts the rows with a text that the family's text encoder truncates, and names the worst; "" if
    there is none. `texts` are (name of the row, text); a row may come with several texts."""
    rows, worst, lost = set(), "", ""
    for name, text in texts:
        (part,) = family.truncated_part([text])
        if part:
            rows.add(name)
            if len(part) > len(lost):
                worst, lost = name, part
    if not rows:
        return ""
    shown = lost if len(lost) <= SHOWN_CHARACTERS else lost[:SHOWN_CHARACTERS] + "..."
    return (
        f"{len(rows)} rows have an instruction or a caption that is longer than the text encoder takes; the end is not "
        f"read. The worst is {worst}, of which this is lost: {shown!r}. Shorten these texts."
    )
