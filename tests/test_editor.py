"""The editor takes any picture, gives each back in its own size, and a batch equals its pictures one by one."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import npedit
from npedit.benchmarks import toy
from npedit.data._photos import to_pil
from npedit.editor import Editor, nearest_size, pair_up, resize, to_tensor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.input_pictures import open_picture, to_rgb
from npedit.nets.lora import LoraAdapter, weights_module
from npedit.nets.offload import OffloadedModule
from npedit.nets.quantised import QuantisedLinear
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


def test_pictures_with_seeds_of_their_own_equal_edits_one_by_one(editor):
    """As a server asks for them, in one batch."""
    pictures = [noise("RGB", (40, 56), 1), noise("RGB", (56, 40), 2), noise("RGB", (40, 56), 3)]
    texts = ["paint it red", "paint it blue", "remove it"]
    together = editor.edit_each(pictures, texts, seed=[3, 1, 2])
    for image, text, seed, edited in zip(pictures, texts, [3, 1, 2], together):
        (alone,) = editor.edit(image, text, seed=seed)
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


# ---------------------------------------------------------------------------------------------------- small cards


@pytest.fixture(scope="module")
def lora_folder(folder):
    """An editor with LoRA as it lies on disk."""
    family, final = Flux.tiny(0), folder / "lora" / "final"
    final.mkdir(parents=True)
    adapter = LoraAdapter.create(family.lora_base(), "student", 4, 4.0, 0)
    with torch.no_grad():
        for p in adapter.lora_layers.parameters():
            p.normal_(std=0.1)
    adapter.save(final)
    (final / "npedit.json").write_text(json.dumps({**FACTS, "base": str(folder / "base")}))
    return folder / "lora"


def storages(*modules):
    return {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}


def test_a_fully_fine_tuned_editor_holds_no_second_denoiser(folder, tmp_path):
    """Neither from final/, nor from a checkpoint; the base model's own denoiser need not even be there."""
    editor = Editor.open(folder / "run")
    assert editor.family.base is editor.net is editor.family.pipe.transformer
    without = tmp_path / "base"
    shutil.copytree(folder / "base", without, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        shutil.copytree(folder / "base" / part, without / part, dirs_exist_ok=True)
    slim = Editor.open(folder / "run", base=str(without))
    image = noise("RGB", (32, 32))
    assert slim.edit(image, "a")[0].tobytes() == editor.edit(image, "a")[0].tobytes()


def test_the_untrained_editor_is_the_base_model(folder, family):
    start, image = Editor.open_untrained(folder / "run"), noise("RGB", (32, 32))
    wanted = Editor(family, family.trainable_net(), 2, [(32, 32)]).edit(image, "a")[0]
    assert start.edit(image, "a")[0].tobytes() == wanted.tobytes()
    assert Editor.open(folder / "run").edit(image, "a")[0].tobytes() != wanted.tobytes()


@pytest.mark.parametrize("kind", ["run", "lora"])
def test_offloading_changes_no_pixel_and_one_part_is_loaded_at_a_time(folder, lora_folder, kind, monkeypatch):
    image, path = noise("RGB", (32, 32)), folder / kind
    wanted = Editor.open(path).edit(image, "a")[0]
    editor, loaded, most = Editor.open(path, offload=True), set(), []
    load, unload = OffloadedModule.load, OffloadedModule.unload
    monkeypatch.setattr(OffloadedModule, "load", lambda m: (loaded.add(m), most.append(len(loaded)), load(m))[2])
    monkeypatch.setattr(OffloadedModule, "unload", lambda m: (loaded.discard(m), unload(m))[1])
    assert editor.edit(image, "a")[0].tobytes() == wanted.tobytes()
    assert not loaded and max(most) == 2  # FLUX has two text encoders; every other part is one module
    kept = storages(*(m for p in editor.family.pipe.components.values() if isinstance(p, torch.nn.Module) for m in [p]))
    assert kept <= {t.untyped_storage().data_ptr() for p in editor._offloaded.values() for m in p
                    for t in m._in_host_memory}  # fmt: skip


@pytest.mark.parametrize("kind", ["run", "lora"])
@pytest.mark.parametrize(("bits", "largest"), [(8, 12), (4, 60)])
def test_weights_in_few_bits(folder, lora_folder, kind, bits, largest):
    image, path = noise("RGB", (32, 32)), folder / kind
    wanted, few = Editor.open(path), Editor.open(path, bits=bits, offload=kind == "lora")
    a, b = (np.asarray(e.edit(image, "a")[0], dtype=int) for e in (wanted, few))
    assert 0 < np.abs(a - b).max() <= largest
    net, full = weights_module(few.net), weights_module(wanted.net)
    for block in few.family.facts.blocks:
        assert any(isinstance(m, QuantisedLinear) for m in net.get_submodule(block).modules())
        assert sum(t.nbytes for t in net.get_submodule(block).buffers()) < sum(
            t.nbytes for t in full.get_submodule(block).parameters()
        )
    assert all(any(isinstance(m, QuantisedLinear) for m in e.modules()) for e in few.family.text_encoders())


def test_other_bits_are_refused(folder):
    with pytest.raises(UserError, match="bits 0, 4 or 8; got 5"):
        Editor.open(folder / "run", bits=5)


@pytest.mark.parametrize(("side", "counts"), [(1024, [1, 1]), (512, [4, 1]), (32, [16, 4])])
def test_large_pictures_are_edited_in_small_batches(editor, monkeypatch, side, counts):
    """One megapixel in a pass, whatever the number of pictures."""
    seen = []

    def count_batch(family, net, references, *rest):
        seen.append(len(references))
        return references

    monkeypatch.setattr("npedit.generator.edit_images", count_batch)
    editor.edit_tensor(torch.zeros(1, 3, side, side).expand(sum(counts), 3, side, side), ["a"] * sum(counts))
    assert seen == counts
