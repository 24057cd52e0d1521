"""No pairs: where edited images lie beside the photos, training neither opens them nor could tell that they are
there."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from npedit.data import Batch, Example, PairedBatch, _metadata, imagefolder, toy
from npedit.generator import edit_images
from npedit.steps import np_edit, reference_copy
from npedit.toy import world
from npedit.toy.dataset import write_dataset
from npedit.toy.edits import sample_edit
from tests.support.opened_files import opened_files
from tests.support.parts import batch, parts, weights


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that are opened during the test."""
    with opened_files() as paths:
        yield paths


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "paired", 6, seed=0, pairs=True)


def train(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Both steps on this folder; the students' weights after two updates of each."""
    source = imagefolder.Source(imagefolder.Settings(path=str(folder), sizes=((32, 32),), nothing_share=0.2), 0)
    frozen, found = parts(), []
    for module, settings in (
        (reference_copy, reference_copy.CopySettings()),
        (np_edit, np_edit.NpEditSettings(fake_updates=1, critic_weight=1.0)),
    ):
        step = module.Step(settings, frozen, frozen.family.trainable_net(), 2, 0)
        each = step.batches_per_update(settings)
        for update in range(2):
            step.step([source.batch(update * each + i, 3) for i in range(each)], update)
        found.append(weights(step.learners["student"].net))
    return found[0], found[1]


def test_training_opens_no_edited_image(paired, opened):
    train(paired)
    photos = {Path(p).name for p in opened if str(paired / "images") in p}
    assert len(photos) == 6  # the spy sees what is opened
    assert not [p for p in opened if "edited/" in p]
    (paired / "edited" / "000000.png").read_bytes()
    assert [p for p in opened if "edited/" in p]  # and would have seen this


def test_the_audit_hook_sees_files_that_pillow_and_torch_open(paired, opened):
    from PIL import Image

    with Image.open(paired / "edited" / "000001.png") as image:
        image.load()
    assert any(p.endswith("edited/000001.png") for p in opened)


def test_training_is_bit_for_bit_the_same_without_and_with_other_edited_images(paired, tmp_path):
    wanted = train(paired)
    without, spoiled = tmp_path / "without", tmp_path / "spoiled"
    shutil.copytree(paired, without)
    shutil.rmtree(without / "edited")
    shutil.copytree(paired, spoiled)
    for path in (spoiled / "edited").iterdir():
        path.write_bytes(b"not an image")
    for folder in (without, spoiled):
        assert all(torch.equal(a, b) for a, b in zip(train(folder), wanted)), folder.name


def test_other_photos_train_another_editor(paired, tmp_path):
    """The comparison above can fail: another photo gives other weights."""
    other = tmp_path / "other"
    shutil.copytree(paired, other)
    for i in range(6):
        shutil.copy(paired / "edited" / f"{i:06d}.png", other / "images" / f"{i:06d}.png")
    assert not any(torch.equal(a, b) for a, b in zip(train(other), train(paired)))


def test_the_toy_never_draws_an_edited_scene(monkeypatch):
    """From the data through a whole training step and an edit, `render` is asked for references alone."""
    drawn, real = [], world.render

    def noted(scenes):
        drawn.extend(scenes)
        return real(scenes)

    users = [m for n, m in list(sys.modules.items()) if n.startswith("npedit") and getattr(m, "render", None) is real]
    assert toy in users and world in users
    for module in users:
        monkeypatch.setattr(module, "render", noted)
    source, frozen = toy.Source(toy.Settings(), 3), parts()
    settings = np_edit.NpEditSettings(fake_updates=1)
    step = np_edit.Step(settings, frozen, frozen.family.trainable_net(), 1, 0)
    given = [source.batch(i, 4) for i in range(2)]
    step.step(given, 0)
    edit_images(frozen.family, step.learners["student"].net, given[0].references, given[0].instructions, steps=2)
    edits = [sample_edit(random.Random(f"3/{i}")) for i in range(8)]
    assert drawn == [e.reference for e in edits]
    assert all(e.target != e.reference for e in edits)
    assert not [scene for scene in drawn if scene in [e.target for e in edits]]


def test_training_reads_no_edited_image_of_a_paired_source():
    """The baselines' batches hold edited images; the method does not touch them, were they of no sense at all."""
    found = []
    for edited in (None, torch.full((2, 3, 16, 16), torch.nan)):
        frozen, settings = parts(), np_edit.NpEditSettings(fake_updates=1)
        step = np_edit.Step(settings, frozen, frozen.family.trainable_net(), 1, 0)
        given = [batch(0, 1), batch(2, 3)]
        step.step(given if edited is None else [PairedBatch(**vars(b), edited=edited) for b in given], 0)
        found.append(weights(step.learners["student"].net))
    assert torch.equal(*found)


def test_no_field_could_hold_an_edited_image():
    pictures = [f.name for kind in (Example, Batch) for f in dataclasses.fields(kind) if "Tensor" in str(f.type)]
    of_example, of_batch = ["reference", "extra_references"], ["references", "extra_references"]
    assert pictures == [*of_example, "other_photo", "keep_mask", *of_batch, "other_photos", "keep_mask"]
    assert not [f for f in _metadata.FIELDS if _metadata.EDITED_COLUMN.fullmatch(f)]
