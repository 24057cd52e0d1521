"""The command line as a user meets it: results, messages, exit codes, and nothing half-written."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console

from npedit.benchmarks._outputs import hash_editor
from npedit.cli import main as cli
from npedit.errors import train_command
from npedit.recipe import config
from npedit.toy.edits import EDIT_TYPES
from tests.support.command_line import names, picture, run

RECIPE = """
name: demo
family: {name: flux}
critic: {name: llava_onevision}
data: {name: toy}
stages:
  - {step: reference_copy, updates: 10, batch_size: 2, settings: {steps: 2, student: {lr: 1.0e-3}}}
  - {step: np_edit, updates: 10, batch_size: 2, settings: {steps: 2, fake_updates: 1, ramp_updates: 2}}
trainer: {benchmark: toy, evaluate_items: 9, sample_items: 2, steps: 2}
"""


# ---------------------------------------------------------------------------------------------------- demo and train


def test_demo_trains_prints_its_table_and_repeats_the_result(here, monkeypatch):
    (here / "demo.yaml").write_text(RECIPE)
    monkeypatch.setattr(cli, "recipe_path", lambda name: here / "demo.yaml")
    said = run("demo", "--minutes", 1, "--items", 18)
    assert "2 updates" in said and "both, after" in said and "Try next" in said and "report.html" in said
    folder = here / "runs" / "demo"
    assert {"report.html", "evaluation.json", "final", "evaluation", "try"} <= set(names(folder))
    scores = json.loads((folder / "evaluation.json").read_text())
    assert scores["before"]["n"] == scores["after"]["n"] == 18
    assert "held-out scenes" in (folder / "report.html").read_text()
    changed = (folder / "evaluation.json").stat().st_mtime_ns
    assert "both, after" in run("demo", "--minutes", 1, "--items", 18)
    assert (folder / "evaluation.json").stat().st_mtime_ns == changed  # shown, not made again

    command = next(line for line in _lines(said) if "try/picture.png" in line)
    assert "out.png" in command
    run("edit", folder / "try" / "picture.png", "make it night", "--model", folder, "-o", "mine.png")
    assert Image.open("mine.png").size == (256, 256)

    assert "updates" in run("demo", "--minutes", 2, code=2)  # another recipe: what differs is shown
    run("demo", "--minutes", 0, code=2)


def _lines(said):
    return re.split(r"(?=npedit )", said)


def test_train_takes_a_path_and_overrides_and_resumes(here):
    (here / "mine.yaml").write_text(RECIPE)
    words = ["train", "mine.yaml", "stages.0.updates=1", "stages.1.updates=1", "trainer.benchmark=''", "--out", "r"]
    assert "--model r" in run(*words)
    assert json.loads((here / "r" / "final" / "npedit.json").read_text())["steps"] == 2
    run(*words)
    rows = [json.loads(line) for line in (here / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert "Did you mean 'updates'" in run("train", "mine.yaml", "stages.0.update=1", code=2)
    assert "Did you mean 'demo'" in run("train", "dem", code=2)
    assert run("report", "r")


# ------------------------------------------------------------------------------------------ evaluate, export, doctor


def test_evaluate_writes_the_documented_keys(here):
    said = run("evaluate", "toy", "--items", 18, "--seed", 2, "--json", "f.json")
    scores = json.loads((here / "f.json").read_text())
    assert scores["n"] == 18 and scores["seed"] == 2 and scores["steps"] == 2
    assert scores["weights"] == hash_editor("embedded") and scores["edit_types"] == list(EDIT_TYPES)
    for part in (scores, *scores["by_type"].values()):
        for key in ("applied", "preserved", "both"):
            low, high = part[key]["ci95"]
            assert 0 <= low <= part[key]["value"] <= high <= 1
    assert "recolour" in said
    run("evaluate", "toy", "--run", "embedded", "--items", 18, "--seed", 2, "--json", "again.json")
    assert (here / "again.json").read_text() == (here / "f.json").read_text()
    run("evaluate", "toy", "--items", 2, "--edit-type", "add", "--steps", 1, "--json", "add.json")
    scores = json.loads((here / "add.json").read_text())
    assert scores["edit_types"] == ["add"] and scores["steps"] == 1
    assert "Did you mean 'toy'" in run("evaluate", "tyo", code=2)
    assert "can be written" in run("evaluate", "toy", "--items", 9, "--json", "f.json/x.json", code=2)
    run("evaluate", "toy", "--items", 0, code=2)


def test_evaluation_scenes_differ_from_those_of_training(here):
    run("evaluate", "toy", "--items", 9, "--json", "f.json")
    assert json.loads((here / "f.json").read_text())["seed"] == 1
    for name in ("demo", "toy"):
        assert config.load_recipe(cli.recipe_path(name)).seed != 1
    told = run("evaluate", "toy", "--help")
    assert "Which held-out scenes" in told and "[default: 1]" in told


def test_a_long_instruction_is_followed(here):
    picture(here / "a.png")
    run("edit", "a.png", "paint the circle red " * 20, "-o", "out.png")
    run("edit", "a.png", "-i", "a copy of typo.png", "-o", "again.png")


def test_export_makes_a_folder_that_opens_and_never_overwrites(here):
    run("export", "embedded", "mine")
    assert names(here / "mine") == ["README.md", "npedit.json", "transformer"]
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in (here / "mine").rglob("*") if p.is_file()} == {0o666 & ~mask}
    run("evaluate", "toy", "--run", "mine", "--items", 9)
    assert "new or empty folder" in run("export", "embedded", "mine", code=2)
    run("export", "nowhere", "other", code=2)
    assert names(here) == ["mine"]
    local = str(here / "local" / "base")
    shutil.copytree("mine", "moved")
    facts = json.loads((here / "moved" / "npedit.json").read_text())
    (here / "moved" / "npedit.json").write_text(json.dumps(facts | {"base": local}))
    assert "its place on this computer" in run("export", "moved", "again")
    run("export", "moved", "named", "--base", "embedded")
    assert json.loads((here / "named" / "npedit.json").read_text())["base"] == "embedded"
    picture(here / "a.png")
    assert "--base" in run("edit", "a.png", "make it night", "-m", "again", code=2)
    run("edit", "a.png", "make it night", "-m", "again", "--base", "embedded", "-o", "o.png")
    facts["sizes"] = [[33, 32]]
    (here / "moved" / "npedit.json").write_text(json.dumps(facts))
    assert "multiples of 8" in run("edit", "a.png", "make it night", "-m", "moved", code=2)


def test_doctor_names_what_is_wrong(here, monkeypatch):
    assert "9 right" in run("doctor")
    monkeypatch.undo()
    monkeypatch.setattr(
        config, "embedded_weights", lambda kind: (_ for _ in ()).throw(cli.UserError(f"no {kind}; reinstall"))
    )
    assert "no critic; reinstall" in run("doctor", code=2)


# ------------------------------------------------------------------------------------------------------- toy and rest


def test_toy_data_and_sheet(here):
    run("toy", "data", "set", "--items", 3)
    assert names(here / "set") == ["images", "metadata.jsonl"]
    run("toy", "data", "set", "--items", 3, code=2)
    run("toy", "sheet", "sheet.png")
    assert Image.open("sheet.png").width > 900
    run("toy", "sheet", "sheet.txt", code=2)
    assert names(here) == ["set", "sheet.png"]


def test_help_imports_no_heavy_package():
    heavy = ("torch", "diffusers", "transformers", "matplotlib", "datasets", "pyarrow")
    code = "import sys; sys.argv = ['npedit', '--help']\ntry:\n  import npedit.cli.main as c; c.main()\n"
    code += f"finally:\n  print('LOADED', sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    for command in ("demo", "train", "edit", "evaluate", "report", "export", "doctor", "toy"):
        assert command in done.stdout


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(monkeypatch):
    @cli.exit_on_user_error
    def command():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["npedit", "demo", "--fresh", "--out", "a b"])
    said = io.StringIO()
    monkeypatch.setattr(cli, "err", Console(file=said, width=100))
    with pytest.raises(cli.typer.Exit) as stopped:
        command()
    assert stopped.value.exit_code == 130
    assert said.getvalue().strip() == "Stopped. Go on with: npedit demo --out 'a b'"


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(here):
    (here / "r").mkdir()
    (here / "r" / "kept.txt").write_text("old")
    cli.move_aside(here / "r")
    cli.move_aside(here / "nowhere")
    (aside,) = here.iterdir()
    assert aside.name.startswith("r.old-") and (aside / "kept.txt").read_text() == "old"


def test_version():
    assert re.fullmatch(r"npedit \d+\.\d+\.\d+ ", run("--version"))


@pytest.mark.parametrize("held_out", [None, "", "a\n"])
def test_the_command_that_trains_on_a_set_leaves_held_out_rows_out(tmp_path, held_out):
    folder = tmp_path / "my set"
    folder.mkdir()
    if held_out is not None:
        (folder / "held_out.txt").write_text(held_out)
    wanted = f"train RECIPE data.path='{folder}'" + (f" data.held_out='{folder}/held_out.txt'" if held_out else "")
    assert train_command(folder).endswith(wanted)
