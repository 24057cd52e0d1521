"""Items in proportion to weights that change in the course of a run (`reweigh`), as sampling by failure sets them."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from npedit.data import toy
from npedit.data._order import Order, plain_groups, shared_groups, weighted_groups
from tests.support.photo_sets import opened, plain, row, save, write_metadata

KINDS = ("recolour", "remove", "add")
FAILURES = {"recolour": 0.25, "remove": 0.5, "add": 1.0}  # weights of types


def by_type(name: str, edit_type: str) -> float:
    return FAILURES.get(edit_type, 0.125)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pictures of two shapes and three edit types; ids are numbers."""
    root, rows = tmp_path_factory.mktemp("weights"), []
    for i in range(24):
        save(root, f"{i}.png", plain(*((40, 40) if i < 12 else (50, 30)), (10 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), source_caption="a plain picture", edit_type=KINDS[i % 3], object="dot"))
    return write_metadata(root, rows)


def uses(groups, size: int = 1, batches: int = 7 * 8 * 24) -> Counter:
    """How often each row is used in the first batches."""
    order = Order(3, groups)
    places = [order.locate_batch(i, size) for i in range(batches)]
    return Counter(next(order.candidates(bucket, number * size + k)) for bucket, number in places for k in range(size))


def test_rows_are_used_in_proportion_to_their_weights():
    """The shares of known weights: exact but for one unfinished epoch."""
    weights = np.tile([0.25, 0.5, 1.0], 8)
    found = uses(weighted_groups(plain_groups([np.arange(12), np.arange(12, 24)]), weights))
    total = 7 * 8 * 24
    assert sum(found.values()) == total
    for number, weight in enumerate(weights):
        assert found[number] == pytest.approx(total * weight / weights.sum(), abs=3)


def test_weights_multiply_the_shares_of_a_recipe():
    types = np.array(["a", "b"] * 6)
    groups, _ = shared_groups([np.arange(12)], types, {"a": 0.75})
    found = uses(weighted_groups(groups, np.where(types == "a", 0.25, 1.0)), batches=1200)
    of_a = sum(n for number, n in found.items() if types[number] == "a")
    assert of_a == pytest.approx(1200 * 0.75 * 0.25 / (0.75 * 0.25 + 0.25 * 1.0), abs=4)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_equal_weights_change_nothing(folder, weight):
    usual, weighed = opened(folder), opened(folder)
    weighed.reweigh(lambda name, edit_type: weight)
    assert [usual.batch(i, 4).ids for i in range(9)] == [weighed.batch(i, 4).ids for i in range(9)]


def test_no_row_is_left_out():
    weights = np.where(np.arange(24) == 5, 1.0, 0.01)
    assert set(uses(weighted_groups(plain_groups([np.arange(24)]), weights))) == set(range(24))


def test_batches_made_ahead_are_dropped_when_weights_change(folder):
    ahead, later = opened(folder, prefetch=2), opened(folder, prefetch=0)
    assert ahead.batch(0, 4).ids == later.batch(0, 4).ids
    for source in (ahead, later):
        source.reweigh(by_type)
    batches = [ahead.batch(i, 4).ids for i in range(1, 9)]
    assert batches == [later.batch(i, 4).ids for i in range(1, 9)]
    assert batches != [opened(folder).batch(i, 4).ids for i in range(1, 9)]


@pytest.mark.parametrize("make", [lambda root: opened(root, prefetch=0), lambda root: toy.Source(toy.Settings(), 2),
                                  lambda root: toy.Source(toy.Settings(items=20), 2)])  # fmt: skip
def test_two_ranks_together_see_what_one_process_sees(folder, make):
    source = make(folder)
    source.reweigh(by_type)
    for index in range(4):
        halves = [source.batch(index, 2, rank, 2).ids for rank in range(2)]
        assert sum(halves, ()) == source.batch(index, 4).ids


# -------------------------------------------------------------------------------------------------------------- toy


def close(count: int, share: float, total: int) -> bool:
    """Whether a count is within four standard deviations of what a share gives."""
    return abs(count - share * total) < 4 * (share * (1 - share) * total) ** 0.5


def drawn(source: toy.Source, count: int) -> list[int]:
    return [source._number_at(place) for place in range(count)]


def test_toy_types_come_in_proportion_to_their_weights():
    source = toy.Source(toy.Settings(edit_types=KINDS), 4)
    source.reweigh(by_type)
    edits = [source._sample_edit(number, source._generator(number)) for number in drawn(source, 2000)]
    found = Counter(edit.edit_type for edit in edits)
    assert all(close(found[kind], FAILURES[kind] / 1.75, 2000) for kind in KINDS), found


def test_toy_items_of_a_finite_set_come_in_proportion_to_their_weights():
    source = toy.Source(toy.Settings(items=8, first=100), 4)
    failing = {"4/103": 1.0, "4/106": 1.0}
    source.reweigh(lambda name, edit_type: failing.get(name, 0.25))
    found = Counter(drawn(source, 4000))
    assert set(found) == set(range(100, 108))
    assert all(close(found[100 + i], (1.0 if i in (3, 6) else 0.25) / 3.5, 4000) for i in range(8)), found


def test_toy_items_without_weights_are_what_they_were():
    source = toy.Source(toy.Settings(), 0)
    assert drawn(source, 5) == [0, 1, 2, 3, 4]
    source.reweigh(lambda name, edit_type: 1.0)
    assert drawn(source, 5) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------ masks


def test_toy_masks_are_the_cells_that_the_edit_leaves():
    source = toy.Source(toy.Settings(masks=True, nothing_share=0.0), 1)
    given = source.batch(0, 200)
    numbered = source._numbered_generators(0, 200)
    anywhere = 0
    for mask, (number, rng) in zip(given.keep_mask, numbered, strict=True):
        edit = source._sample_edit(number, rng)
        free = edit.reference.empty if edit.edit_type == "add" and edit.to_cell < 0 else edit.changed_cells
        anywhere += edit.edit_type == "add" and edit.to_cell < 0
        cells = [mask[0, top : top + 16, left : left + 16] for top, left in itertools.product((0, 16), (0, 16))]
        assert [float(cell.mean()) for cell in cells] == [0.0 if cell in free else 1.0 for cell in range(4)]
        assert edit.edit_type in ("background", "style") or mask.any()
    assert anywhere
    assert toy.Source(toy.Settings(), 1).batch(0, 2).keep_mask is None


def test_toy_masks_keep_what_is_alike_in_reference_and_target():
    """No pixel that must stay differs between the two scenes, drawn here for the test alone."""
    from npedit.toy.world import render

    source = toy.Source(toy.Settings(masks=True, nothing_share=0.0), 1)
    edits = [source._sample_edit(*numbered) for numbered in source._numbered_generators(0, 60)]
    change = (render([e.reference for e in edits]) - render([e.target for e in edits])).abs()
    assert not (change * source.batch(0, 60).keep_mask).any()
