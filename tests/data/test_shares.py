"""`data.shares`: how often each edit type comes in an epoch, and which rows."""

from collections import Counter

import pytest
from pydantic import ValidationError

from npedit.data import imagefolder
from tests.support.photo_sets import opened, plain, refused, row, save, write_metadata

TYPES = ("recolour",) * 4 + ("add",) * 2 + ("style",)  # of each seven rows


@pytest.fixture
def many(tmp_path):
    """70 tiny pictures of three sizes: 40 recolour, 20 add, 10 style."""
    rows = []
    for i in range(70):
        width, height = ((40, 40), (50, 30), (30, 50))[i % 3]
        save(tmp_path, f"{i}.png", plain(width, height, (3 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), edit_type=TYPES[i % 7]))
    return write_metadata(tmp_path, rows)


def epoch(source, number, rows, size=1, world=1):
    per_epoch = rows // (size * world)
    return [
        item
        for index in range(number * per_epoch, (number + 1) * per_epoch)
        for rank in range(world)
        for b in [source.batch(index, size, rank, world)]
        for item in zip(b.ids, b.edit_types)
    ]


@pytest.mark.parametrize("shares", [{"style": 0.5, "add": 0.25, "recolour": 0.25}, {"stylization": 0.5}])
def test_each_epoch_has_the_shares(many, shares):
    source = opened(many, shares=shares)
    counts = Counter(kind for number in range(10) for _, kind in epoch(source, number, 70))
    wanted = {"style": 350, "add": 175, "recolour": 175} if len(shares) == 3 else None
    wanted = wanted or {"style": 350, "add": 700 / 6, "recolour": 700 / 3}
    for kind, count in wanted.items():
        assert abs(counts[kind] - count) <= 4, kind
    for number in range(10):
        of_epoch = Counter(kind for _, kind in epoch(source, number, 70))
        assert abs(of_epoch["style"] - 35) <= 6


def test_within_a_type_no_row_comes_again_before_all_others(many):
    source = opened(many, shares={"style": 0.5}, sizes=((64, 64),), max_enlargement=100, min_kept_share=0)
    counts = Counter(item for number in range(4) for item in epoch(source, number, 70))
    style = [n for (_, kind), n in counts.items() if kind == "style"]
    assert len(style) == 10 and sum(style) == 140 and set(style) == {14}
    rest = [n for (_, kind), n in counts.items() if kind == "add"]
    assert len(rest) == 20 and max(rest) - min(rest) <= 1


def test_a_share_of_zero_leaves_a_type_out(many):
    source = opened(many, shares={"style": 0.0})
    seen = Counter(item for number in range(2) for item in epoch(source, number, 60))
    assert len(seen) == 60 and set(seen.values()) == {2} and not [1 for _, kind in seen if kind == "style"]


def test_ranks_share_the_stream_and_a_batch_depends_on_its_number_alone(many):
    source, again = opened(many, shares={"style": 0.5}), opened(many, shares={"style": 0.5})
    whole = [source.batch(i, 4).ids for i in range(40)]
    for i in (39, 0, 17):
        assert again.batch(i, 4).ids == whole[i]
        assert again.batch(i, 2, 0, 2).ids + again.batch(i, 2, 1, 2).ids == whole[i]


def test_without_shares_nothing_changes(many):
    plain_order = [opened(many).batch(i, 3).ids for i in range(30)]
    assert [opened(many, shares={}).batch(i, 3).ids for i in range(30)] == plain_order


def test_shares_follow_held_out_rows(many):
    source = opened(many, shares={"style": 0.5}, held_out=9)
    held_out = {i for batch in source.held_out_batches(9) for i in batch.ids}
    assert not held_out & {i for number in range(4) for i, _ in epoch(source, number, 61)}


def test_wrong_shares_are_refused(many):
    assert "data.shares.remove" in refused(many, shares={"remove": 0.5})
    assert "add up to 1" in refused(many, shares={"style": 0.5, "add": 0.2, "recolour": 0.2})
    for wrong in ({"style": 0.8, "add": 0.5}, {"stile": 0.5}, {"style": -1}, {"style": 0.2, "stylization": 0.2}):
        with pytest.raises(ValidationError):
            imagefolder.Settings(path="x", shares=wrong)
