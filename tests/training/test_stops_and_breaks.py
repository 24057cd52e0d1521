"""Awkward stops, broken weights, full disks, and what is printed then: each ends in words, not in a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import tests.training.test_trainer as usual
from npedit import errors
from npedit.benchmarks import toy
from npedit.cli.demo import write_example_picture
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe import config
from npedit.runs import checkpoint
from npedit.toy_models import build as models
from npedit.toy_models.fit import fit
from npedit.training import trainer
from npedit.training.parts import build_parts, build_source, explain_loading_errors

STAGES = [{"step": "reference_copy", "updates": 2, "batch_size": 1, "settings": {"steps": 1}}]
PACE = {"save_every": 1, "sample_items": 1, "steps": 1}


def train(run: Path, on_event=trainer.ignore_event, **more) -> Path:
    return trainer.train(usual.recipe(stages=STAGES, trainer=PACE), run, parts=usual.parts, on_event=on_event, **more)


def interrupt_at(event: str, step: int):
    def on_event(name: str, facts: dict) -> None:
        if (name, facts["step"]) == (event, step):
            os.kill(os.getpid(), signal.SIGINT)

    return on_event


# ------------------------------------------------------------------------------------------------------------ stops


def test_a_stop_before_the_first_update_leaves_one_row_0(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path / "run", interrupt_at("sample", 0))
    assert checkpoint.latest_complete_checkpoint(tmp_path / "run").name == "checkpoint-000000"
    train(tmp_path / "run")
    assert [r["step"] for r in usual.logged(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("event", ["update", "end"])
def test_a_late_signal_still_exits_with_130(tmp_path: Path, event: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All is finished, but what the caller had in mind to do next is not done."""
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", interrupt_at(event, 2))
    assert caught.value.code == 128 + signal.SIGINT
    assert (tmp_path / "run" / "final").is_dir() and (tmp_path / "run" / "report.html").is_file()
    assert "all 2 updates are done" in " ".join(capsys.readouterr().out.split())
    train(tmp_path / "run")


def test_a_run_resumes_after_a_half_written_bad_row(tmp_path: Path) -> None:
    class Source(build_source(usual.recipe()).__class__):
        bad_rows = ({"row": 3, "why": "truncated"}, {"row": 5, "why": "empty"})

    def source(made: config.Recipe) -> Source:
        return Source(made.data.settings, made.seed)

    run = tmp_path / "run"
    with pytest.raises(usual.Crash):
        train(run, usual.crash_at(1), source=source)
    rows = run / checkpoint.BAD_ROWS
    rows.write_text(rows.read_text()[:-9])  # killed while it wrote the second
    for _ in range(2):
        train(run, source=source)
        assert checkpoint.read_rows(rows) == list(Source.bad_rows)


# --------------------------------------------------------------------------------------------------- broken weights


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def reshape(file: Path) -> None:
    save_file({k: torch.zeros(3, 5, 7) for k in load_file(file)}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    Flux.tiny(0).pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("harm", [cut, reshape])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_broken_weights_of_the_base_are_refused(base: Path, tmp_path: Path, harm, part: str) -> None:
    bad = shutil.copytree(base, tmp_path / "bad")
    harm(next((bad / part).glob("*.safetensors")))
    made = usual.recipe(stages=STAGES, trainer=PACE, family={"name": "flux", "weights": str(bad)})
    with pytest.raises(UserError, match=r"family\.weights"):
        build_parts(made)


@pytest.mark.parametrize("harm", [cut, reshape])
def test_broken_weights_of_an_editor_are_refused(base: Path, tmp_path: Path, harm) -> None:
    Flux.tiny(0).trainable_net().save_pretrained(tmp_path / "transformer")
    facts = f'{{"format": 1, "family": "flux", "base": "{base}", "steps": 1, "sizes": [[32, 32]]}}'
    (tmp_path / "npedit.json").write_text(facts)
    Editor.open(tmp_path, "cpu")
    harm(next((tmp_path / "transformer").glob("*.safetensors")))
    with pytest.raises(UserError, match="to open; got"):
        Editor.open(tmp_path, "cpu")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("size mismatch"), SafetensorError("header")])
def test_every_error_of_loading_names_the_setting(error: Exception) -> None:
    with pytest.raises(UserError, match=r"critic\.weights"), explain_loading_errors("critic.weights", "there"):
        raise error


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(usual.Crash):
        train(tmp_path / "run", usual.crash_at(1))
    state = tmp_path / "run" / "checkpoint-000001" / "state.safetensors"
    save_file({k: v for k, v in load_file(state).items() if not k.startswith("student/ema")}, state)
    numbers = json.loads((state.parent / "state.json").read_text())
    (state.parent / "state.json").write_text(json.dumps(numbers | {"files": {state.name: state.stat().st_size}}))
    with pytest.raises(UserError, match="expected a checkpoint of this recipe"):
        train(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- full disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("fail", [full, read_only])
def test_unwritable_pictures_end_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail) -> None:
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="expected (room|a place)"):
        toy.score(lambda references, _: references, toy.sample_items(2), save_to=tmp_path / "pictures")
    with pytest.raises(UserError, match="expected (room|a place)"):
        write_example_picture(tmp_path / "try" / "picture.png")


@pytest.mark.parametrize("fail", [full, read_only])
def test_unwritable_model_parts_end_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail) -> None:
    class Part:
        save_pretrained = fail

    with pytest.raises(UserError, match="expected (room|a place)"):
        models._write_folder(Part(), tmp_path / "part")
    net = nn.Linear(1, 1)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="expected (room|a place)"):
        fit("net", net, lambda *_: (net.weight.sum(), {}), tmp_path, 1, 0.1)


def test_a_full_disk_reported_by_tokenizers_ends_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"), errors.explain_write_errors(tmp_path):
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002


# ------------------------------------------------------------------------------------------------- commands to type


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment with npedit in a folder with a blank in its name, not on PATH."""
    bin_folder = tmp_path / "my project" / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("npedit", "python"):
        (bin_folder / name).write_text("#!/bin/sh\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.chdir(bin_folder.parents[1])
    return bin_folder


def test_the_printed_resume_command_can_be_typed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, words = str(installed / "npedit"), ["demo", "--fresh", "--out", "a b"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    assert errors.resume_command() == ".venv/bin/npedit demo --out 'a b'"
    monkeypatch.setattr(sys, "argv", [".venv/bin/npedit", *words])
    assert errors.resume_command() == ".venv/bin/npedit demo --out 'a b'"
    elsewhere = installed.parents[2] / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", [script, *words])
    assert errors.resume_command() == f"'{script}' demo --out 'a b'"
    monkeypatch.setenv("PATH", str(installed))
    assert errors.resume_command() == "npedit demo --out 'a b'"


def test_the_resume_command_follows_the_way_of_starting(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/npedit/__main__.py", "doctor"])
    assert errors.resume_command() == ".venv/bin/python -m npedit doctor"
    monkeypatch.setattr(sys, "argv", ["/some/other/__main__.py", "1"])
    assert errors.resume_command() == ".venv/bin/python -m other 1"
    monkeypatch.setattr(sys, "argv", ["my own.py", "1"])
    assert errors.resume_command() == ".venv/bin/python 'my own.py' 1"
    assert errors.npedit_command() == ".venv/bin/npedit"
    (installed / "npedit").unlink()
    assert errors.npedit_command() == ".venv/bin/python -m npedit"


def test_missing_shipped_weights_say_to_install_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "__file__", str(tmp_path / "recipe" / "config.py"))
    with pytest.raises(UserError, match="install it again") as caught:
        config.embedded_weights("critic")
    assert "toy build" not in str(caught.value)
