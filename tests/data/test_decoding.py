"""Whatever a file holds, reading it gives a picture or one kind of error; and colours and depth are right."""

import io
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms

from npedit.data._photos import (
    BadImage,
    _quiet_pillow,
    decoding,
    load_photo,
    read_photo,
    read_photo_size,
    srgb_profile,
    to_srgb,
)
from npedit.errors import UserError
from npedit.input_pictures import open_picture
from npedit.prepare.photos import scan_photo
from tests.support.grey_profile import grey_profile
from tests.support.photo_sets import encoded, good_rows, opened

PHOTO = Image.fromarray(skimage.data.astronaut()[::16, ::16].copy())  # 32 x 32
FORMATS = {
    "AVIF": {},
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "DDS": {},
}
CHANGES = 60  # of one byte, in each format


def saved(kind, picture=PHOTO, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# ---- the boundary


@pytest.mark.parametrize("kind", FORMATS)
def test_a_changed_byte_gives_a_picture_or_one_kind_of_error(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = FORMATS[kind] | ({} if kind in ("GIF", "DDS") else {"exif": exif, "icc_profile": srgb_profile()})
    whole, rng, path = saved(kind, **options), random.Random(kind), tmp_path / "a.picture"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(CHANGES):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            path.write_bytes(data)
            for read in (read_photo_size, lambda p: load_photo(p, (16, 16)), lambda p: read_photo(p.read_bytes())):
                try:
                    read(path)
                except BadImage as error:
                    assert str(error)
            try:
                assert open_picture(path).mode in ("RGB", "RGBA")
            except UserError as error:
                assert str(path) in str(error)


def damaged():
    """(name, file) of pictures whose decoders raise RuntimeError and NotImplementedError."""
    avif = bytearray(saved("AVIF"))
    start = avif.index(b"mdat") + 4
    avif[start : start + 40] = bytes(40)
    dds = bytearray(saved("DDS"))
    dds[80:84] = (0x80000000).to_bytes(4, "little")  # flags of the pixel format
    return [("a.avif", bytes(avif)), ("b.jpg", bytes(dds))]


@pytest.mark.parametrize(("name", "file"), damaged())
def test_an_error_that_is_no_os_error_is_one_bad_row_and_one_message(tmp_path, name, file):
    with pytest.raises((RuntimeError, NotImplementedError)), Image.open(io.BytesIO(file)) as image:
        image.load()
    source = opened(good_rows(tmp_path)(name, file))
    for index in range(10):
        source.batch(index, 3)
    assert [bad["id"] for bad in source.bad_rows] == ["bad"]
    with pytest.raises(UserError, match="broken or truncated"):
        open_picture(tmp_path / name)


def test_lack_of_memory_and_interruptions_pass_the_boundary():
    for kind in (MemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), decoding():
            raise kind


def test_pillows_warnings_are_hidden_and_filters_are_left_as_they_were():
    before = list(warnings.filters)

    def read(_):
        with _quiet_pillow:
            return len(warnings.filters)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(200)))
    assert list(warnings.filters) == before


# ---- EXIF


def broken_exif():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description that is long enough to stand outside of its entry"
    data = bytearray(saved("JPEG", exif=exif))
    start = data.index(b"Exif") + 6
    data[start + 10 : start + 22] = b"\xff" * 12  # the first entry
    return bytes(data)


def test_broken_exif_data_count_as_none_in_training_and_in_edit(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(broken_exif())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photo_size(path) == (32, 32)
        assert load_photo(path, (32, 32)).shape == (3, 32, 32)
        assert open_picture(path).size == (32, 32)
        assert to_srgb(Image.open(path)).size == (32, 32)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_in_a_file_is_run(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file's name is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    path = tmp_path / "holiday.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(OSError):  # the false Ghostscript wrote no picture
        Image.open(path).load()
    (tmp_path / "was-run").unlink()
    for read in (read_photo, read_photo_size, lambda p: load_photo(p, (32, 32))):
        with pytest.raises(BadImage, match="not a picture"):
            read(path)
    with pytest.raises(UserError, match="is not one"):
        open_picture(path)
    assert "not a picture" in scan_photo(tmp_path, path.name, None, 10**8, 16)["reason"]
    assert not (tmp_path / "was-run").exists()


# ---- colour profiles


def profile(primaries, gamma):
    """An RGB profile: sRGB's with other primaries (XYZ at D50, one row a channel) and a pure power as its curve."""
    data = bytearray(srgb_profile())
    for k in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * k
        tag, at = bytes(data[entry : entry + 4]), int.from_bytes(data[entry + 4 : entry + 8], "big")
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            row = primaries[b"rgb".index(tag[:1])]
            data[at + 8 : at + 20] = b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in row)
        elif tag.endswith(b"TRC"):
            assert data[at : at + 10] == b"para\0\0\0\0\0\3"
            data[at + 12 : at + 32] = b"".join(round(v * 65536).to_bytes(4, "big") for v in (gamma, 1, 0, 0, 0))
    return bytes(data)


ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE_RGB = profile(ADOBE, 2.19921875)


def adobe_to_srgb(pixels):
    linear = (pixels / 255) ** 2.19921875 @ np.array(ADOBE) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_colour_profile_is_converted_to_srgb_wherever_pictures_are_read(tmp_path, kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    path = tmp_path / "a.picture"
    path.write_bytes(saved(kind, Image.fromarray(pixels), icc_profile=ADOBE_RGB, **options))
    near = 12 if kind == "JPEG" else 2
    wanted = adobe_to_srgb(pixels)
    assert abs(wanted - pixels).max() > 40, "the profile matters"
    for read in (
        np.asarray(read_photo(path)),
        np.asarray(read_photo(path.read_bytes())),
        np.asarray(open_picture(path)),
        np.asarray(to_srgb(Image.open(path))),
        255 * load_photo(path, (32, 32)).permute(1, 2, 0).numpy(),
    ):
        assert abs(read - wanted).max() <= near


def test_without_a_profile_and_with_that_of_srgb_no_pixel_changes():
    for options in ({}, {"icc_profile": srgb_profile()}):
        assert np.array_equal(np.asarray(read_photo(saved("PNG", **options))), np.asarray(PHOTO))


def test_a_profile_holds_for_the_colours_behind_transparency_and_for_palettes():
    pixels = np.full((8, 8, 4), (60, 200, 60, 128), np.uint8)
    pixels[:4, :, 3] = 255
    wanted = adobe_to_srgb(np.array([[60, 200, 60]]))[0]
    seen = np.asarray(read_photo(saved("PNG", Image.fromarray(pixels), icc_profile=ADOBE_RGB), keep_alpha=True))
    assert np.array_equal(seen[..., 3], pixels[..., 3])
    assert abs(seen[..., :3] - wanted).max() <= 2
    flat = np.asarray(read_photo(saved("PNG", Image.fromarray(pixels), icc_profile=ADOBE_RGB)))
    assert abs(flat[6, 6] - (wanted + 255) / 2).max() <= 2
    palette = Image.fromarray(pixels[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    assert abs(np.asarray(read_photo(saved("PNG", palette, icc_profile=ADOBE_RGB))) - wanted).max() <= 3


def test_a_grey_picture_with_an_rgb_profile_is_converted_too():
    seen = np.asarray(read_photo(saved("JPEG", Image.new("L", (8, 8), 60), icc_profile=profile(SRGB, 1.0))))
    assert abs(seen.astype(int) - 133).max() <= 2  # linear 60 / 255 in sRGB


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_a_grey_profile_holds_for_grey_pictures(mode):
    grey = Image.new("L", (8, 8), 60 if mode != "1" else 255).convert(mode)
    seen = np.asarray(read_photo(saved("PNG", grey, icc_profile=grey_profile(1.0))))
    assert abs(seen.astype(int) - (255 if mode == "1" else 133)).max() <= 2  # linear 60 / 255 in sRGB


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_picture_with_a_grey_profile_keeps_its_colours(mode, caplog):
    red = Image.new("RGBA", (8, 8), (200, 30, 30, 128)).convert(mode)
    wanted = to_srgb(red, keep_alpha=True)
    assert len(set(np.asarray(wanted)[0, 0, :3])) > 1
    seen = read_photo(saved("PNG", red, icc_profile=grey_profile(2 + len(mode) / 10)), keep_alpha=True)
    assert np.array_equal(np.asarray(seen), np.asarray(wanted))
    assert "GRAY pictures" in caplog.text


@pytest.mark.parametrize("icc", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_cannot_be_used_is_reported_once_and_the_picture_is_read(tmp_path, caplog, icc):
    path = tmp_path / "a.png"
    path.write_bytes(saved("PNG", icc_profile=icc))
    for _ in range(3):
        assert np.array_equal(np.asarray(read_photo(path)), np.asarray(PHOTO))
    assert [record.getMessage().startswith(str(path)) for record in caplog.records] == [True]


# ---- depth and transparency


def tiff(values, **options):
    return saved("TIFF", Image.fromarray(values), **options)


@pytest.mark.parametrize("most", [255, 65535, 2**32 - 1])
def test_a_32_bit_tiff_is_scaled_by_the_range_in_use(most):
    ramp = np.tile(np.linspace(0, most, 256), (4, 1)).round().astype(np.uint32)
    picture = Image.fromarray(ramp.view(np.int32))
    file = saved("TIFF", picture)
    entry = b"\x53\x01\x03\x00\x01\x00\x00\x00"  # SampleFormat, one short number; Pillow writes 2, signed
    assert entry + b"\x02" in file
    seen = np.asarray(read_photo(file.replace(entry + b"\x02", entry + b"\x01")))[0, :, 0]
    assert abs(seen.astype(int) - np.arange(256)).max() <= 1


def test_values_of_unknown_range_are_refused():
    for values in (np.full((4, 4), 2**20, np.int32), np.full((4, 4), 0.5, np.float32)):
        with pytest.raises(BadImage, match="16 bits"):
            read_photo(tiff(values))
    with pytest.raises(BadImage, match="black"):
        read_photo(tiff(np.full((4, 4), -5, np.int32)))


def test_16_bits_are_scaled_whatever_the_brightest_value_is():
    dark = np.full((4, 4), 200, np.uint16)
    for kind in ("PNG", "TIFF"):
        assert read_photo(saved(kind, Image.fromarray(dark))).getpixel((0, 0)) == (1, 1, 1)
        assert read_photo(saved(kind, Image.fromarray(dark * 320))).getpixel((0, 0)) == (249, 249, 249)


def test_alpha_is_kept_when_asked_for_and_only_where_something_is_transparent():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 7))
    assert read_photo(saved("PNG", clear), keep_alpha=True).getpixel((0, 0)) == (200, 0, 0, 7)
    assert read_photo(saved("PNG", clear)).mode == "RGB"
    opaque = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    assert read_photo(saved("PNG", opaque), keep_alpha=True).mode == "RGB"
    grey = Image.new("LA", (4, 4), (90, 7))
    assert read_photo(saved("PNG", grey), keep_alpha=True).getpixel((0, 0)) == (90, 90, 90, 7)


def test_a_photograph_comes_back_as_it_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG", PHOTO))
    assert torch.equal(
        (255 * load_photo(path, (32, 32))).round().byte(), torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)
    )
