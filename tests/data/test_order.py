"""In which order a folder's rows come, which have nothing to do, and what identifies the data."""

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch

from npedit.data import _example, toy
from npedit.questions import IDENTITY_EDIT, IDENTITY_INSTRUCTIONS
from tests.support.photo_sets import SMALL, opened, plain, row, save, write_metadata


@pytest.fixture
def many(tmp_path):
    """24 tiny pictures: 8 square, 12 wide, 4 tall; every batch size here divides the buckets."""
    rows = []
    for i in range(24):
        width, height = (40, 40) if i < 8 else (50, 30) if i < 20 else (30, 50)
        save(tmp_path, f"{i}.png", plain(width, height, (10 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), source_caption="a plain picture"))
    return write_metadata(tmp_path, rows)


# ---- order (faults 7 and 8)


def epoch_ids(source, epoch, size, world=1):
    per_epoch = 24 // (size * world)
    indices = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return [source.batch(i, size, rank, world).ids for i in indices for rank in range(world)]


@pytest.mark.parametrize(("size", "world"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_each_epoch_visits_every_row_once(many, size, world):
    source = opened(many)
    for epoch in range(3):
        ids = [i for batch in epoch_ids(source, epoch, size, world) for i in batch]
        assert sorted(map(int, ids)) == list(range(24))


def test_a_share_of_the_rows_is_drawn_by_lot_and_smaller_shares_are_part_of_larger(many):
    def members(share, seed=0):
        source = opened(many, seed, share=share)
        return {r.id for r in source.rows}, {i for index in range(40) for i in source.batch(index, 1).ids}

    quarter, half = members(0.25), members(0.5)
    assert quarter[0] == quarter[1] and len(quarter[0]) == 6 and len(half[0]) == 12
    assert quarter[0] < half[0] and quarter == members(0.25, seed=1)
    assert quarter[0] != {str(i) for i in range(6)} and len(members(0.001)[0]) == 1


def test_epochs_are_shuffled_anew(many):
    source = opened(many)
    orders = [tuple(epoch_ids(source, epoch, 2)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert len({frozenset(map(frozenset, order)) for order in orders}) == 4, "the batches' members change too"


def test_a_batch_is_of_one_bucket_and_buckets_are_mixed(many):
    source = opened(many)
    shapes = []
    for index in range(6 * 10):
        batch = source.batch(index, 4)
        kinds = {(int(i) >= 8) + (int(i) >= 20) for i in batch.ids}
        assert len(kinds) == 1
        assert batch.references.shape == (4, 3, *SMALL[kinds.pop()])
        shapes.append(tuple(batch.references.shape[2:]))
    assert Counter(shapes) == {SMALL[0]: 20, SMALL[1]: 30, SMALL[2]: 10}
    assert shapes[:6] != sorted(shapes[:6]) or shapes[6:12] != sorted(shapes[6:12])


@pytest.mark.parametrize("size", [3, 5, 7])
def test_no_row_is_left_out_where_the_batch_does_not_divide(many, size):
    """24 rows, batches of `size`: after `size` epochs each row came exactly `size` times, whatever its bucket holds."""
    source = opened(many)
    seen = Counter(i for index in range(24) for i in source.batch(index, size).ids)
    assert seen == {str(i): size for i in range(24)}


def test_a_batch_larger_than_the_data_works(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    source = opened(write_metadata(tmp_path, [row("a.png", id="a")]))
    assert source.batch(0, 8).ids == source.batch(5, 8).ids == ("a",) * 8


def test_ranks_are_disjoint_and_make_up_the_whole(many):
    source = opened(many)
    for index in range(12):
        parts = [source.batch(index, 2, rank, 2) for rank in range(2)]
        assert not set(parts[0].ids) & set(parts[1].ids)
        whole = source.batch(index, 4)
        assert parts[0].ids + parts[1].ids == whole.ids
        assert torch.equal(torch.cat([p.references for p in parts]), whole.references)


def test_a_batch_depends_on_seed_and_index_alone(many):
    a, b, other = opened(many), opened(many, prefetch=3), opened(many, seed=1)
    run = [a.batch(i, 4) for i in range(12)]
    for i in (11, 0, 5, 6, 7, 2):
        again = b.batch(i, 4)
        assert again.ids == run[i].ids
        assert torch.equal(again.references, run[i].references)
    assert [other.batch(i, 4).ids for i in range(12)] != [r.ids for r in run]


def test_global_random_numbers_are_left_alone(many):
    torch.manual_seed(0)
    np.random.seed(0)
    opened(many).batch(0, 4)
    opened(many).batch(0, 4)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert after == (torch.rand(1), np.random.rand())


def test_batches_are_made_ahead(many, monkeypatch):
    source = opened(many, prefetch=2)
    real, made = _example.load_photo, []
    monkeypatch.setattr(_example, "load_photo", lambda *a: made.append(a) or real(*a))
    source.batch(0, 4)
    deadline = time.monotonic() + 10
    while len(made) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 12
    source.batch(1, 4)


def test_impossible_ranks_and_sizes_are_refused(many):
    for wrong in ((0, 0, 0, 1), (-1, 4, 0, 1), (0, 4, 2, 2)):
        with pytest.raises(ValueError, match="rank < world"):
            opened(many).batch(*wrong)
        with pytest.raises(ValueError, match="rank < world"):
            toy.Source(toy.Settings(), 0).batch(*wrong)


# ---- the fingerprint


def test_the_fingerprint_follows_the_data_and_not_the_place(many, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    before = opened(many).fingerprint()
    assert before == opened(many, seed=3).fingerprint()
    many.rename(moved)
    assert opened(moved).fingerprint() == before
    plain(300, 300).save(moved / "3.png")
    changed = opened(moved).fingerprint()
    assert changed != before
    with (moved / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row("4.png")) + "\n")
    assert opened(moved).fingerprint() not in (before, changed)


# ---- nothing to do (fault 3)


def test_some_items_have_nothing_to_do(many):
    source = opened(many, nothing_share=0.25)
    items = [b for index in range(100) for b in zip(*_columns(source.batch(index, 4)), strict=True)]
    nothing = [i for i in items if i[1] == IDENTITY_EDIT]
    assert 0.18 < len(nothing) / len(items) < 0.32
    for instruction, _, thing, caption in nothing:
        assert instruction in IDENTITY_INSTRUCTIONS
        assert (thing, caption) == ("", "a plain picture"), "described by its own caption, not by the edit's"
    assert {i[3] for i in items if i[1] != IDENTITY_EDIT} == {"blue"}


def _columns(batch):
    return batch.instructions, batch.edit_types, batch.objects, batch.target_captions


def test_without_a_caption_of_its_own_no_item_is_turned(tmp_path):
    """Its only caption tells of the edit, and "do nothing" would contradict it."""
    save(tmp_path, "a.png", plain(64, 64))
    source = opened(write_metadata(tmp_path, [row("a.png")]), nothing_share=1.0)
    assert source.batch(0, 4).edit_types == ("recolour",) * 4
    bare = {"file_name": "a.png", "instruction": "make it blue"}
    source = opened(write_metadata(tmp_path, [bare]), nothing_share=1.0)
    assert source.batch(0, 4).edit_types == (IDENTITY_EDIT,) * 4


def test_nothing_to_do_can_stand_in_the_data(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    rows = [{"file_name": "a.png", "instruction": "leave it", "edit_type": "do_nothing", "source_caption": "a wall"}]
    source = opened(write_metadata(tmp_path, rows))
    assert source.has_target_captions
    assert _columns(source.batch(0, 1)) == (("leave it",), (IDENTITY_EDIT,), ("",), ("a wall",))
