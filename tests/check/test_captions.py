"""Whether instruction and captions of a row belong together, by their words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from npedit.check.captions import compare_captions, content_words
from npedit.data import Example


def example(number: int, kind: str, instruction: str, thing: str, before: str, after: str) -> Example:
    return Example(str(number), torch.zeros(3, 8, 8), instruction, kind, thing, before, after)


THINGS = ("car", "dog", "tree", "lamp", "boat", "chair", "bird", "fence", "clock", "horse", "tower", "bridge")
ADDED = [example(i, "add", f"add a {t}", t, f"a street number {i}", f"a street number {i} with a {t}")
         for i, t in enumerate(THINGS)]  # fmt: skip
REMOVED = [example(i, "remove", f"remove the {t}", t, f"a {t} on street {i}", f"street {i}")
           for i, t in enumerate(THINGS)]  # fmt: skip


def test_articles_and_the_like_are_no_content() -> None:
    assert content_words("Change the car, in THE picture, to red!") == {"car", "red"}


@pytest.mark.parametrize("rows", [ADDED, REMOVED], ids=["add", "remove"])
def test_captions_that_follow_their_instruction(rows) -> None:
    found = compare_captions(rows)
    assert (found.compared, found.repeated, found.directed, found.against) == (12, (), 12, ())
    assert found.own == 1.0


@pytest.mark.parametrize("rows", [ADDED, REMOVED], ids=["add", "remove"])
def test_source_and_target_exchanged(rows) -> None:
    changed = [replace(e, source_caption=e.target_caption, target_caption=e.source_caption) for e in rows]
    assert len(compare_captions(changed).against) == 12


def test_target_captions_of_other_rows() -> None:
    shifted = [replace(e, target_caption=ADDED[i - 1].target_caption) for i, e in enumerate(ADDED)]
    found = compare_captions(shifted)
    assert found.own is not None and found.own < 0.55


def test_repeated_captions_are_found_whatever_their_case_and_punctuation() -> None:
    rows = [replace(e, target_caption=e.source_caption.upper() + ".") for e in ADDED[:3]] + ADDED[3:]
    assert compare_captions(rows).repeated == ("0", "1", "2")


def test_rows_without_captions_and_do_nothing_rows_are_not_compared() -> None:
    rows = [replace(ADDED[0], source_caption=""), replace(ADDED[1], target_caption=""),
            replace(ADDED[2], edit_type="nothing", target_caption=ADDED[2].source_caption)]  # fmt: skip
    found = compare_captions(rows)
    assert (found.compared, found.repeated, found.own) == (0, (), None)


def test_captions_that_are_not_in_separate_words_are_not_compared_between_rows() -> None:
    rows = [replace(e, source_caption="街上", target_caption="街上有车") for e in ADDED]
    assert compare_captions(rows).own is None
