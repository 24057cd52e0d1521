"""The toy's pairs: the very items of `toy`, each with its true edit."""

from __future__ import annotations

import random

import pytest
import torch

from npedit.data import PairedBatch, toy, toy_pairs
from npedit.errors import UserError
from npedit.questions import IDENTITY_EDIT
from npedit.recipe.config import validate_settings
from npedit.toy.edits import sample_edit
from npedit.toy.oracle import judge_edit, read_scene
from npedit.toy.world import render


def source(seed: int = 0) -> toy_pairs.Source:
    return toy_pairs.Source(toy_pairs.Settings(), seed)


def test_items_are_those_of_toy_without_do_nothing() -> None:
    pairs, plain = source(3).batch(2, 5), toy.Source(toy.Settings(nothing_share=0.0), 3).batch(2, 5)
    assert isinstance(pairs, PairedBatch) and not isinstance(plain, PairedBatch)
    assert torch.equal(pairs.references, plain.references)
    for name in ("ids", "instructions", "edit_types", "objects", "source_captions", "target_captions"):
        assert getattr(pairs, name) == getattr(plain, name), name
    assert IDENTITY_EDIT not in source(3).batch(0, 300).edit_types


def test_the_edited_images_are_the_true_edits() -> None:
    """Item i of a batch is the edit of stream SEED/NUMBER, and the oracle finds it carried out."""
    given = source(5).batch(1, 6)
    edits = [sample_edit(random.Random(f"5/{i}")) for i in range(6, 12)]
    assert torch.equal(given.edited, render([e.target for e in edits]))
    assert given.edited.shape == given.references.shape == (6, 3, 32, 32)
    assert not torch.equal(given.edited, given.references)
    for edit, reading in zip(edits, read_scene(given.edited), strict=True):
        assert judge_edit(edit, reading) == (True, True)


def test_ranks_are_disjoint_and_make_up_the_whole() -> None:
    whole = source().batch(1, 4)
    halves = [source().batch(1, 2, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([h.edited for h in halves]), whole.edited)
    assert sum((h.ids for h in halves), ()) == whole.ids


def test_seeds_differ_and_repeat() -> None:
    assert torch.equal(source(1).batch(0, 4).edited, source(1).batch(0, 4).edited)
    assert not torch.equal(source(1).batch(0, 4).edited, source(2).batch(0, 4).edited)


def test_it_is_marked_as_pairs_and_toy_is_not() -> None:
    assert source().has_pairs and source().has_source_captions and source().has_target_captions
    assert not getattr(toy.Source(toy.Settings(), 0), "has_pairs", False)


def test_pairs_that_do_nothing_cannot_be_had() -> None:
    with pytest.raises(UserError, match="nothing_share"):
        validate_settings(toy_pairs.Settings, {"nothing_share": 0.5}, "data")


def test_a_few_pairs_come_over_and_over() -> None:
    few = toy_pairs.Source(toy_pairs.Settings(items=5), 3)
    given = few.batch(0, 10)
    assert sorted(given.ids[:5]) == sorted(given.ids[5:]) == [f"3/{i}" for i in range(5)]
    for name, reference, edited in zip(given.ids, given.references, given.edited):
        edit = sample_edit(random.Random(name))
        assert torch.equal(render([edit.reference, edit.target]), torch.stack([reference, edited]))
