"""Commands that score an editor print which weights they use, and take another base model with --base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from npedit.cli.editor_source import weights_message
from npedit.errors import UserError
from npedit.recipe.config import make_recipe
from npedit.runs import checkpoint
from tests.support.command_line import picture, run

RAW = {
    "name": "small",
    "family": {"name": "flux"},
    "data": {"name": "toy"},
    "stages": [
        {"step": "reference_copy", "updates": 3, "batch_size": 1, "settings": {"student": {"ema": 0.9}}},
        {"step": "reference_copy", "updates": 3, "batch_size": 1, "settings": {"student": {"ema": 0.0}}},
    ],
}


@pytest.fixture
def finished(here: Path, parts: Path) -> Path:
    """A run whose second stage has no EMA, with a checkpoint of each stage and final/."""
    folder = here / "run"
    shutil.copytree(parts / "editor", folder / "final")
    for update in (2, 5):
        (folder / f"checkpoint-{update:06d}").mkdir()
        (folder / f"checkpoint-{update:06d}" / "COMPLETE").touch()
    recipe = make_recipe(RAW)
    (folder / "config.resolved.yaml").write_text(json.dumps(recipe.as_dict()))
    assert checkpoint.read_config(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("run", "run/final (finished run; latest weights, no EMA: the recipe has ema: 0)"),
        ("run/final", "run/final (finished run; latest weights, no EMA: the recipe has ema: 0)"),
        ("run/checkpoint-2", "run/checkpoint-000002 (checkpoint after update 2; EMA weights, decay 0.9)"),
        ("run/checkpoint-5", "checkpoint after update 5; latest weights, no EMA"),
        ("embedded", "embedded (the toy editor in this package)"),
    ],
)
def test_the_message_names_folder_kind_and_ema(finished: Path, name: str, expected: str) -> None:
    assert expected in weights_message(name)


def test_an_exported_editor_has_no_run(parts: Path, here: Path) -> None:
    assert weights_message(str(parts / "editor")).endswith("(exported weights)")


def test_toy_and_own_print_the_weights_and_take_a_base(finished: Path, here: Path, parts: Path) -> None:
    facts = json.loads((finished / "final" / "npedit.json").read_text())
    (finished / "final" / "npedit.json").write_text(json.dumps(facts | {"base": "moved/away"}))
    base = ("--base", str(parts / "base"))
    assert "run/final (finished run" in run("evaluate", "toy", "--run", "run", "--items", 1, "--steps", 1, *base)
    assert "--base" in run("evaluate", "toy", "--run", "run", "--items", 1, code=2)

    (here / "photos").mkdir()
    picture(here / "photos" / "a.png", (32, 32))
    row = {"id": "a", "file_name": "a.png", "instruction": "make it night", "edit_type": "style"}
    (here / "photos" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    own = ("evaluate", "own", "photos", "--dino", "none", "--clip", "none", "-o")
    said = run(*own, "results", "--run", "run", "--steps", 1, *base)
    assert "run/final (finished run" in said
    settings = json.loads((here / "results" / "settings.json").read_text())
    assert settings["source"]["base"] == str(parts / "base")
    assert "leave --base out" in run(*own, "copies", "--copy", *base, code=2)


@pytest.mark.parametrize("benchmark", ["toy", "gedit", "imgedit", "own", "dreambench"])
def test_every_benchmark_takes_a_base(benchmark: str) -> None:
    assert "--base" in run("evaluate", benchmark, "--help")


def test_judged_benchmarks_open_the_editor_with_the_base_and_print_its_weights(
    finished: Path, parts: Path, capsys: pytest.CaptureFixture
) -> None:
    from npedit.cli.judged import EvaluationRequest, check_request, open_edit_function

    def request(model: str) -> EvaluationRequest:
        given = dict.fromkeys(EvaluationRequest.__dataclass_fields__)
        given |= {"model": model, "seed": 0, "steps": 1, "judge": "folder", "repeats": 1, "base": str(parts / "base")}
        return EvaluationRequest(**given)

    _, facts = open_edit_function(request("run"))
    assert "run/final (finished run" in capsys.readouterr().out and facts["base"] == str(parts / "base")
    with pytest.raises(UserError, match="leave --base out"):
        check_request(request("copy"))
