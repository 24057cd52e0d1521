"""Real photographs, known edits, imitated VAEs: what is unchanged is the original's, and no seam is seen."""

import numpy as np
import pytest
import torch
from PIL import Image

from npedit.benchmarks.toy import sample_items
from npedit.data._photos import to_pil
from npedit.editor import Editor
from npedit.families.flux import Flux
from npedit.full_size import Change, find_change, keep_unchanged, mask_image, merge, scale_back
from npedit.toy.world import render
from tests.support.imitated_edits import PHOTOS, SHIFT, at_working_size, decoded, edited, photograph

LARGEST_STEP = 4  # of 255: how much steeper than both sources a result may be anywhere


@pytest.fixture(scope="module", params=PHOTOS)
def photo(request):
    full = photograph(request.param)
    return full, at_working_size(full)


@pytest.fixture(scope="module", params=PHOTOS)
def sharp_photo(request):
    """A photograph as the camera left it, and a reference as sharp as its pixels allow."""
    full = photograph(request.param, enlarged=False)
    return full, at_working_size(full, 208)


def steps(image, axis):
    return np.abs(np.diff(np.asarray(image).astype(np.int16), axis=axis))


@pytest.mark.parametrize("kind", ["recolour", "remove", "small"])
def test_what_is_unchanged_is_the_originals_and_there_is_no_seam(photo, kind):
    """The edit is in the result, its surroundings are bit for bit the original's, and between them no step is larger
    than in either source."""
    full, reference = photo
    after, where = edited(reference, kind)
    after = decoded(after, "loss")
    result, change = keep_unchanged(full, reference, after)
    assert result.size == full.size and not change.is_most()
    assert (change.mask[where] > 0.9).mean() > 0.98, "the edit was lost"
    assert (change.mask[~where] > 0).mean() < 0.1, "too much of the rest was taken from the edit"
    mask = np.asarray(mask_image(change, full.size))
    assert (np.asarray(result)[mask == 0] == np.asarray(full)[mask == 0]).all()
    shifted = scale_back(full, reference, after - torch.from_numpy(change.shift)[:, None, None])
    assert np.abs(np.asarray(result).astype(int) - np.asarray(shifted))[mask == 255].max() <= 1
    for axis in (0, 1):
        excess = steps(result, axis) - np.maximum(steps(full, axis), steps(shifted, axis))
        assert excess.max() <= LARGEST_STEP


@pytest.mark.parametrize("vae", ["noise", "loss"])
def test_decoding_alone_changes_almost_nothing(photo, vae):
    full, reference = photo
    result, change = keep_unchanged(full, reference, decoded(reference, vae))
    assert change.share < 0.02
    assert change.shift == pytest.approx(SHIFT, abs=0.3 / 255)
    mask = np.asarray(mask_image(change, full.size))
    assert (mask == 0).mean() > 0.97 and (np.asarray(result)[mask == 0] == np.asarray(full)[mask == 0]).all()


@pytest.mark.parametrize("kind,largest", [("nothing", 0.03), ("recolour", 0.1), ("remove", 0.1)])
def test_detail_that_a_vae_loses_is_no_change(sharp_photo, kind, largest):
    """What a VAE loses of a picture that is sharp at working size is not taken for an edit."""
    _, reference = sharp_photo
    after, where = edited(reference, kind)
    change = find_change(reference, decoded(after, "loss"))
    assert (change.mask[~where] > 0).mean() < largest
    assert (change.mask[where] > 0.9).mean() > 0.98 if where.any() else change.share < 0.01


@pytest.mark.parametrize("kind", ["tone", "style"])
def test_where_most_changed_the_whole_edit_is_scaled_up(photo, kind):
    full, reference = photo
    after = decoded(edited(reference, kind)[0], "loss")
    result, change = keep_unchanged(full, reference, after)
    assert change.is_most() and "is scaled up" in change.warning("a.png")
    assert result.tobytes() == scale_back(full, reference, after).tobytes()


def test_a_shift_of_all_colours_is_no_change_but_a_large_one_is():
    reference = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    assert find_change(reference, reference + 3 / 255).share == 0
    assert find_change(reference, reference + 12 / 255).is_most()
    assert find_change(reference, reference).mask.max() == 0


def test_merging_in_strips_is_merging_at_once():
    """Every strip is cut from the same enlargement: the strips' edges do not show."""
    rng = np.random.default_rng(0)
    full = Image.fromarray(rng.integers(0, 256, (1201, 903, 3), dtype=np.uint8))
    small = torch.from_numpy(rng.random((3, 64, 48), dtype=np.float32))
    mask = np.zeros((64, 48), np.float32)
    mask[9:55, 7:40] = rng.random((46, 33))
    change = Change(mask, 0.3, np.zeros(3, np.float32))
    once = full.copy()
    once.paste(scale_back(full, small, small), (0, 0), mask_image(change, full.size))
    assert np.abs(np.asarray(merge(full, small, change)).astype(int) - np.asarray(once)).max() <= 1


def test_pictures_smaller_than_the_working_size_and_of_other_shapes():
    for size in ((1, 1), (100, 37), (20, 300)):
        full = Image.new("RGB", size, "navy")
        reference = torch.full((3, 64, 32), 0.5)
        after = reference.clone()
        after[:, 20:40] = 0.9
        result, change = keep_unchanged(full, reference, after)
        assert result.size == size and 0.3 < change.share < 0.6


def test_the_toy_editor_keeps_what_it_did_not_edit():
    """Toy scenes enlarged to 1024 pixels with a fine grain: the grain is kept in a good part of what should stay, and
    the edit is as good as without."""
    editor = Editor.open("embedded", device="cpu")
    items = [item for item in sample_items(60, 1) if item.edit_type in ("pattern", "recolour", "remove", "replace")][:8]
    grain = np.random.default_rng(0).integers(-1, 2, (1024, 1024, 3))
    scenes = [Image.fromarray((enlarged(item.reference) + grain).clip(0, 255).astype(np.uint8)) for item in items]
    texts = [item.instruction for item in items]
    plain, kept = editor.edit(scenes, texts), editor.edit(scenes, texts, keep_resolution=True)
    shares, errors = [], []
    for item, scene, *results in zip(items, scenes, plain, kept):
        wanted, before = enlarged(item.target), np.asarray(scene).astype(int)
        is_unchanged = (enlarged(item.reference) == wanted).all(-1)
        shares.append((np.asarray(results[1]) == before).all(-1)[is_unchanged].mean())
        errors.append([np.abs(np.asarray(result) - wanted)[~is_unchanged].mean() for result in results])
    assert np.mean(shares) > 0.3, shares
    assert np.allclose(*np.transpose(errors), atol=2), errors


def enlarged(scene):
    return np.asarray(to_pil(render([scene])[0]).resize((1024, 1024), Image.Resampling.NEAREST)).astype(int)


def test_an_editor_that_draws_noise_is_scaled_back(caplog):
    family = Flux.tiny(0)
    editor = Editor(family, family.trainable_net(), 1, [(32, 32)])
    image = photograph("chelsea", 0.2)
    assert editor.edit(image, "x", keep_resolution=True)[0].tobytes() == editor.edit(image, "x")[0].tobytes()
    assert "of the picture changed" in caplog.text
