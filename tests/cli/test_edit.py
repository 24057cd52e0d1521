"""`npedit edit` as a user meets it: results, messages, and nothing overwritten, half-written or lost."""

import io
import shutil
import struct
import subprocess
import sys
import zlib
from functools import partial

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from npedit import output_pictures
from npedit.cli import edit as edit_module
from npedit.data._photos import srgb_profile
from npedit.editor import Editor
from npedit.families.flux import Flux
from npedit.input_pictures import colour_conversion
from tests.support.command_line import names, picture, run

# ------------------------------------------------------------------------------------------------------------ edit


def test_edit_one_picture(here):
    picture(here / "a.png")
    assert "a.png" in run("edit", "a.png", "paint the circle red", "-o", "out.png")
    assert names(here) == ["a.png", "out.png"]
    assert Image.open("out.png").size == (64, 48)
    run("edit", "a.png", "paint the circle red", "-o", "again.png", "--seed", 0)
    run("edit", "a.png", "paint the circle red", "-o", "other.png", "--seed", 1)
    first, again, other = (np.asarray(Image.open(f)) for f in ("out.png", "again.png", "other.png"))
    assert (first == again).all() and (first != other).any()


def test_edit_several_pictures_and_instructions(here):
    for i, name in enumerate(("a.png", "b.jpg", "c.webp")):
        picture(here / name, seed=i)
    run("edit", "a.png", "b.jpg", "c.webp", "make it night", "-o", "all")
    assert names(here / "all") == ["a-edited.png", "b-edited.jpg", "c-edited.webp"]
    run("edit", "a.png", "b.jpg", "-i", "make it night", "-i", "remove the cross", "-o", "two/")
    assert names(here / "two") == ["a-edited.png", "b-edited.jpg"]
    run("edit", "a.png", "-i", "make it night", "-i", "remove the cross", "-o", "one/")
    assert names(here / "one") == ["a-edited-2.png", "a-edited.png"]
    run("edit", "a.png", "make it night")
    assert "a-edited.png" in names(here)
    night = (here / "all" / "a-edited.png").read_bytes()
    assert night == (here / "two" / "a-edited.png").read_bytes() == (here / "a-edited.png").read_bytes()


def test_an_output_that_exists_is_replaced_only_when_asked(here):
    picture(here / "a.png")
    (here / "out.jpeg").write_text("old")
    said = run("edit", "a.png", "make it night", "-o", "out.jpeg", code=2)
    assert "out.jpeg exist already" in said and (here / "out.jpeg").read_text() == "old"
    run("edit", "a.png", "make it night", "-o", "out.jpeg", "--overwrite")
    assert Image.open("out.jpeg").format == "JPEG" and names(here) == ["a.png", "out.jpeg"]


def test_words_unknown_to_the_embedded_editor_are_named(here):
    picture(here / "a.png")
    said = run("edit", "a.png", "paint the dog grren", "-o", "o.png")
    assert "'dog', 'grren'. Did you mean" in said and "'green'?" in said and "'paint'" not in said
    assert "never learnt" not in run("edit", "a.png", "Paint the circle gray!", "-o", "o2.png")


BAD_EDITS = {
    "missing": (["none.png", "x"], "there is no file 'none.png'"),
    "folder": (["folder", "x"], "folder is a folder"),
    "no picture": (["words.png", "x"], "is not one"),
    "empty": (["empty.png", "x"], "empty"),
    "truncated": (["half.png", "x"], "broken"),
    "no instruction": (["a.png"], "then an instruction"),
    "picture last": (["a.png", "b.png"], "then an instruction"),
    "picture missing at the end": (["a.png", "typo.PNG"], "there is no picture typo.PNG"),
    "long instruction": (["none.png", "paint the circle red " * 20], "there is no file 'none.png'"),
    "long picture": (["a" * 300 + ".png", "x"], "there is no file 'aaa"),
    "long output": (["a.png", "x", "-o", "a" * 300 + ".png"], "can be written"),
    "long model": (["a.png", "x", "-m", "a" * 300], "not a folder"),
    "blank instruction": (["a.png", " "], "empty one"),
    "counts": (["a.png", "b.png", "a.png", "-i", "x", "-i", "y"], "3 images and 2 instructions"),
    "suffix": (["a.png", "x", "-o", "out.gif"], "expected an output name"),
    "one file for two": (["a.png", "b.png", "x", "-o", "out.png"], "Name a folder"),
    "onto itself": (["a.png", "x", "-o", "./a.png"], "other than the picture itself"),
    "file as folder": (["a.png", "x", "-o", "words.png/out.png"], "can be written"),
    "model": (["a.png", "x", "-m", "folder"], "no npedit.json"),
    "one bad of two": (["a.png", "half.png", "x", "-o", "results/"], "broken"),
}


@pytest.mark.parametrize("words,message", BAD_EDITS.values(), ids=BAD_EDITS)
def test_a_bad_edit_ends_with_2_and_writes_nothing(here, words, message):
    for name in ("a.png", "b.png", "half.png"):
        picture(here / name)
    (here / "half.png").write_bytes((here / "half.png").read_bytes()[:3000])
    (here / "words.png").write_text("words")
    (here / "empty.png").write_bytes(b"")
    (here / "folder").mkdir()
    before = names(here)
    assert message in run("edit", *words, code=2)
    assert names(here) == before


def test_when_writing_fails_the_earlier_results_stay_and_nothing_is_half_written(here, monkeypatch):
    """The second picture cannot be saved: the first is there, whole, and no temporary file."""
    picture(here / "a.png"), picture(here / "b.png", seed=1)
    save, calls = Image.Image.save, []

    def full(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    said = run("edit", "a.png", "b.png", "make it night", "-o", "out/", code=2)
    assert "No space left" in said and "a-edited.png" in said
    assert names(here / "out") == ["a-edited.png"]
    assert Image.open(here / "out" / "a-edited.png").size == (64, 48)


def test_without_an_output_a_free_name_is_found(here):
    picture(here / "a.png")
    for _ in range(3):
        run("edit", "a.png", "make it night")
    assert names(here) == ["a-edited-2.png", "a-edited-3.png", "a-edited.png", "a.png"]
    again = run("edit", "a.png", "make it night", "-o", ".", code=2)
    assert "a-edited.png exist already" in again


def test_results_are_written_as_they_are_ready_and_memory_is_bounded(here, monkeypatch):
    """40 pictures: the first result is on disk before the last picture is read for its edit; few are held at a time."""
    for i in range(40):
        picture(here / f"{i:02}.png", seed=i)
    read, there = edit_module.open_picture, []

    def noted(path):
        there.append(len(list((here / "out").glob("*.png"))) if (here / "out").is_dir() else 0)
        return read(path)

    monkeypatch.setattr(edit_module, "open_picture", noted)
    run("edit", *(f"{i:02}.png" for i in range(40)), "make it night", "-o", "out/")
    assert len(names(here / "out")) == 40
    assert there[:40] == [0] * 40  # each is checked before the first edit
    assert len(there) == 80 and all(k - 40 - written <= 17 for k, written in enumerate(there) if k >= 40)


def test_large_pictures_are_held_few_at_a_time(parts):
    class Counting(Editor):
        held: list[int] = []

        def _edit_window(self, window, *rest):
            self.held.append(sum(im.width * im.height for im, *_ in window))
            return [im for im, *_ in window]

    family = Flux.tiny(0)
    editor = Counting(family, family.trainable_net(), 1, [(32, 32)])
    size = (6000, 4000)
    assert len(list(editor.edit_each((Image.new("RGB", size) for _ in range(5)), ["x"] * 5))) == 5
    assert max(editor.held) <= 64_000_000 and len(editor.held) == 3


def test_results_are_srgb_with_a_profile_and_keep_transparency(here):
    picture(here / "a.png")
    clear = Image.open(here / "a.png").convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(here / "clear.png")
    for name in ("a.jpg", "a.webp", "out.png"):
        run("edit", "a.png", "make it night", "-o", name)
        assert "icc_profile" in Image.open(here / name).info, name
    run("edit", "clear.png", "make it night", "-o", "kept.png")
    kept = Image.open(here / "kept.png")
    assert kept.mode == "RGBA" and kept.getchannel("A").tobytes() == clear.getchannel("A").tobytes()
    assert "laid on white" in run("edit", "clear.png", "make it night", "-o", "opaque.jpg")


def all_alphas(side=32):
    """A picture with smooth colours and transparency, and with a pixel of each extreme."""
    ramp = Image.linear_gradient("L")
    bands = (ramp, ramp.rotate(90), ramp.rotate(180), ramp.rotate(270))
    made = Image.merge("RGBA", [band.resize((side, side)) for band in bands])
    for x, alpha in enumerate((0, 1, 64, 254, 255)):
        made.putpixel((x, 0), (115, 87, 92, alpha))
    return made


def on_white(picture):
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), int)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
@pytest.mark.parametrize("target", ["o.png", "-"])
def test_an_unchanged_edit_keeps_the_colours_of_transparent_pixels(here, monkeypatch, name, target):
    clear = all_alphas()
    clear.save(here / name, lossless=True, exact=True)
    monkeypatch.setattr(Editor, "edit_tensor", lambda self, references, *rest: references)
    written = []
    monkeypatch.setattr(edit_module, "write_to_stdout", lambda picture, xmp: written.append(picture))
    monkeypatch.setattr(edit_module.sys.stdout.__class__, "isatty", lambda self: False, raising=False)
    run("edit", name, "x", "-o", target)
    result = written[0] if written else Image.open(here / target)
    assert result.mode == "RGBA" and result.tobytes() == clear.tobytes()


@pytest.mark.parametrize("rows", [7, 256])
def test_a_changed_edit_looks_on_white_as_the_editor_made_it(monkeypatch, rows):
    monkeypatch.setattr(output_pictures, "STRIP_ROWS", rows)
    clear, rng = all_alphas(), np.random.default_rng(0)
    wanted = clear.copy()  # any other colours under the same alpha
    wanted.paste(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), (0, 0))
    wanted.putalpha(clear.getchannel("A"))
    edited = Image.fromarray(on_white(wanted).astype(np.uint8))
    result = output_pictures.restore_transparency(edited, clear)
    assert result.getchannel("A").tobytes() == clear.getchannel("A").tobytes()
    assert abs(on_white(result) - on_white(wanted)).max() <= 1
    opaque = np.asarray(clear)[..., 3] == 255
    assert opaque.any() and (np.asarray(result)[opaque] == np.asarray(wanted)[opaque]).all()
    black = np.asarray(output_pictures.restore_transparency(Image.new("RGB", (32, 32)), clear))
    assert (black[..., :3][black[..., 3] > 0] == 0).all()  # as dark as the transparency allows


def test_a_result_that_its_format_cannot_hold_is_refused_before_work(here):
    Image.new("RGB", (17000, 300)).save(here / "long.png")
    said = run("edit", "long.png", "make it night", "-o", "out.webp", "-m", "nowhere", code=2)
    assert "at most 16383 pixels" in said and names(here) == ["long.png"]


def test_standard_output_takes_one_png(here):
    picture(here / "a.png")
    words = [
        sys.executable,
        "-c",
        "from npedit.cli.main import main; main()",
        "edit",
        "a.png",
        "make it night",
        "-o",
        "-",
    ]
    done = subprocess.run(words, capture_output=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert Image.open(io.BytesIO(done.stdout)).size == (64, 48) and names(here) == ["a.png"]
    assert "one result" in run("edit", "a.png", "a.png", "make it night", "-o", "-", code=2)


def test_bytes_that_are_no_utf8_are_a_message(here):
    done = subprocess.run([sys.executable, "-m", "npedit", "edit", "a.png", b"\xff red"], capture_output=True, cwd=here)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and rb"\xff red" in done.stderr


@pytest.mark.parametrize("command", ["edit", "export"])
def test_weights_that_are_not_finite_are_an_error(here, parts, command):
    shutil.copytree(parts / "editor", here / "bad")
    (file,) = (here / "bad").rglob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    picture(here / "a.png")
    words = (
        ["edit", "a.png", "make it night", "-m", "bad", "-o", "o.png"] if command == "edit" else ["export", "bad", "x"]
    )
    assert "expected finite weights" in run(*words, code=2)
    assert names(here) == ["a.png", "bad"]


def test_keep_resolution_is_used_and_masks_are_written(here, monkeypatch):
    """The parts are random weights, so that everything changes: this is said, and the masks are white. An edit of a
    corner keeps the rest of the picture."""
    picture(here / "a.png", (300, 200)), picture(here / "b.png", (300, 200), seed=1)
    said = run("edit", "a.png", "b.png", "make it night", "-o", "out/", "--keep-resolution", "--mask", "masks/")
    assert "of a.png changed" in said and "of b.png changed" in said and "detail will be lost" not in said
    assert names(here / "masks") == ["a-mask.png", "b-mask.png"]
    assert np.asarray(Image.open(here / "masks" / "a-mask.png")).min() == 255

    def paint_a_corner(self, references, *rest):
        out = references.clone()
        out[:, :, :10, :10] = 1 - out[:, :, :10, :10].round()
        return out

    monkeypatch.setattr(Editor, "edit_tensor", paint_a_corner)
    smooth = Image.effect_noise((300, 200), 5).convert("RGB")
    smooth.save(here / "c.png")
    run("edit", "c.png", "make it night", "-o", "c-out.png", "--keep-resolution", "--mask", "m.png")
    mask, result = np.asarray(Image.open(here / "m.png"))[..., 0], np.asarray(Image.open(here / "c-out.png"))
    assert mask.shape == (200, 300) and mask[:40, :60].min() == 255 and (mask[100:, 150:] == 0).all()
    assert (result[mask == 0] == np.asarray(smooth)[mask == 0]).all()
    clear = all_alphas(200)
    clear.save(here / "d.png")
    run("edit", "d.png", "make it night", "-o", "d-out.png", "--keep-resolution", "--mask", "n.png")
    mask, result = np.asarray(Image.open(here / "n.png"))[..., 0], np.asarray(Image.open(here / "d-out.png"))
    assert (mask == 0).mean() > 0.5 and (result[mask == 0] == np.asarray(clear)[mask == 0]).all()


def write_png16(path, samples):
    """A PNG of 16 bits a channel, which Pillow cannot write: `samples` is (h, w, 1 to 4)."""
    kind, size = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]], struct.pack(">II", *samples.shape[1::-1])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [(b"IHDR", size + bytes([16, kind, 0, 0, 0])), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def swapped_colours_profile():
    """sRGB's profile with its red and green primaries exchanged."""
    icc = srgb_profile()
    return icc.replace(b"rXYZ", b"!XYZ").replace(b"gXYZ", b"rXYZ").replace(b"!XYZ", b"gXYZ")


def noise(mode="RGB"):
    return Image.merge("RGB", [Image.effect_noise((40, 30), 60 + k) for k in range(3)]).convert(mode)


WRITERS = {  # name -> (a function that writes the picture, what the note says)
    "profile.png": (lambda path: noise().save(path, icc_profile=swapped_colours_profile()), "colour profile"),
    "profile.jpg": (lambda path: noise().save(path, icc_profile=swapped_colours_profile()), "colour profile"),
    "cmyk.jpg": (lambda path: noise("CMYK").save(path), "CMYK"),
    "grey.tif": (lambda path: Image.fromarray(np.full((30, 40), 999, np.uint16)).save(path), "16 bits"),
    **{f"deep{n}.png": (partial(lambda n, path: write_png16(path, np.full((30, 40, n), 999)), n), "16 bits")
       for n in (1, 2, 3, 4)},
    "plain.png": (lambda path: noise().save(path), ""),
    "srgb.jpg": (lambda path: noise().save(path, icc_profile=srgb_profile()), ""),
    "grey.png": (lambda path: noise("L").save(path), ""),
    "palette.png": (lambda path: noise("P").save(path), ""),
    "alpha.png": (lambda path: noise("RGBA").save(path), ""),
}  # fmt: skip


def test_photos_that_are_converted_are_named_in_one_note(here):
    for name, (write, _) in WRITERS.items():
        write(here / name)
        assert colour_conversion(here / name).startswith(WRITERS[name][1]), name
        assert bool(colour_conversion(here / name)) == bool(WRITERS[name][1]), name
    converted = [name for name, (_, why) in WRITERS.items() if why]
    said = run("edit", *WRITERS, "x", "-o", "out/", "--keep-resolution")
    assert said.count("converted to 8-bit sRGB") == 1 and f"{len(converted) - 3} more" in said
    assert all(name in said.partition("more")[0] for name in converted[:3])
    plain = [name for name in WRITERS if name not in converted]
    assert "converted" not in run("edit", *plain, "x", "-o", "plain/", "--keep-resolution")
    assert "converted" not in run("edit", *converted, "x", "-o", "scaled/")  # no part of the photo is kept


BAD_MASKS = {
    "alone": (["--mask", "m.png"], "--keep-resolution with --mask"),
    "of the result": (["--mask", "out.png", "--keep-resolution"], "another file for the mask"),
    "of the picture": (["--mask", "a.png", "--keep-resolution"], "other than the picture itself"),
    "suffix": (["--mask", "m.gif", "--keep-resolution"], "expected an output name"),
    "exists": (["--mask", "b.png", "--keep-resolution"], "b.png exist already"),
}


@pytest.mark.parametrize("words,message", BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_mask_that_cannot_be_written_is_said_before_any_work(here, words, message):
    picture(here / "a.png"), picture(here / "b.png")
    assert message in run("edit", "a.png", "x", "-o", "out.png", *words, code=2)
    assert names(here) == ["a.png", "b.png"]
