"""The export of an editor: which base it names and reads, merging, permissions, and the command."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from command_line import run

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export.export import export_editor
from tests.support.exported import load, noise, seeds, write_editor

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
