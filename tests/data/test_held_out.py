"""`data.held_out`: which rows it names, that they are never trained on, and that nothing else moves."""

from __future__ import annotations

import pytest

from npedit.errors import UserError
from tests.support.photo_sets import SMALL, opened, plain, refused, row, save, write_metadata

TYPES = ("recolour", "background", "add", "style")


@pytest.fixture
def many(tmp_path):
    """24 tiny pictures of three sizes (8, 12, 4) and four edit types."""
    rows = []
    for i in range(24):
        width, height = (40, 40) if i < 8 else (50, 30) if i < 20 else (30, 50)
        save(tmp_path, f"{i}.png", plain(width, height, (10 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), edit_type=TYPES[i % 4], object="thing"))
    return write_metadata(tmp_path, rows)


def trained_ids(source, size=1, world=1, batches=72):
    return {
        i for index in range(batches // (size * world)) for rank in range(world)
        for i in source.batch(index, size, rank, world).ids
    }  # fmt: skip


def held_out_ids(source, count=24):
    return [i for batch in source.held_out_batches(count) for i in batch.ids]


@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (2, 2)])
def test_held_out_rows_are_never_trained_on(many, size, world):
    source = opened(many, held_out=6)
    held_out = set(held_out_ids(source))
    assert len(held_out) == 6 and len(source) == 18
    assert trained_ids(source, size, world) == {str(i) for i in range(24)} - held_out


def test_a_held_out_row_does_not_replace_a_bad_one(many):
    source = opened(many, held_out=6, max_bad_share=0.9)
    held_out = set(held_out_ids(source))
    for i in range(24):
        if str(i) not in held_out and i % 2:
            (many / f"{i}.png").write_bytes(b"damaged after the start")
    assert not trained_ids(source) & held_out


def test_every_size_and_edit_type_is_represented(many):
    source = opened(many, held_out=4)
    batches = source.held_out_batches(4)
    assert {tuple(batch.references.shape[2:]) for batch in batches} == set(SMALL)
    assert {edit_type for batch in batches for edit_type in batch.edit_types} == set(TYPES)


def test_the_lot_follows_neither_seed_nor_order_and_a_smaller_set_is_part_of_a_larger(many):
    lines = (many / "metadata.jsonl").read_text().splitlines()
    first = set(held_out_ids(opened(many, held_out=6)))
    assert first == set(held_out_ids(opened(many, seed=5, held_out=6)))
    assert set(held_out_ids(opened(many, held_out=3))) < first
    assert set(held_out_ids(opened(many, held_out=6), count=3)) == set(held_out_ids(opened(many, held_out=3)))
    write_metadata(many, lines[::-1])
    assert set(held_out_ids(opened(many, held_out=6))) == first


def test_without_held_out_rows_the_order_is_as_before(many):
    plain_order = [opened(many).batch(i, 4).ids for i in range(12)]
    source = opened(many, held_out=0)
    assert [source.batch(i, 4).ids for i in range(12)] == plain_order and source.held_out_batches(3) == []
    source = opened(many, held_out=6)
    source.hold_out([])
    assert [source.batch(i, 4).ids for i in range(12)] == plain_order
    assert (
        opened(many).fingerprint() == opened(many, held_out=0).fingerprint() != opened(many, held_out=6).fingerprint()
    )


def test_a_file_of_ids_names_the_rows(many):
    (many / "held out.txt").write_text("3\n\n21\n 8 \n")
    source = opened(many, held_out="held out.txt")
    assert set(held_out_ids(source)) == {"3", "21", "8"} and not trained_ids(source) & {"3", "21", "8"}
    assert held_out_ids(opened(many, held_out=str(many / "held out.txt")), count=1) == ["3"]


def test_a_share_is_drawn_from_the_rows_that_a_file_does_not_name(many):
    (many / "ids.txt").write_text("0\n2\n21\n10\n")
    named, before = {"0", "2", "21", "10"}, set[str]()
    for share in (0.05, 0.25, 0.5, 1):
        source = opened(many, held_out="ids.txt", share=share)
        trained = trained_ids(source)
        assert len(source) == len(trained) == round(20 * share)
        assert (
            held_out_ids(source) == held_out_ids(opened(many, held_out="ids.txt"))
            and set(held_out_ids(source)) == named
        )
        assert before <= trained and not trained & named
        before = trained
    (many / "ids.txt").write_text("0\n77\n")
    assert "'77' (1 of 2 ids are unknown)" in refused(many, held_out="ids.txt", share=0.5)
    write_metadata(many, [row(f"{i}.png", id=str(i), group="g" if i < 3 else "") for i in range(24)])
    (many / "ids.txt").write_text("0\n1\n")
    assert "expected all rows of a group" in refused(many, held_out="ids.txt", share=0.05)


def test_the_draw_of_a_share_without_a_file_is_as_ever(many):
    """Runs that began before must find the same rows."""
    half = ["1", "3", "4", "5", "7", "11", "13", "17", "18", "19", "20", "22"]
    assert [r.id for r in opened(many, share=0.5).rows] == half
    assert [r.id for r in opened(many, share=0.5, held_out=3).rows] == half
    assert [r.id for r in opened(many, share=0.25).rows] == ["3", "7", "17", "19", "20", "22"]


def test_no_instruction_of_a_held_out_row_becomes_do_nothing(many):
    batches = opened(many, held_out=8, nothing_share=1.0).held_out_batches(8)
    assert {text for batch in batches for text in batch.instructions} == {"make it blue"}


def test_what_cannot_be_held_out_is_refused(many):
    assert "expected at most 20" in refused(many, held_out=24)
    assert "a number of rows or a file with one row id a line" in refused(many, held_out="nowhere.txt")
    (many / "ids.txt").write_text("3\n77\n")
    assert "'77' (1 of 2 ids are unknown)" in refused(many, held_out="ids.txt")
    (many / "ids.txt").write_text("\n")
    assert "empty" in refused(many, held_out="ids.txt")
    (many / "ids.txt").write_text("\n".join(map(str, range(24))))
    assert "expected rows to be left" in refused(many, held_out="ids.txt")


def test_a_lost_photo_changes_the_lot_and_the_run_keeps_its_own(many):
    source = opened(many, held_out=6)
    began = source.inventory()["held_out"]
    ids = held_out_ids(source)
    (many / f"{ids[0]}.png").unlink()
    again = opened(many, held_out=6, max_bad_share=0.5)
    assert again.inventory()["held_out"] != began and again.has_drawn_held_out
    again.hold_out(began)
    assert again.inventory()["held_out"] == began
    assert set(held_out_ids(again)) == set(ids[1:])


def test_a_negative_number_is_refused():
    with pytest.raises((UserError, ValueError)):
        opened("anywhere", held_out=-1)
