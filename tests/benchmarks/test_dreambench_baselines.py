"""DreamBench's columns move as they must: a copy has the subject, the base model has the scene, and a
right edit has both. In the toy world, with encoders that read a picture exactly.
"""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from npedit.benchmarks import dreambench as bench
from npedit.benchmarks._outputs import edit_missing_pictures
from npedit.benchmarks._text_to_image import TextToImage
from npedit.cli import main as cli
from npedit.data._photos import read_photo, to_pil, to_tensor
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.toy.oracle import read_scene
from npedit.toy.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES, STYLES, Scene, Thing, render
from tests.support.encoder_sets import clip, dino

SUBJECTS = {
    "ball": Thing("circle", "red", "striped", "large", 6.2, 0.0, 0.0),
    "box": Thing("square", "cyan", "dotted", "small", 4.6, 0.0, 0.0),
    "plus": Thing("cross", "yellow", "solid", "large", 6.2, 0.0, 0.0),
}
PROMPTS = ("a {0} {1} on a teal background", "a {0} {1} on a beige background at night")
ASKED = (("teal", "day"), ("beige", "night"))
PHOTOS = (("grey", "day", 0), ("brown", "day", 1), ("brown", "fog", 3))


def one_hot(words, values):
    return [float(value in words) for value in values]


class Things:
    """In the place of DINO: which things a picture shows, whatever is around them."""

    tag = "things"

    def encode_images(self, pictures):
        readings = read_scene(torch.stack([to_tensor(p) for p in pictures]))
        rows = []
        for reading in readings:
            words = {word for cell in reading.cells if isinstance(cell, tuple) for word in cell}
            rows.append(one_hot(words, (*SHAPES, *COLOURS, *PATTERNS, *SIZES)) + [0.01])
        return F.normalize(torch.tensor(rows), dim=1)


class Scenes:
    """In the place of CLIP: shape, background and style of a picture, and of a prompt as far as it states them."""

    tag = "scenes"

    def encode_images(self, pictures):
        readings = read_scene(torch.stack([to_tensor(p) for p in pictures]))
        shapes = [{cell[0] for cell in r.cells if isinstance(cell, tuple)} for r in readings]
        return self._encode([s | {r.background, r.style} for s, r in zip(shapes, readings, strict=True)])

    def encode_texts(self, texts):
        return self._encode([{*text.split()} | ({"day"} if "night" not in text else set()) for text in texts])

    def _encode(self, words):
        rows = [one_hot(w, (*SHAPES, *BACKGROUNDS, *STYLES)) for w in words]
        return F.normalize(torch.tensor(rows), dim=1)


def picture(thing, background, style, cell):
    cells = [None] * 4
    cells[cell] = thing
    return to_pil(render([Scene(tuple(cells), background, style)])[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three subjects of three photos, two prompts; and tiny real encoders."""
    root = tmp_path_factory.mktemp("dreambench")
    classes = "\n".join(f"{name},{thing.shape}" for name, thing in SUBJECTS.items())
    prompts = "prompt_list = [\n" + ",\n".join(f"'{prompt}'" for prompt in PROMPTS) + "\n]\n"
    text = f"Classes\n\nsubject_name,class\n{classes}\n\nPrompts\n\n{prompts}\nLive Subject Prompts\n\n{prompts}"
    (root / bench.PROMPTS).write_text(text)
    for name, thing in SUBJECTS.items():
        (root / name).mkdir()
        for k, (background, style, cell) in enumerate(PHOTOS):
            picture(thing, background, style, cell).save(root / name / f"{k:02d}.png")
    dino(root / "dino"), clip(root / "clip")
    return root


def right_edits(photos, prompts, seed):
    """What a perfect editor makes: the subject of each photo in the scene that its prompt asks for."""
    made = []
    for photo, prompt in zip(photos, prompts, strict=True):
        shown = [c for c in read_scene(to_tensor(photo)[None])[0].cells if c]
        thing = next(t for t in SUBJECTS.values() if t.appearance in shown)
        made.append(picture(thing, *ASKED["night" in prompt], 2))
    return made


@pytest.fixture(scope="module")
def scores(data, tmp_path_factory):
    """The mean of every measure, for copies, right edits, and the embedded base model without the photos."""
    subjects, _ = bench.read_subjects(data)
    untrained = Editor.open_untrained("embedded", "cpu")
    sources = {
        "copy": lambda photos, prompts, seed: list(photos),
        "base": TextToImage(untrained.family, untrained.sizes),
        "right": right_edits,
    }
    found = {}
    for name, edit in sources.items():
        folder = tmp_path_factory.mktemp(name)
        edit_missing_pictures(bench.edit_jobs(subjects, 0, 2), edit, folder, lambda done, total: None)
        rows = bench.score_pictures(subjects, folder, Things(), Scenes(), lambda done, total: None, 2)
        found[name] = {key: sum(row.scores[key] for row in rows) / len(rows) for key in rows[0].scores}
    return found


def test_a_copy_has_the_subject_and_not_the_scene(scores):
    copy, right, base = scores["copy"], scores["right"], scores["base"]
    assert copy["dino_things_input"] == pytest.approx(1) and copy["clip_i_scenes_input"] == pytest.approx(1)
    assert copy["dino_things_held_out"] == pytest.approx(1, abs=0.01)
    assert copy["clip_t_scenes"] < min(base["clip_t_scenes"], right["clip_t_scenes"]) - 0.2


def test_the_base_model_has_the_scene_and_not_the_subject(scores):
    copy, right, base = scores["copy"], scores["right"], scores["base"]
    for suffix in ("", "_input", "_held_out"):
        assert base[f"dino_things{suffix}"] < min(copy[f"dino_things{suffix}"], right[f"dino_things{suffix}"]) - 0.15
    assert base["clip_t_scenes"] > copy["clip_t_scenes"] + 0.2
    assert base["clip_i_scenes_input"] < copy["clip_i_scenes_input"] - 0.2


def test_a_right_edit_has_both(scores):
    right = scores["right"]
    assert right["dino_things_held_out"] == pytest.approx(1, abs=0.01)
    assert right["clip_t_scenes"] == pytest.approx(1, abs=1e-6)
    assert right["clip_i_scenes_input"] < 0.7, "the scene is another one than the photo's"
    for key in ("dino_things_held_out", "clip_i_scenes_held_out", "clip_t_scenes"):
        assert scores["copy"][f"copy/{key}"] == pytest.approx(scores["copy"][key])


def test_pictures_without_a_photo_depend_on_prompt_seed_and_size_alone():
    untrained = Editor.open_untrained("embedded", "cpu")
    make = TextToImage(untrained.family, untrained.sizes, steps=2)
    photos = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    first, second = make(photos, ["a red circle", "a red circle"], 0)
    assert first.tobytes() == second.tobytes() and first.size == (64, 48)
    assert make(photos[:1], ["a red circle"], 1)[0].tobytes() != first.tobytes()
    assert make(photos[:1], ["a blue square"], 0)[0].tobytes() != first.tobytes()


def evaluate(data, folder, *words):
    command = ["evaluate", "dreambench", data, "--out", folder, "--pictures", 1, *words]
    command += ["--dino", data / "dino", "--clip", data / "clip"]
    return CliRunner().invoke(cli.app, [str(w) for w in command], env={"COLUMNS": "200", "NPEDIT_DEVICE": "cpu"})


def test_editor_base_and_copy_are_scored_and_compared(data, tmp_path):
    for name, words in (("copy", ["--copy"]), ("base", ["--text-only", "--steps", 2]), ("mine", ["--steps", 8])):
        done = evaluate(data, tmp_path / name, *words)
        assert done.exit_code == 0, (done.output, done.exception)
        found = json.loads((tmp_path / name / "summary.json").read_text())
        assert found["dino_vit32x2-7_held_out"]["n"] == 6 and found["clip_t_vit32x2-7"]["value"] is not None
    settings = json.loads((tmp_path / "base" / "settings.json").read_text())
    assert settings["source"]["text_only"] is True and settings["source"]["steps"] == 2
    pictures = [read_photo(tmp_path / n / "edited" / "ball" / "00-0.png").tobytes() for n in ("copy", "base", "mine")]
    assert len(set(pictures)) == 3
    folders = [str(tmp_path / name) for name in ("copy", "base", "mine")]
    done = CliRunner().invoke(cli.app, ["compare", *folders], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "dino_vit32x2-7_held_out" in done.output, done.output


def test_sources_that_exclude_each_other_are_refused(data, tmp_path):
    done = evaluate(data, tmp_path / "r", "--copy", "--text-only")
    assert isinstance(done.exception, UserError) or done.exit_code == 2
