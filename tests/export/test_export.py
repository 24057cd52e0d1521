"""The export of an editor: which base it names and reads, merging, permissions, and the command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from command_line import run

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export.export import export_editor
from npedit.families.flux import Flux
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import embedded_weights
from tests.support.exported import load, noise, seeds, write_editor
from tests.support.parts import nudge

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny editor trained with LoRA, alpha being three times the rank."""
    return write_editor("flux", tmp_path_factory.mktemp("lora"), True)


def edited(folder: Path, base: str = "") -> torch.Tensor:
    picture = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))
    return Editor.open(folder, device="cpu", base=base).edit_tensor(picture, ["make it night"], 4)


@pytest.mark.parametrize("form", ["", "diffusers"])
@pytest.mark.parametrize("merge", [False, True])
def test_npedit_edits_alike_with_every_form(lora: Path, tmp_path: Path, form: str, merge: bool) -> None:
    export_editor(str(lora), tmp_path / "out", form, merge=merge)
    torch.testing.assert_close(edited(tmp_path / "out"), edited(lora), atol=1e-5, rtol=0)
    assert (tmp_path / "out" / LORA).exists() != merge
    assert (tmp_path / "out" / "transformer" / "config.json").exists() == merge


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_is_told_and_leaves_nothing(lora: Path, tmp_path: Path, merge: bool) -> None:
    """safetensors has an error of its own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((lora / LORA).stat().st_size + 10, before[1]))
    try:
        with pytest.raises(UserError, match="expected room on the disk"):
            export_editor(str(lora), tmp_path / "out", merge=merge)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_merged_editor_is_whole_in_diffusers(lora: Path, tmp_path: Path) -> None:
    export_editor(str(lora), tmp_path / "out", "diffusers", merge=True)
    pipe = load(tmp_path / "out")
    assert not hasattr(pipe.transformer, "peft_config")
    wanted = Editor.open(lora, device="cpu").edit(noise((32, 32)), "make it night", seed=3)[0]
    found = pipe(image=noise((32, 32)), prompt="make it night", generator=seeds(3)).images[0]
    assert max(abs(a - b) for a, b in zip(found.tobytes(), wanted.tobytes(), strict=True)) <= 1
    assert "_name_or_path" not in (tmp_path / "out" / "transformer" / "config.json").read_text()


def test_another_base_is_named_while_the_old_one_is_read(lora: Path, tmp_path: Path) -> None:
    """A Hub id for use elsewhere: the index of the base is still read where the base lies, without the network."""
    done = export_editor(str(lora), tmp_path / "out", "diffusers", base="someone/flux")
    assert done.base == "someone/flux"
    part = json.loads((tmp_path / "out" / "vae" / "base_part.json").read_text())
    assert part == {"base": "someone/flux", "subfolder": "vae", "library": "diffusers", "class": "AutoencoderKL"}
    assert json.loads((tmp_path / "out" / "npedit.json").read_text())["base"] == "someone/flux"


def test_a_base_that_was_moved_is_named_by_its_new_folder(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, moved = tmp_path / "mine", tmp_path / "moved"
    shutil.copytree(lora, mine)
    facts = json.loads((mine / "npedit.json").read_text())
    facts["base"] = shutil.copytree(facts["base"], moved).with_name("gone").__fspath__()
    (mine / "npedit.json").write_text(json.dumps(facts))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="Say with --base where the base model is"):
        export_editor(str(mine), tmp_path / "none", "diffusers")
    assert not (tmp_path / "none").exists()
    monkeypatch.chdir(tmp_path)
    export_editor(str(mine), tmp_path / "out", "diffusers", base="moved", merge=True)
    assert json.loads((tmp_path / "out" / "npedit.json").read_text())["base"] == str(moved)
    torch.testing.assert_close(edited(tmp_path / "out"), edited(lora), atol=1e-5, rtol=0)


def test_every_file_can_be_read_as_a_new_file_can(lora: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        export_editor(str(lora), tmp_path / "out", "diffusers")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o644}


def test_the_command_says_how_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = run("export", "embedded", "out", "--as", "diffusers")
    assert (
        "DiffusionPipeline.from_pretrained('out', custom_pipeline='out', trust_remote_code=True, torch_dtype=torch."
        in text
    )
    assert "the form diffusers or comfyui; got 'onnx'" in run("export", "embedded", "other", "--as", "onnx", code=2)
    assert "expected a model of the size that ComfyUI knows" in run(
        "export", "embedded", "other", "--as", "comfyui", code=2
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_merging_a_whole_editor_is_said_to_do_nothing(tmp_path: Path) -> None:
    assert "Nothing to merge" in run("export", "embedded", tmp_path / "out", "--merge")


@pytest.mark.parametrize("base", ["no/such/folder", "folder/", "./here", "/nowhere", "a b"])
def test_a_base_that_is_no_folder_and_no_id_is_refused(lora: Path, tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match="--base"):
        export_editor(str(lora), tmp_path / "out", base=base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", [".", "../here", "link"])
@pytest.mark.parametrize("form", ["", "diffusers"])
def test_an_empty_folder_that_is_there_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, form: str
) -> None:
    """It may be the folder that a shell is in, so it is not replaced by another of its name."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if out == "link":
        (tmp_path / "link").symlink_to("here")
        out = "../link"
    run("export", "embedded", out, *(["--as", form] if form else []))
    assert {"README.md", "npedit.json", "transformer"} <= set(os.listdir())
    assert not [name for name in os.listdir() if name.startswith(".")]
    assert "expected a new or empty folder" in run("export", "embedded", out, code=2)
    assert {p.name for p in tmp_path.iterdir()} <= {"here", "link"}


# ------------------------------------------------------------------------------------------------- an export, exported


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny editor that was fully fine-tuned."""
    return write_editor("flux", tmp_path_factory.mktemp("whole"), False)


def files_that_name(text: str, folder: Path) -> list[str]:
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".md", ".py")]
    return [p.relative_to(folder).as_posix() for p in files if text in p.read_text()]


@pytest.mark.parametrize("form", ["", "diffusers"])
@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_another_base_of_an_exported_pipeline_is_named_everywhere(
    kind: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    editor = request.getfixturevalue(kind)
    old = json.loads((editor / "npedit.json").read_text())["base"]
    export_editor(str(editor), tmp_path / "first", "diffusers")
    assert "vae/base_part.json" in files_that_name(old, tmp_path / "first")
    export_editor(str(tmp_path / "first"), tmp_path / "second", form, base="someone/flux")
    assert files_that_name(old, tmp_path / "second") == []
    named = files_that_name("someone/flux", tmp_path / "second")
    parts = {f"{name}/base_part.json" for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    assert parts | {"npedit.json"} <= set(named) and ("transformer/base_part.json" in named) == (kind == "lora")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("form", ["", "diffusers"])
@pytest.mark.parametrize("kind", ["lora", "whole", "embedded"])
def test_an_exported_pipeline_can_be_exported_again(
    kind: str, form: str, merge: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The second folder is the one that the first export would have written with the same options."""
    editor = kind if kind == "embedded" else str(request.getfixturevalue(kind))
    export_editor(editor, tmp_path / "first", "diffusers")
    export_editor(str(tmp_path / "first"), tmp_path / "second", form, merge=merge)
    export_editor(editor, tmp_path / "wanted", "diffusers", merge=merge)
    found, wanted = (
        {
            p.relative_to(folder): p.suffix in (".json", ".py") and p.read_text()
            for p in folder.rglob("*")
            if p.is_file()
        }
        for folder in (tmp_path / "second", tmp_path / "wanted")
    )
    assert found == wanted
    pipe, size = load(tmp_path / "second"), (32, 32)
    edit = Editor.open(editor, device="cpu").edit(noise(size), "make it night", seed=3)[0]
    again = pipe(image=noise(size), prompt="make it night", generator=seeds(3)).images[0]
    assert max(abs(a - b) for a, b in zip(again.tobytes(), edit.tobytes(), strict=True)) <= 1


def test_a_lora_of_the_embedded_base_can_be_exported_again(tmp_path: Path) -> None:
    """The pipeline's transformer/ then holds a copy of the base model's weights, which are not the editor's."""
    family = Flux.load(embedded_weights("base"), torch.float32, torch.device("cpu"))
    net = LoraAdapter.create(family.lora_base(), "student", 2, 6.0, 0)
    nudge(net, by=0.05)
    shutil.copytree(embedded_weights("editor"), tmp_path / "mine", ignore=shutil.ignore_patterns("transformer"))
    net.save(tmp_path / "mine")
    export_editor(str(tmp_path / "mine"), tmp_path / "first", "diffusers")
    wanted = edited(tmp_path / "first")
    for number, merge in enumerate((False, True)):
        export_editor(str(tmp_path / "first"), tmp_path / str(number), "diffusers", merge=merge)
        torch.testing.assert_close(edited(tmp_path / str(number)), wanted, atol=1e-5, rtol=0)
        assert (tmp_path / str(number) / "transformer" / "base_part.py").exists() != merge


def test_what_is_no_part_of_the_editor_is_not_copied(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "mine")
    for name in (".env", "notes.txt", "transformer/base_part.json"):
        (tmp_path / "mine" / name).write_text("secret")
    export_editor(str(tmp_path / "mine"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "npedit.json", "scheduler", "transformer"]  # fmt: skip
    assert not (tmp_path / "out" / "transformer" / "base_part.json").exists()
    shutil.rmtree(tmp_path / "mine" / "transformer")
    with pytest.raises(UserError, match="expected transformer/ or pytorch_lora_weights.safetensors"):
        export_editor(str(tmp_path / "mine"), tmp_path / "none")
