"""The editor takes any picture, gives each back in its own size, and a batch equals its pictures one by one."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import npedit
from npedit.benchmarks import toy
from npedit.editor import Editor, nearest_size, open_picture, pair_up, resize, to_pil, to_rgb, to_tensor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.runs.editor_facts import EditorFacts
from npedit.runs.resolve import resolve_editor
from npedit.toy.world import render

FACTS = {"format": 1, "family": "flux", "base": "embedded", "steps": 2, "sizes": [[32, 32]], "recipe": "toy"}


@pytest.fixture(scope="module")
def family():
    return Flux.tiny(0)


@pytest.fixture(scope="module")
def editor(family):
    return Editor(family, family.trainable_net(), 2, [(32, 32), (16, 32)])


def noise(mode, size, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8), "RGBA").convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    """A base model and an editor as they lie on disk."""
    root = tmp_path_factory.mktemp("models")
    family.pipe.save_pretrained(root / "base")
    net = family.trainable_net()
    with torch.no_grad():
        net.proj_out.weight.mul_(1.5)
    net.save_pretrained(root / "run" / "final" / "transformer")
    (root / "run" / "final" / "npedit.json").write_text(json.dumps({**FACTS, "base": str(root / "base")}))
    (root / "run" / "config.resolved.yaml").write_text("name: toy\n")
    return root


# -------------------------------------------------------------------------------------------------------- editing


def test_each_picture_comes_back_in_its_own_size_as_rgb(editor):
    sizes = [(32, 32), (100, 37), (1, 1), (64, 32), (500, 300)]
    modes = ["RGB", "RGBA", "L", "P", "CMYK"]
    images = [noise("RGB", s).convert(m) if m in ("CMYK", "P") else noise(m, s) for s, m in zip(sizes, modes)]
    out = editor.edit(images, "make it night")
    assert [im.size for im in out] == sizes and {im.mode for im in out} == {"RGB"}


def test_a_batch_equals_its_pictures_one_by_one(editor):
    images = [noise("RGB", (32, 32), i) for i in range(3)] + [noise("RGB", (32, 16), 9)]
    words = ["paint the circle red", "remove the cross", "make it night", "move it to the top left"]
    together = editor.edit(images, words, seed=5)
    for image, word, edited in zip(images, words, together):
        (alone,) = editor.edit(image, word, seed=5)
        assert np.abs(np.asarray(alone, int) - np.asarray(edited, int)).max() <= 1


def test_seed_steps_and_instruction_matter_and_the_same_repeats(editor):
    image = noise("RGB", (32, 32))
    edit = lambda *a, **k: editor.edit(image, *a, **k)[0].tobytes()  # noqa: E731
    first = edit("paint it red")
    assert first == edit("paint it red")
    assert len({first, edit("paint it red", seed=1), edit("paint it red", steps=4), edit("make it night")}) == 4


def test_the_net_is_what_edits(family, editor):
    other = family.trainable_net()
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    changed = Editor(family, other, 2, [(32, 32)])
    refs = render([toy.sample_items(1)[0].reference])
    assert not torch.allclose(editor.edit_tensor(refs, ["x"]), changed.edit_tensor(refs, ["x"]))


def test_edit_tensor_takes_a_seed_each_and_refuses_other_shapes(editor):
    refs = torch.rand(3, 3, 32, 32).clamp(0, 1)
    each = editor.edit_tensor(refs, ["a"] * 3, [4, 5, 6])
    assert torch.allclose(each[1:2], editor.edit_tensor(refs[1:2], ["a"], 5), atol=1e-5)
    assert each.shape == refs.shape and float(each.min()) >= 0 and float(each.max()) <= 1
    for bad in (refs[0], refs[:, :1], refs[:, :, :30]):
        with pytest.raises(ValueError, match="multiples of 8"):
            editor.edit_tensor(bad, ["a"] * 3)
    with pytest.raises(ValueError, match="expected 3 of each"):
        editor.edit_tensor(refs, ["a"] * 2)
    with pytest.raises(ValueError, match="at least one step"):
        editor.edit_tensor(refs, ["a"] * 3, steps=0)


def test_images_and_instructions_pair_up():
    assert pair_up(["a", "b"], ["x"]) == [("a", "x"), ("b", "x")]
    assert pair_up(["a"], ["x", "y"]) == [("a", "x"), ("a", "y")]
    assert pair_up(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    for images, words in (("abc", ["x", "y"]), ("", ["x"]), ("a", []), ("a", ["  "])):
        with pytest.raises(UserError, match="expected"):
            pair_up(list(images), words)


# -------------------------------------------------------------------------------------------------------- pictures


def test_orientation_is_applied_once(tmp_path):
    """EXIF orientation 6: the stored picture must be turned a quarter clockwise to stand upright."""
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = (255, 0, 0)
    stored = Image.fromarray(np.rot90(upright, 1).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"turned.{suffix}"
        stored.save(
            path, exif=exif, **({"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {})
        )
        for picture in (to_rgb(open_picture(path)), to_rgb(to_rgb(open_picture(path))), to_rgb(Image.open(path))):
            assert picture.size == (30, 20)
            assert np.abs(np.asarray(picture, int) - upright).mean() < 5


def test_transparency_lies_on_white_and_sixteen_bits_keep_their_brightness():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert to_rgb(grey).getpixel((0, 0)) == (128, 128, 128)
    assert to_rgb(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(UserError, match="floating-point"):
        to_rgb(Image.new("F", (4, 4)))


def test_scaling_a_block_enlargement_down_gives_the_original_back():
    small = noise("RGB", (32, 32))
    large = small.resize((256, 256), Image.Resampling.NEAREST)
    assert resize(large, (32, 32)).tobytes() == small.tobytes()
    assert resize(small, (32, 32)) is small
    assert to_pil(to_tensor(small)).tobytes() == small.tobytes()


def test_the_nearest_size_goes_by_shape_first():
    trained = [(512, 512), (32, 32), (384, 640), (640, 384)]
    assert nearest_size((1000, 1010), trained) == (512, 512)
    assert nearest_size((40, 40), trained) == (32, 32)
    assert nearest_size((100, 170), trained) == (384, 640)
    assert nearest_size((3000, 1000), trained) == (640, 384)


def test_bad_pictures_are_told_apart(tmp_path):
    whole = io.BytesIO()
    noise("RGB", (64, 64)).save(whole, "PNG")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("I am not a picture")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    Image.new("L", (1000, 2)).save(tmp_path / "thin.png")
    expected = {
        "missing.png": "there is no", "empty.png": "empty", "words.png": "is not one", "half.png": "broken",
        "huge.png": "megapixels", "thin.png": "1:64", "": "folder",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(UserError, match=words):
            open_picture(tmp_path / name)
    assert open_picture(_written(tmp_path / "fine.png", whole.getvalue())).size == (64, 64)
    with pytest.raises(UserError, match="0x5"):
        to_rgb(Image.new("RGB", (0, 5)))


def _written(path, data):
    path.write_bytes(data)
    return path


# --------------------------------------------------------------------------------------------------------- opening


def test_a_run_and_its_final_folder_open_alike(folder, family):
    run = Editor.open(folder / "run", device="cpu")
    final = Editor.open(str(folder / "run" / "final"), device="cpu")
    refs = torch.rand(2, 3, 32, 32)
    assert run.steps == 2 and run.sizes == ((32, 32),)
    assert torch.equal(run.edit_tensor(refs, ["a", "b"]), final.edit_tensor(refs, ["a", "b"]))
    untouched = Editor(family, family.trainable_net(), 2, [(32, 32)])
    assert not torch.allclose(run.edit_tensor(refs, ["a", "b"]), untouched.edit_tensor(refs, ["a", "b"]))


def test_what_is_not_an_editor_is_told_so(folder, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        Editor.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no npedit.json"):
        Editor.open(tmp_path)
    (tmp_path / "config.resolved.yaml").write_text("")
    with pytest.raises(UserError, match="no editor yet"):
        resolve_editor(tmp_path)
    final = tmp_path / "final"
    final.mkdir()
    for text, words in {
        "{": "expected JSON",
        json.dumps({**FACTS, "format": 9}): "format 1",
        json.dumps({k: v for k, v in FACTS.items() if k != "sizes"}): "sizes",
        json.dumps({**FACTS, "sizes": []}): "sizes >= 1",
        json.dumps([1]): "bad one",
    }.items():
        (final / "npedit.json").write_text(text)
        with pytest.raises(UserError, match=words):
            EditorFacts.read(final)
    (final / "npedit.json").write_text(json.dumps({**FACTS, "family": "flix"}))
    with pytest.raises(UserError, match="flux"):
        Editor.open(tmp_path, device="cpu")
    (final / "npedit.json").write_text(json.dumps({**FACTS, "base": str(folder / "base")}))
    with pytest.raises(UserError, match="to open; got"):
        Editor.open(tmp_path, device="cpu")  # no transformer/


def test_the_package_offers_the_editor_lazily():
    assert npedit.Editor is Editor
    with pytest.raises(AttributeError, match="Editr"):
        npedit.Editr  # noqa: B018
    import subprocess
    import sys

    code = "import sys, npedit, npedit.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"}).returncode == 0
