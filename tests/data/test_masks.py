"""The mask of a row: white where the edit may change the photo; cropped as its photo, in every form of a set."""

import numpy as np
import pytest
import torch
from PIL import Image

from npedit.data import collate
from npedit.data._masks import load_keep_mask
from npedit.data._photos import BadImage, load_photo
from tests.data.test_forms import SOURCES, as_parquet, as_tars
from tests.data.test_forms import opened as opened_form
from tests.support.parts import example
from tests.support.photo_sets import encoded, opened, plain, row, save, write_metadata

WIDTH, HEIGHT = 48, 32  # of the photos; cropped to 32 x 32 and scaled to 16 x 16
SIZE = (16, 16)


def mask_picture(seed):
    """A black and white mask whose pixels are blocks of 2 x 2."""
    blocks = np.random.default_rng(seed).integers(0, 2, (HEIGHT // 2, WIDTH // 2), dtype=np.uint8) * 255
    return Image.fromarray(blocks.repeat(2, 0).repeat(2, 1))


def expected(seed):
    """Where the photo must stay, after the crop of 8 columns on each side."""
    pixels = np.asarray(mask_picture(seed))[::2, 8 : WIDTH - 8 : 2]
    return torch.from_numpy(pixels == 0).float()[None]


@pytest.fixture
def folder(tmp_path, caches):
    """Four photos, the first three with masks."""
    photos = tmp_path / "photos"
    rows = []
    for i in range(4):
        save(photos, f"{i}.png", plain(WIDTH, HEIGHT, (50 * i, 100, 200)))
        if i < 3:
            save(photos, f"masks/{i}.png", mask_picture(i))
        rows.append(row(f"{i}.png", id=str(i), mask_file_name=f"masks/{i}.png" if i < 3 else None))
    return write_metadata(photos, rows)


def masks_of(source):
    """The mask of each row by id, None for a row without."""
    batches = [source.batch(i, 1) for i in range(4)]
    return {b.ids[0]: None if b.keep_mask is None else b.keep_mask[0] for b in batches}


@pytest.mark.parametrize("form", ["imagefolder", "hub", "webdataset", "hub stream", "webdataset stream"])
def test_every_form_gives_the_same_masks(folder, tmp_path, form):
    name, _, streamed = form.partition(" ")
    makers = {"hub": as_parquet, "webdataset": as_tars}
    place = makers[name](folder, tmp_path / "set") if name in makers else folder
    more = {"streaming": True} if streamed else {}
    assert name in SOURCES
    found = masks_of(opened_form(name, place, sizes=(SIZE,), nothing_share=0.0, **more))
    assert found["3"] is None
    for i in range(3):
        assert torch.equal(found[str(i)], expected(i))


def test_a_mask_lies_on_its_photo_at_every_size():
    """A photo that is its own mask, of random shapes: where the photo is black it must stay."""
    rng = np.random.default_rng(0)
    for width, height, size in ((300, 200, (64, 64)), (200, 310, (80, 48)), (128, 128, (48, 80))):
        left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        image = Image.new("L", (width, height))
        image.paste(255, (left, top, left + width // 3, top + height // 3))
        content = encoded("PNG", image)
        keep, photo = load_keep_mask(content, content, size), load_photo(content, size)
        assert keep.shape == (1, *size) and keep.min() >= 0 and keep.max() <= 1
        assert (1 - keep - photo[:1]).abs().mean() < 0.01  # the filters differ at the border alone
        half = encoded("PNG", image.resize((width // 2, height // 2)))
        assert (load_keep_mask(half, content, size) - keep).abs().mean() < 0.02


def test_a_mask_of_another_shape_is_a_bad_row(folder):
    save(folder, "masks/0.png", Image.new("L", (HEIGHT, WIDTH)))
    (folder / "masks" / "1.png").unlink()
    source = opened(folder, sizes=(SIZE,), max_bad_share=0.9)
    assert {i for k in range(8) for i in source.batch(k, 1).ids} == {"2", "3"}
    reasons = {bad["id"]: bad["reason"] for bad in source.bad_rows}
    assert "'masks/0.png': expected a mask in the shape of its photo, 48 x 32" in reasons["0"]
    assert "'masks/1.png': no such file" in reasons["1"]


def test_a_photo_stored_on_its_side_has_the_mask_of_the_upright_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    plain(WIDTH, HEIGHT).save(tmp_path / "photo.jpg", exif=exif)
    upright = Image.new("L", (HEIGHT, WIDTH))
    upright.paste(255, (0, 0, HEIGHT, WIDTH // 2))
    keep = load_keep_mask(encoded("PNG", upright), tmp_path / "photo.jpg", SIZE)
    assert torch.equal(keep[0, :8], torch.zeros(8, 16)) and torch.equal(keep[0, 8:], torch.ones(8, 16))
    with pytest.raises(BadImage, match="32 x 48 pixels"):
        load_keep_mask(encoded("PNG", Image.new("L", (WIDTH, HEIGHT))), tmp_path / "photo.jpg", SIZE)


def test_a_batch_has_zeros_for_examples_without_a_mask_and_carries_masks_along():
    from dataclasses import replace

    with_mask = replace(example(0), keep_mask=torch.ones(1, 16, 16))
    batch = collate([with_mask, example(1), with_mask.as_identity_edit("do nothing")])
    assert batch.keep_mask.flatten(1).mean(1).tolist() == [1, 0, 0]
    assert batch.slice(1, 2).keep_mask.shape == (1, 1, 16, 16)
    assert batch.to(torch.device("meta")).keep_mask.is_meta
    assert collate([example(1)]).keep_mask is None
