"""Photos as training wants them: cut without bars, upright, in RGB."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from npedit.data import _photos, imagefolder
from npedit.data._photos import read_photo_size
from tests.support.photo_sets import SMALL, encoded, good_rows, opened, plain, row, save, write_metadata

# ---- cutting (fault 6: no black bars)


ASPECTS = [(round(60 * 2**e), 60) for e in np.linspace(-3, 3, 41)]
ASPECTS += [(1, 1), (1, 500), (500, 1), (63, 65), (640, 426), (1279, 853), (1138, 1000), (673, 1000)]


@pytest.mark.parametrize(("width", "height"), ASPECTS)
def test_no_padding_for_any_aspect(width, height):
    for size in SMALL + imagefolder.Settings(path="x").sizes[:4]:
        cut = _photos.crop_to_fill(plain(width, height, (200, 120, 60)), size)
        assert cut.size == (size[1], size[0])
        assert cut.getextrema() == ((200, 200), (120, 120), (60, 60)), "every pixel comes from the picture"


@pytest.mark.parametrize(("width", "height"), [(120, 60), (60, 120), (90, 60), (333, 101)])
def test_a_cut_is_centred_and_keeps_the_proportions(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ramps = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    cut = np.asarray(_photos.crop_to_fill(ramps, (60, 60))).astype(float)
    for channel in (0, 1):
        assert cut[..., channel].mean() == pytest.approx(127, abs=2)
    across = np.ptp(cut[30, :, 0]) / 255 * width  # pixels of the picture that the cut spans
    down = np.ptp(cut[:, 30, 1]) / 255 * height
    assert across == pytest.approx(down, rel=0.06)
    assert max(across, down) == pytest.approx(min(width, height), rel=0.06)


def test_the_bucket_is_the_nearest_aspect(tmp_path):
    sizes = imagefolder.Settings(path="x").sizes
    rows = []
    for i, (width, height) in enumerate(ASPECTS[:41] + ASPECTS[-2:]):
        save(tmp_path, f"{i}.png", plain(width, height))
        rows.append(row(f"{i}.png", id=f"{width}x{height}"))
    source = opened(write_metadata(tmp_path, rows), sizes=sizes, min_kept_share=0, max_enlargement=1000)
    for index in range(43):
        batch = source.batch(index, 1)
        width, height = map(int, batch.ids[0].split("x"))
        got = batch.references.shape[3] / batch.references.shape[2]
        gaps = [abs(math.log(w / h) - math.log(width / height)) for h, w in sizes]
        assert abs(math.log(got) - math.log(width / height)) == pytest.approx(min(gaps))


# ---- modes and orientation


def first(folder, image, name="a.png", **save_options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **save_options)
    write_metadata(folder, [row(name)])
    return opened(folder).batch(0, 1).references[0]


def encoded_file(folder, image, exif, **options):
    path = folder.with_name(f"size-{folder.name}")
    image.save(path, exif=exif, **options)
    return path


def mean(reference):
    return reference.mean((1, 2)).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[:24, :40], upright[24:, 40:] = (255, 0, 0), (0, 0, 255)  # red top left, blue bottom right
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (
        ("a.jpg", {"quality": 95}),
        ("b.png", {}),
        ("c.webp", {"lossless": True}),
        ("d.tif", {}),
    ):
        if name != "b.png":  # its orientation may be stored after its pixels, and is not read for the size
            assert read_photo_size(encoded_file(tmp_path / name, stored, exif, **options)) == (48, 80), name
        seen = first(tmp_path / name, stored, name, exif=exif, **options)
        assert seen.shape == (3, 48, 80), name
        assert mean(seen[:, 4:20, 4:36]) == pytest.approx([1, 0, 0], abs=0.03)
        assert mean(seen[:, 28:44, 44:76]) == pytest.approx([0, 0, 1], abs=0.03)


def test_alpha_is_flattened_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    assert mean(first(tmp_path / "clear", clear)) == pytest.approx([1, 1, 1])
    assert mean(first(tmp_path / "half", half)) == pytest.approx([1, 0.5, 0.5], abs=0.01)
    assert mean(first(tmp_path / "la", Image.new("LA", (64, 64), (0, 0)))) == pytest.approx([1, 1, 1])


def test_palettes_with_a_clear_colour_are_flattened_on_white(tmp_path):
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert mean(first(tmp_path / "opaque", palette)) == pytest.approx([0, 1, 0])
    assert mean(first(tmp_path / "clear", palette, transparency=1)) == pytest.approx([1, 1, 1])
    assert mean(first(tmp_path / "gif", palette, "a.gif", transparency=1)) == pytest.approx([1, 1, 1])


def test_other_modes_become_rgb(tmp_path):
    half = pytest.approx([0.5, 0.5, 0.5], abs=0.01)
    assert mean(first(tmp_path / "grey", Image.new("L", (64, 64), 128))) == half
    sixteen = Image.fromarray(np.full((64, 64), 32768, np.uint16))
    assert sixteen.mode == "I;16"
    assert mean(first(tmp_path / "sixteen", sixteen)) == half
    assert mean(first(tmp_path / "tiff", sixteen, "a.tif")) == half
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert mean(first(tmp_path / "cmyk", cmyk, "a.jpg")) == pytest.approx([1, 0, 0], abs=0.05)
    assert mean(first(tmp_path / "bits", Image.new("1", (64, 64), 1))) == pytest.approx([1, 1, 1])


def test_a_16_bit_ramp_stays_a_ramp(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    seen = first(tmp_path, Image.fromarray(np.tile(ramp, (64, 1))))
    torch.testing.assert_close(seen[0, 5], torch.linspace(0, 1, 64), atol=0.005, rtol=0)


def test_floating_point_pictures_are_bad_rows(tmp_path):
    picture = encoded("TIFF", Image.fromarray(np.ones((64, 64), np.float32)))
    source = opened(good_rows(tmp_path)("float.tif", picture))
    for index in range(10):
        source.batch(index, 3)
    assert "floating-point" in source.bad_rows[0]["reason"]
