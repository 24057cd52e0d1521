"""The command line as a user meets it: results, messages, exit codes, and nothing half-written."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from typer.testing import CliRunner

from npedit.cli import edit as edit_module
from npedit.cli import main as cli
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.editor import Editor
from npedit.families.flux import Flux
from npedit.recipe import config
from npedit.toy.words import vocabulary

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


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base model, a critic and an editor with random weights, laid out as the embedded ones."""
    root = tmp_path_factory.mktemp("weights")
    family = Flux.tiny(0)
    family.pipe.save_pretrained(root / "base")
    LlavaOnevision.untrained(vocabulary()[4:], 0, vision=(32, 64, 1), text=(48, 96, 1)).save(root / "critic")
    family.trainable_net().save_pretrained(root / "editor" / "transformer")
    facts = {"format": 1, "family": "flux", "base": "embedded", "steps": 2, "sizes": [[32, 32]]}
    (root / "editor" / "npedit.json").write_text(json.dumps(facts))
    return root


@pytest.fixture
def here(parts, tmp_path, monkeypatch):
    """An empty working folder, and the tiny parts in the place of the package's own."""
    monkeypatch.setattr(config, "embedded_weights", lambda kind: parts / kind)
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    done = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return re.sub(r"\s+", " ", done.output)


def picture(path, size=(64, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


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


def test_what_the_embedded_editor_does_not_know_is_told(here):
    picture(here / "a.png")
    said = run("edit", "a.png", "paint the dog grren", "-o", "o.png")
    assert "'dog', 'grren'. Did you mean" in said and "'green'?" in said and "'paint'" not in said
    assert "never learnt" not in run("edit", "a.png", "Paint the circle gray!", "-o", "o2.png")


BAD_EDITS = {
    "missing": (["none.png", "x"], "there is no none.png"),
    "folder": (["folder", "x"], "folder is a folder"),
    "no picture": (["words.png", "x"], "is not one"),
    "empty": (["empty.png", "x"], "empty"),
    "truncated": (["half.png", "x"], "broken"),
    "no instruction": (["a.png"], "then an instruction"),
    "picture last": (["a.png", "b.png"], "then an instruction"),
    "picture missing at the end": (["a.png", "typo.PNG"], "there is no picture typo.PNG"),
    "long instruction": (["none.png", "paint the circle red " * 20], "there is no none.png"),
    "long picture": (["a" * 300 + ".png", "x"], "there is no aaa"),
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

        def _edit_window(self, window, seed, steps):
            self.held.append(sum(im.width * im.height for im, _ in window))
            return [im for im, _ in window]

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


# ---------------------------------------------------------------------------------------------------- demo and train


def test_the_demo_from_start_to_table_and_again(here, monkeypatch):
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


def test_train_takes_a_path_overrides_and_goes_on(here):
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
    for part in (scores, *scores["by_type"].values()):
        for key in ("applied", "preserved", "both"):
            low, high = part[key]["ci95"]
            assert 0 <= low <= part[key]["value"] <= high <= 1
    assert "recolour" in said
    run("evaluate", "toy", "--run", "embedded", "--items", 18, "--seed", 2, "--json", "again.json")
    assert (here / "again.json").read_text() == (here / "f.json").read_text()
    assert "Did you mean 'toy'" in run("evaluate", "tyo", code=2)
    assert "can be written" in run("evaluate", "toy", "--items", 9, "--json", "f.json/x.json", code=2)
    run("evaluate", "toy", "--items", 0, code=2)


def test_evaluation_is_of_other_scenes_than_training_watched(here):
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
    assert names(here / "mine") == ["npedit.json", "transformer"]
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


def test_help_is_quick_and_does_not_load_torch(tmp_path):
    code = "import sys; sys.argv = ['npedit', '--help']\ntry:\n  import npedit.cli.main as c; c.main()\n"
    code += "finally:\n  assert 'torch' not in sys.modules"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10
    for command in ("demo", "train", "edit", "evaluate", "report", "export", "doctor", "toy"):
        assert command in done.stdout


def test_ctrl_c_ends_with_130_and_the_command_that_goes_on(monkeypatch):
    @cli.exit_on_user_error
    def command():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["npedit", "demo", "--fresh", "--out", "a b"])
    said = io.StringIO()
    monkeypatch.setattr(cli, "err", cli.Console(file=said, width=100))
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
