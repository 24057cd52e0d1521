"""`npedit push`: what a Hub receives, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from npedit.export.hub import stale_files
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe import config
from tests.support.command_line import run
from tests.support.hub_server import TOKEN, Hub, serve_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as served:
        yield served


def test_an_editor_is_pushed_as_one_commit_with_its_card(here: Path, hub: Hub) -> None:
    told = run("push", "embedded", "me/my-editor", "--private")
    assert "commit/1" in told and TOKEN not in told and hub.tokens == {TOKEN}
    assert hub.commits == 1 and hub.created[0]["name"] == "my-editor" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    weights = next(name for name in hub.files if name.endswith(".safetensors"))
    assert hub.files[weights] and json.loads(hub.files["npedit.json"])["family"] == "flux"
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "apache-2.0" and "me/my-editor" in card.text and "USER/NAME" not in card.text


def test_an_exported_folder_is_pushed_as_it_is(here: Path, hub: Hub) -> None:
    run("export", "embedded", "mine")
    run("push", "mine", "me/mine")
    assert {p.relative_to("mine").as_posix() for p in Path("mine").rglob("*") if p.is_file()} == set(hub.files)
    assert hub.files["npedit.json"] == Path("mine/npedit.json").read_bytes()
    run("push", "mine", "me/mine")
    assert hub.commits == 2


@pytest.mark.parametrize("order", [("lora", "whole"), ("whole", "lora")])
def test_a_push_leaves_no_file_of_the_editor_that_was_there(here: Path, hub: Hub, order: tuple[str, str]) -> None:
    """A LoRA file that stays beside a transformer would be what opens."""
    run("export", "embedded", "whole", "--as", "diffusers")
    shutil.copytree("whole", "lora", ignore=shutil.ignore_patterns("*transformer*", "model_index.json", "pipeline.py"))
    (here / "lora" / LORA_FILE).write_bytes(b"x")
    hub.files |= {".gitattributes": b"x", "samples/a.png": b"x"}  # of the repository, and of a person
    for name in order:
        run("push", name, "me/mine")
    pushed = {p.relative_to(order[1]).as_posix() for p in Path(order[1]).rglob("*") if p.is_file()}
    assert set(hub.files) == pushed | {".gitattributes", "samples/a.png"}


def test_files_for_comfyui_may_stand_beside_an_editor() -> None:
    present = ["npedit.json", "transformer/a.safetensors", "vae/base_part.json", "vae/base_part.py", "notes/b.txt"]
    assert stale_files(present, ["README.md", "workflow.json", "loras/a.safetensors"]) == []
    assert stale_files(present, ["npedit.json", LORA_FILE]) == present[1:4]


def test_a_folder_for_comfyui_is_pushed_as_it_is(here: Path, hub: Hub) -> None:
    for name in ("README.md", "workflow.json", "custom_nodes/npedit_comfyui.py", "loras/mine.safetensors"):
        (here / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "mine" / name).write_text("x")
    run("push", "mine", "me/mine")
    assert set(hub.files) == {p.relative_to("mine").as_posix() for p in Path("mine").rglob("*") if p.is_file()}


@pytest.mark.parametrize("others", [["metadata.jsonl", "images/0.png"], ["workflow.json"], ["model_index.json"]])
def test_a_folder_with_a_card_that_is_no_editor_is_refused(here: Path, hub: Hub, others: list[str]) -> None:
    for name in ("README.md", ".env", *others):
        (here / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "photos" / name).write_text("x")
    assert "expected a run or an editor's folder" in run("push", "photos", "me/mine", code=2)
    assert not hub.tokens and not hub.files


def test_hidden_files_stay_here(here: Path, hub: Hub) -> None:
    run("export", "embedded", ".mine", "--as", "diffusers")
    written = {p.relative_to(".mine").as_posix() for p in Path(".mine").rglob("*") if p.is_file()}
    (here / ".mine" / ".git").mkdir()
    for name in (".env", ".git/config", "vae/.DS_Store"):
        (here / ".mine" / name).write_text("secret")
    told = run("push", ".mine", "me/mine")
    assert set(hub.files) == written
    assert "without its hidden files: .env, .git/config, vae/.DS_Store" in told


def test_a_base_that_nobody_else_has_is_refused(here: Path, hub: Hub) -> None:
    (here / "elsewhere").mkdir()
    run("export", "embedded", "mine", "--base", "elsewhere")
    assert "--base USER/MODEL" in run("push", "mine", "me/mine", code=2)
    assert not hub.commits and not hub.created


def test_a_pipeline_whose_parts_name_a_folder_is_refused(here: Path, hub: Hub) -> None:
    """As earlier versions of npedit wrote it, if --base was given for an exported pipeline."""
    run("export", "embedded", "mine", "--as", "diffusers", "--base", "someone/base")
    part = here / "mine" / "vae" / "base_part.json"
    facts = json.loads(part.read_text())
    for base in (str(here), ""):
        part.write_text(json.dumps(facts | {"base": base}))
        told = run("push", "mine", "me/mine", code=2 if base else 0)
        assert ("--base USER/MODEL" in told) == bool(base) and bool(hub.commits) != bool(base)
    part.write_text("{")
    assert "vae/base_part.json; got" in run("push", "mine", "me/mine", code=2)


def test_the_base_of_an_exported_pipeline_can_be_named_on_the_way(here: Path, hub: Hub) -> None:
    shutil.copytree(config.embedded_weights("base"), here / "base")
    run("export", "embedded", "mine", "--as", "diffusers", "--base", "base")
    assert "--base USER/MODEL" in run("push", "mine", "me/mine", code=2)
    run("push", "mine", "me/mine", "--base", "someone/base")
    assert not [name for name, content in hub.files.items() if str(here).encode() in content]
    assert json.loads(hub.files["vae/base_part.json"])["base"] == "someone/base"


@pytest.mark.parametrize("name", ["mine", "me/my editor", "me/a/b", "me/-x-"])
def test_a_bad_id_is_refused_before_any_request(here: Path, hub: Hub, name: str) -> None:
    assert "expected a repository USER/NAME" in run("push", "embedded", name, code=2)
    assert not hub.tokens


def test_without_a_token_it_says_how_to_log_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(here / "none"))
    assert "hf auth login" in run("push", "embedded", "me/mine", code=2)


def test_an_editor_that_is_not_there_is_told_before_the_token(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(here / "none"))
    assert "nothere" in run("push", "nothere", "me/mine", code=2)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_without_the_token(here: Path, hub: Hub, status: int) -> None:
    hub.refuse = status
    told = run("push", "embedded", "me/mine", code=2)
    assert "expected to write to me/mine" in told and TOKEN not in told


def test_an_unreachable_hub_is_told(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "expected to write to me/mine" in run("push", "embedded", "me/mine", code=2)
