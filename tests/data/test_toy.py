"""The toy world as a data source and as a data set on disk."""

import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from npedit.data import toy
from npedit.errors import UserError
from npedit.questions import IDENTITY_EDIT, IDENTITY_INSTRUCTIONS
from npedit.toy import edits as language
from npedit.toy import oracle, world
from npedit.toy.dataset import write_dataset
from tests.support.photo_sets import opened, spy_on_files


@pytest.fixture
def files_opened(monkeypatch):
    return spy_on_files(monkeypatch)


# ---- the toy as a source


def test_the_toy_draws_references_only(monkeypatch):
    drawn = []
    monkeypatch.setattr(toy, "render", lambda scenes: drawn.extend(scenes) or world.render(scenes))
    source = toy.Source(toy.Settings(nothing_share=0.0), 5)
    batch = source.batch(2, 8)
    edits = [language.sample_edit(random.Random(f"5/{i}")) for i in range(16, 24)]
    assert drawn == [e.reference for e in edits]
    assert torch.equal(batch.references, world.render(drawn))
    assert batch.instructions == tuple(e.instruction for e in edits)
    assert batch.target_captions == tuple(e.target_caption for e in edits)
    assert batch.references.shape == (8, 3, *source.sizes[0])
    assert source.has_target_captions
    assert source.bad_rows == []


def test_the_toys_ranks_make_up_the_whole():
    source = toy.Source(toy.Settings(), 0)
    for index in range(3):
        parts = [source.batch(index, 4, rank, 3).ids for rank in range(3)]
        assert sum(parts, ()) == source.batch(index, 12).ids
    ids = [i for index in range(20) for i in source.batch(index, 5).ids]
    assert len(set(ids)) == 100


def test_a_finite_toy_passes_through_its_items_in_a_new_order_each_time():
    few = toy.Source(toy.Settings(items=7), 0)
    ids = [i for index in range(7) for i in few.batch(index, 3).ids]
    passes = [ids[k : k + 7] for k in (0, 7, 14)]
    assert all(sorted(p) == [f"0/{i}" for i in range(7)] for p in passes) and len(set(map(tuple, passes))) == 3
    assert len(few) == 7 and sum((few.batch(2, 2, rank, 2).ids for rank in (0, 1)), ()) == few.batch(2, 4).ids
    assert set(ids) < set(toy.Source(toy.Settings(items=20), 0).batch(0, 20).ids)
    assert few.fingerprint() != toy.Source(toy.Settings(), 0).fingerprint()


def test_the_toy_repeats_itself_and_follows_the_seed():
    a, b, other = (toy.Source(toy.Settings(), seed) for seed in (0, 0, 1))
    assert torch.equal(a.batch(7, 4).references, b.batch(7, 4).references)
    assert a.fingerprint() == b.fingerprint() != other.fingerprint()
    assert a.batch(7, 4).instructions != other.batch(7, 4).instructions


def test_the_toys_fingerprint_does_not_hang_on_the_last_bit_of_a_pixel_but_on_all_that_is_drawn(monkeypatch):
    source = toy.Source(toy.Settings(), 0)
    before = source.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(toy, "render", lambda scenes: world.render(scenes) + 1e-7 * torch.randn(len(scenes), 3, 32, 32))
        assert source.fingerprint() == before
    found = {before, toy.Source(toy.Settings(nothing_share=0.5), 0).fingerprint()}
    changes = [(world.COLOURS, "red", (0.9, 0.12, 0.13)), (world.BACKGROUNDS, "teal", (0.0, 0.4, 0.5))]
    changes += [(world.STYLES, "fog", (0.5, (0.5, 0.5, 0.5))), (world.SIZES, "large", (6.0, 6.6))]
    changes += [(language.INSTRUCTIONS, "remove", ("remove the {x}",) * 11)]
    for table, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setitem(table, name, value)
            found.add(source.fingerprint())
    assert len(found) == 2 + len(changes)


def test_the_toy_has_items_with_nothing_to_do():
    batch = toy.Source(toy.Settings(nothing_share=0.2), 0).batch(0, 500)
    turned = [i for i, t in enumerate(batch.edit_types) if t == IDENTITY_EDIT]
    assert 60 < len(turned) < 140
    for i in turned:
        assert batch.instructions[i] in IDENTITY_INSTRUCTIONS
        assert batch.target_captions[i] == batch.source_captions[i]


def test_impossible_ranks_and_sizes_are_refused():
    for wrong in ((0, 0, 0, 1), (-1, 4, 0, 1), (0, 4, 2, 2)):
        with pytest.raises(ValueError, match="rank < world"):
            toy.Source(toy.Settings(), 0).batch(*wrong)


def test_a_stream_may_begin_further_on():
    """Its items are those of the whole stream, and none of those before it: what taught a start stays out."""
    later = toy.Source(toy.Settings(first=10), 4).batch(0, 3)
    whole = toy.Source(toy.Settings(), 4).batch(0, 13)
    assert later.ids == whole.ids[10:] and later.instructions == whole.instructions[10:]
    torch.testing.assert_close(later.references, whole.references[10:], atol=0, rtol=0)
    finite = toy.Source(toy.Settings(first=10, items=5), 4)
    assert set(finite.batch(0, 10).ids) == {f"4/{i}" for i in range(10, 15)}
    prints = {toy.Source(toy.Settings(first=n), 4).fingerprint() for n in (0, 10)}
    assert len(prints) == 2


# ---- the toy on disk


def test_the_toy_on_disk_is_an_ordinary_data_set_without_edited_images(tmp_path):
    folder = write_dataset(tmp_path / "toy", 12, seed=4)
    assert sorted(p.name for p in folder.iterdir()) == ["images", "metadata.jsonl"]
    assert len(list((folder / "images").iterdir())) == 12
    source = opened(folder, sizes=((world.SIDE, world.SIDE),))
    drawn = toy.Source(toy.Settings(nothing_share=0.0), 4).batch(0, 12)
    where = {i: k for k, i in enumerate(drawn.ids)}
    for index in range(12):
        batch = source.batch(index, 1)
        k = where.pop(batch.ids[0])
        assert batch.instructions == (drawn.instructions[k],)
        assert batch.objects == (drawn.objects[k],)
        torch.testing.assert_close(batch.references[0], drawn.references[k], atol=0.5 / 255 + 1e-6, rtol=0)
    assert not where


def test_bare_toy_pictures_are_those_of_the_data_set_without_words(tmp_path):
    bare = write_dataset(tmp_path / "bare", 5, seed=4, bare=True)
    worded = write_dataset(tmp_path / "worded", 5, seed=4)
    files = sorted(bare.rglob("*"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in sorted((worded / "images").iterdir())]
    with pytest.raises(UserError, match="--pairs or --bare"):
        write_dataset(tmp_path / "both", 2, seed=0, pairs=True, bare=True)


def test_the_paired_toy_has_edited_images_that_training_never_opens(tmp_path, caplog, files_opened):
    folder = write_dataset(tmp_path / "toy", 9, seed=0, pairs=True)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        edit = language.sample_edit(random.Random(f"0/{i}"))
        with Image.open(folder / line["edited_file_name"]) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert oracle.judge_edit(edit, oracle.read_scene(pixels)[0]) == (True, True)
    files_opened.clear()
    source = opened(folder, sizes=((32, 32),))
    source.batch(0, 9)
    assert "edited_file_name" in caplog.text
    assert files_opened
    assert not any("/edited/" in p for p in files_opened)


def test_hugging_face_opens_the_toy_on_disk(tmp_path, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("cache"))
    for name, pairs in (("bare", False), ("pairs", True)):
        folder = write_dataset(tmp_path / name, 3, seed=0, pairs=pairs)
        loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
        assert len(loaded) == 3
        assert loaded[0]["image"].size == (32, 32)


@pytest.mark.parametrize("bare", [False, True])
def test_the_toy_is_written_into_the_working_folder(tmp_path, monkeypatch, bare):
    monkeypatch.chdir(tmp_path)
    write_dataset(".", 2, seed=0, bare=bare)
    written = ["000000.png", "000001.png"] if bare else ["images", "metadata.jsonl"]
    assert sorted(os.listdir()) == written


def test_the_toy_is_not_written_over_anything(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="new or empty folder"):
        write_dataset(tmp_path, 2, seed=0)
    with pytest.raises(UserError, match="new or empty folder"):
        write_dataset(tmp_path / "mine.txt", 2, seed=0)
    with pytest.raises(UserError, match="expected a folder to write to"):
        write_dataset(tmp_path / "mine.txt" / "below", 2, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        write_dataset(tmp_path / "new", 0, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_broken_off_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        write_dataset(tmp_path / "toy", 2, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_larger_scenes_are_enlarged_in_blocks(tmp_path):
    small = write_dataset(tmp_path / "small", 2, seed=4, bare=True)
    large = write_dataset(tmp_path / "large", 2, seed=4, bare=True, side=96)
    for name in ("000000.png", "000001.png"):
        pixels, blocks = (np.asarray(Image.open(folder / name)) for folder in (small, large))
        assert blocks.shape == (96, 96, 3) and (blocks == pixels.repeat(3, 0).repeat(3, 1)).all()
    with pytest.raises(UserError, match="--side: expected a multiple of 32; got 50; try 64"):
        write_dataset(tmp_path / "none", 2, seed=4, side=50)
