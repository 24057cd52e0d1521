"""Scenes: another photo of the subject for the critic, drawn from the group; groups are never separated."""

import json

import pytest
import torch

from npedit.data import collate
from npedit.data._metadata import parse_row
from npedit.errors import UserError
from tests.data.test_forms import as_parquet, as_tars
from tests.data.test_forms import opened as opened_form
from tests.support.parts import example
from tests.support.photo_sets import opened, plain, refused, row, save, spy_on_files, write_metadata

SIZES = ((16, 16), (16, 32))
SUBJECTS, PHOTOS = 4, 3


def colour(subject, photo):
    return (60 * subject, 80 * photo, 200)


@pytest.fixture
def folder(tmp_path, caches):
    """Four subjects with three photos each, of two sizes; a photo's colour says which it is. One row is local."""
    rows = []
    for s in range(SUBJECTS):
        for p in range(PHOTOS):
            save(tmp_path / "photos", f"{s}{p}.png", plain(32 if p else 16, 16, colour(s, p)))
            more = {"edit_type": "scene", "object": "cat", "group": f"g{s}", "id": f"{s}{p}"}
            rows.append(row(f"{s}{p}.png", edited_file_name="edited.png", source_caption="a cat", **more))
    save(tmp_path / "photos", "edited.png", plain(16, 16))
    save(tmp_path / "photos", "99.png", plain(16, 16))
    rows.append(row("99.png", id="99"))
    return write_metadata(tmp_path / "photos", rows)


def photo_in(picture):
    """(subject, photo) of a picture (3, H, W) by its colour."""
    assert torch.equal(picture, picture[:, :1, :1].expand_as(picture))
    red, green, _ = (255 * picture[:, 0, 0]).round().int().tolist()
    return red // 60, green // 80


def scenes_of(source, count=24):
    """(id, which photo the critic compares with or None) of the first items."""
    found = []
    for index in range(count):
        batch = source.batch(index, 1)
        other = None if batch.other_photos is None else photo_in(batch.other_photos[0])
        found.append((batch.ids[0], other))
    return found


def test_the_critic_gets_another_photo_of_the_same_subject(folder):
    found = scenes_of(opened(folder, sizes=SIZES), 60)
    assert ("99", None) in found
    for id_, other in found:
        if id_ != "99":
            assert other is not None and other[0] == int(id_[0]) and other[1] != int(id_[1])
    assert {other for id_, other in found if id_ == "10"} == {(1, 1), (1, 2)}, "another one from time to time"


def test_the_draw_follows_seed_and_position_alone(folder):
    wanted = scenes_of(opened(folder, sizes=SIZES))
    assert scenes_of(opened(folder, sizes=SIZES)) == wanted
    assert dict(scenes_of(opened(folder, seed=1, sizes=SIZES))) != dict(wanted)
    later = opened(folder, sizes=SIZES)
    assert photo_in(later.batch(20, 1).other_photos[0]) == wanted[20][1]
    two = opened(folder, sizes=SIZES)
    sizes = [two.batch(i, 2) for i in range(4)]
    assert all(b.other_photos.shape == b.references.shape for b in sizes)


def test_switched_off_there_is_none_and_further_references_are_for_the_student(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder, [{**r, "reference_file_names": ["01.png"]} for r in lines if r["id"] == "00"])
    off, on = (opened(folder, sizes=SIZES, other_photos=value).batch(0, 1) for value in (False, True))
    assert off.other_photos is None and off.extra_references.shape == (1, 1, 3, 16, 16)
    assert photo_in(off.extra_references[0, 0]) == (0, 1)
    assert on.extra_references is None and photo_in(on.other_photos[0]) == (0, 1)
    assert opened(folder, sizes=SIZES, other_photos=False).most_references == 2
    assert opened(folder, sizes=SIZES).most_references == 1


def test_a_broken_other_photo_is_passed_over(folder):
    source = opened(folder, sizes=SIZES, max_bad_share=0.5)
    (folder / "11.png").write_bytes(b"damaged after the start")
    (folder / "12.png").write_bytes(b"damaged after the start")
    found = scenes_of(source, 40)
    assert {other for id_, other in found if id_ == "10"} == {None}
    (folder / "02.png").write_bytes(b"damaged after the start")
    assert {o for i, o in scenes_of(opened(folder, sizes=SIZES, max_bad_share=0.5), 40) if i == "00"} == {(0, 1)}


FORMS = [("imagefolder", None), ("hub", as_parquet), ("webdataset", as_tars)]


def in_form(folder, tmp_path, form, make, **settings):
    tmp_path.mkdir(exist_ok=True)
    place = make(folder, tmp_path / "set") if make else folder
    columns = {"file_name": "image"} if form == "hub" else {}
    return opened_form(form, place, sizes=SIZES, nothing_share=0.0, columns=columns, **settings)


def scene_rows(names, **more):
    return [row(name, edit_type="scene", object="cat", id=f"r{k}", **more) for k, name in enumerate(names)]


def copies(folder):
    """Three files with the same photo."""
    for name in ("copy.png", "again.png"):
        (folder / name).write_bytes((folder / "00.png").read_bytes())
    return ["00.png", "copy.png", "again.png"]


@pytest.mark.parametrize("unrelated", [False, True])
@pytest.mark.parametrize(("form", "make"), FORMS)
def test_a_broken_photo_for_the_critic_alone_makes_no_row_bad(folder, tmp_path, form, make, unrelated):
    (folder / "02.png").write_bytes(b"damaged before the start")
    rows = scene_rows(copies(folder), reference_file_names=["02.png", "01.png"])
    rows += [row("10.png", id="local", reference_file_names=["11.png"])] if unrelated else []
    source = in_form(write_metadata(folder, rows), tmp_path, form, make)
    found = {id_: other for id_, other in scenes_of(source) if id_ != "local"}
    assert source.bad_rows == [] and found == {f"r{k}": (0, 1) for k in range(3)}


@pytest.mark.parametrize(("form", "make"), FORMS)
def test_a_photo_in_several_rows_is_no_other_photo_of_itself(folder, tmp_path, form, make):
    names = copies(folder)
    alone = in_form(write_metadata(folder, scene_rows(names, group="g")), tmp_path / "a", form, make)
    assert {other for _, other in scenes_of(alone)} == {None}
    more = write_metadata(folder, scene_rows([*names, "01.png"], group="g"))
    found = set(scenes_of(in_form(more, tmp_path / "b", form, make), 40))
    assert found == {("r0", (0, 1)), ("r1", (0, 1)), ("r2", (0, 1)), ("r3", (0, 0))}


def test_no_edited_image_is_opened(folder, monkeypatch):
    source = opened(folder, sizes=SIZES)
    paths = spy_on_files(monkeypatch)
    scenes_of(source)
    assert paths and not [p for p in paths if p.endswith("edited.png")]


@pytest.mark.parametrize(("form", "make"), [("hub", as_parquet), ("webdataset", as_tars)])
def test_other_forms_draw_from_the_group_too(folder, tmp_path, form, make):
    columns = {"file_name": "image"} if form == "hub" else {}
    place = make(folder, tmp_path / "set")
    found = scenes_of(opened_form(form, place, sizes=SIZES, nothing_share=0.0, columns=columns))
    assert ("99", None) in found
    wanted = scenes_of(opened(folder, sizes=SIZES))
    assert [id_ for id_, _ in found] == [id_ for id_, _ in wanted]
    assert all(o is not None and o[0] == int(i[0]) and o[1] != int(i[1]) for i, o in found if i != "99")


@pytest.mark.parametrize(("form", "make"), [("hub", as_parquet), ("webdataset", as_tars)])
def test_a_stream_draws_from_the_rows_own_references(folder, tmp_path, form, make):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**r, "reference_file_names": ["01.png", "02.png"]} for r in lines if r["id"] == "00"]
    del rows[0]["edited_file_name"]
    place = make(write_metadata(folder, rows), tmp_path / "set")
    source = opened_form(form, place, sizes=SIZES, nothing_share=0.0, streaming=True)
    batches = [source.batch(i, 1) for i in range(12)]
    assert {photo_in(b.other_photos[0]) for b in batches} == {(0, 1), (0, 2)}
    assert all(b.extra_references is None for b in batches)


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_held_out_rows_come_in_complete_groups(folder, count):
    source = opened(folder, sizes=SIZES, held_out=count)
    held = {i for b in source.held_out_batches(99) for i in b.ids}
    groups = [{f"{s}{p}" for p in range(PHOTOS)} for s in range(SUBJECTS)]
    assert count <= len(held) < count + PHOTOS and len(source) == 13 - len(held)
    assert all(group <= held or not group & held for group in groups)
    assert held_ids(opened(folder, sizes=SIZES, held_out=1)) <= held
    for id_, other in scenes_of(source, 40):
        assert id_ not in held and (other is None or "{}{}".format(*other) not in held)


def held_ids(source):
    return {i for b in source.held_out_batches(99) for i in b.ids}


def test_training_keeps_a_row_of_each_type_and_size(folder):
    assert "expected at most 9" in refused(folder, sizes=SIZES, held_out=13)


def test_a_file_of_ids_that_separates_a_group_is_refused(folder):
    (folder / "ids.txt").write_text("00\n01\n")
    said = refused(folder, sizes=SIZES, held_out="ids.txt")
    assert "'00' of the group 'g0' without '02'" in said
    (folder / "ids.txt").write_text("00\n01\n02\n")
    assert held_ids(opened(folder, sizes=SIZES, held_out="ids.txt")) == {"00", "01", "02"}


def test_a_scene_without_a_subject_is_refused(tmp_path):
    with pytest.raises(UserError, match="fill 'object' with the name of the subject"):
        parse_row(row("0.png", edit_type="scene"), 1, tmp_path / "metadata.jsonl", {})


def test_a_batch_has_the_reference_where_there_is_no_other_photo():
    from dataclasses import replace

    scene = replace(example(0), other_photo=torch.full((3, 16, 16), 0.5))
    batch = collate([scene, example(1)])
    assert torch.equal(batch.other_photos[0], scene.other_photo)
    assert torch.equal(batch.other_photos[1], batch.references[1])
    assert collate([example(1), scene.as_identity_edit("do nothing")]).other_photos is None
