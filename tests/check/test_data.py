"""The data section: silent on the toy's rows, and a finding for each planted fault."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from npedit.check.data import check_data, nearest_size
from npedit.check.near_duplicates import find_near_duplicates, hash_photo
from tests.check.conftest import severities


def repeat_captions(rows) -> None:
    for row in rows:
        row["target_caption"] = row["source_caption"]


def repeat_some_captions(rows) -> None:
    repeat_captions(rows[:10])


def mix_captions(rows) -> None:
    captions = [row["target_caption"] for row in rows]
    random.Random(0).shuffle(captions)
    for row, caption in zip(rows, captions):
        row["target_caption"] = caption


def exchange_captions(rows) -> None:
    for row in rows:
        row["source_caption"], row["target_caption"] = row["target_caption"], row["source_caption"]


def drop_objects_of_one_type(rows) -> None:
    for number, row in enumerate(rows):
        if number < 8:
            row |= {"edit_type": "recolour"}
        if row["edit_type"] == "recolour":
            row["object"] = ""


def drop_source_captions(rows) -> None:
    for row in rows:
        row["source_caption"] = ""


def lengthen_a_caption(rows) -> None:
    rows[3]["target_caption"] += " and a red circle" * 60


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (len, {}),
        (repeat_captions, {"captions-repeat": "will not learn"}),
        (repeat_some_captions, {"captions-repeat": "warning"}),
        (mix_captions, {"captions-own": "will not learn"}),
        (exchange_captions, {"captions-against": "will not learn"}),
        (drop_objects_of_one_type, {"no-objects": "warning"}),
        (drop_source_captions, {"captions-not-compared": "warning"}),
        (lengthen_a_caption, {"text-cut": "warning"}),
    ],
)
def test_each_fault_of_the_texts_is_found_and_no_other(from_folder, fault, expected) -> None:
    found = severities(check_data(from_folder(fault)))
    assert {key: found.get(key) for key in expected} == expected
    allowed = {"captions-against"} if fault is mix_captions else set()  # mixed captions also contradict instructions
    assert found.keys() <= expected.keys() | allowed


def test_repeated_captions_are_a_warning_where_nothing_is_conditioned_on_them(from_folder) -> None:
    subject = from_folder(repeat_captions, "stages.1.settings.dmd_weight=0")
    assert severities(check_data(subject)) == {"captions-repeat": "warning"}


def test_the_generated_toy_is_silent_and_shows_rows_of_each_type(demo) -> None:
    section = check_data(demo)
    kinds = sorted({e.edit_type for e in demo.examples})
    assert severities(section) == {}
    assert [p.caption.split(":")[0] for p in section.pictures] == kinds
    assert [title.split(":")[0] for title, _ in section.texts] == kinds


def test_a_held_out_photo_that_is_also_trained_on_is_found(from_folder, tmp_path) -> None:
    def hold_out_a_copy(rows) -> None:
        rows[0] |= {"id": "mine"}
        rows[7]["file_name"] = rows[0]["file_name"]
        (tmp_path / "held_out.txt").write_text("mine\n")

    subject = from_folder(hold_out_a_copy, f"data.held_out={tmp_path / 'held_out.txt'}")
    section = check_data(subject)
    assert severities(section) == {"near-duplicates": "warning"}
    assert any("near-duplicates" in p.caption for p in section.pictures)


def test_held_out_photos_without_near_duplicates_are_fine(from_folder) -> None:
    assert severities(check_data(from_folder(len, "data.held_out=5"))) == {}


def test_crops_that_cut_much_off_and_photos_that_are_enlarged(from_folder) -> None:
    cut = from_folder(len, "data.sizes=[[16, 32]]")
    assert severities(check_data(cut)) == {"crops": "warning"}


def test_photos_that_are_enlarged(from_folder) -> None:
    assert severities(check_data(from_folder(len, "data.sizes=[[64, 64]]"))) == {"enlarged": "warning"}


def test_a_photo_that_cannot_be_read_is_counted(from_folder, tmp_path) -> None:
    def break_one(rows) -> None:
        (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
        rows[5]["file_name"] = "broken.png"

    section = check_data(from_folder(break_one, "data.max_bad_share=0.5"))
    assert severities(section) == {"bad-rows": "warning"}
    assert "broken.png" in next(f.measured for f in section.findings if f.key == "bad-rows")


# ------------------------------------------------------------------------------------------------------------ helpers


def photo(seed: int, size=(64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_near_duplicates_are_scaled_and_recompressed_copies_and_nothing_else(tmp_path) -> None:
    photo(0).resize((200, 150)).save(tmp_path / "copy.jpg", quality=70)
    held_out = [hash_photo("copy", Image.open(tmp_path / "copy.jpg")), hash_photo("new", photo(99))]
    training = [hash_photo(str(seed), photo(seed)) for seed in range(20)]
    assert [(a.name, b.name) for a, b in find_near_duplicates(held_out, training)] == [("copy", "0")]
    assert find_near_duplicates([], training) == find_near_duplicates(held_out, []) == []


def test_pictures_of_one_colour_are_no_near_duplicates_of_each_other() -> None:
    """Their hashes are equal."""
    red, blue = (hash_photo(c, Image.new("RGB", (32, 32), c)) for c in ("red", "blue"))
    assert red.facts["phash"] == blue.facts["phash"]
    assert find_near_duplicates([red], [blue]) == []


def test_nearest_size_is_by_aspect_ratio() -> None:
    assert nearest_size((100, 210), [(64, 64), (48, 96), (96, 48)]) == (48, 96)
