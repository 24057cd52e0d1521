"""DreamBench: the official file's form, the inputs, similarities by hand, the real-images row, baselines beside it."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from npedit.benchmarks import dreambench as bench
from npedit.cli import main as cli
from npedit.errors import UserError
from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from tests.support.encoder_sets import clip, dino

TEXT = """Classes

subject_name,class
can,can
bear_plushie,stuffed animal
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
"a {0} {1} on a dog's bed".format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""
CPU = torch.device("cpu")


def photo(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def write_data(root):
    """Three subjects of 3 to 5 photos, two prompts each."""
    (root / bench.PROMPTS).write_text(TEXT)
    for k, (name, count) in enumerate((("can", 3), ("bear_plushie", 5), ("dog6", 4))):
        (root / name).mkdir()
        for i in range(count):
            photo(10 * k + i).save(root / name / f"{i:02d}.jpg")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three subjects, and tiny encoders."""
    root = tmp_path_factory.mktemp("dreambench")
    write_data(root)
    dino(root / "dino"), clip(root / "clip")
    return root


@pytest.fixture(scope="module")
def nets(data):
    return Dino.load(str(data / "dino"), CPU), Clip.load(str(data / "clip"), CPU)


def test_the_official_prompts_file_is_read(data):
    subjects, digest = bench.read_subjects(data)
    can, bear, dog = subjects
    assert can.prompts == ("a can in the snow", "a can on a dog's bed")  # no doubled blank where the token was
    assert bear.prompts[0] == "a stuffed animal in the snow"
    assert dog.prompts == ("a dog wearing a red hat", "a red dog")  # live: the second list
    assert [s.photos[s.input_index].name for s in subjects] == ["01.jpg", "03.jpg", "02.jpg"]
    assert len(digest) == 64 and not bench.is_official_data(subjects)


def test_other_folders_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="the folder 'dataset'"):
        bench.read_subjects(tmp_path)
    (tmp_path / bench.PROMPTS).write_text("Classes\n\nPrompts\n")
    with pytest.raises(UserError, match="another form"):
        bench.read_subjects(tmp_path)
    (tmp_path / bench.PROMPTS).write_text(TEXT)
    with pytest.raises(UserError, match="at least two photos"):
        bench.read_subjects(tmp_path)


def test_similarities_by_hand(data, nets, tmp_path):
    """One subject: each picture against every photo, the input, and the others; CLIP-T against the prompt."""
    can = bench.read_subjects(data)[0][0]
    made = [[photo(100 + 2 * i + k) for k in range(2)] for i in range(2)]
    (tmp_path / "can").mkdir()
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        made[i][k].save(tmp_path / bench.picture_file_name(can, i, k))
    rows = bench.score_pictures([can], tmp_path, *nets, lambda done, total: None, 2)
    assert [(r.id, r.task) for r in rows] == [("can/00", "can"), ("can/01", "can")]
    photos = [Image.open(p).convert("RGB") for p in can.photos]
    for net, name in zip(nets, ("dino", "clip_i")):
        real, ours = net.encode_images(photos), net.encode_images(made[1])
        scores, key = rows[1].scores, f"{name}_{net.tag}"
        assert scores[key] == pytest.approx(float(np.mean([[a @ b for b in real] for a in ours])), abs=1e-5)
        assert scores[f"{key}_input"] == pytest.approx(float((ours @ real[1]).mean()), abs=1e-5)
        assert scores[f"{key}_held_out"] == pytest.approx(float((ours @ real[[0, 2]].T).mean()), abs=1e-5)
        assert scores[key] == pytest.approx((scores[f"{key}_input"] + 2 * scores[f"{key}_held_out"]) / 3, abs=1e-5)
        assert scores[f"copy/{key}_held_out"] == pytest.approx(float((real[1] @ real[[0, 2]].T).mean()), abs=1e-5)
        assert scores[f"copy/{key}"] == pytest.approx((1 + 2 * scores[f"copy/{key}_held_out"]) / 3, abs=1e-5)
    net = nets[1]
    text_features = net.encode_texts([can.prompts[1]])[0]
    assert rows[1].scores[f"clip_t_{net.tag}"] == pytest.approx(
        float((net.encode_images(made[1]) @ text_features).mean()), abs=1e-5
    )
    assert rows[1].scores[f"copy/clip_t_{net.tag}"] == pytest.approx(
        float(net.encode_images(photos)[1] @ text_features), abs=1e-5
    )


def test_one_missing_picture_leaves_the_prompt_without_a_score(data, nets, tmp_path):
    can = bench.read_subjects(data)[0][0]
    (tmp_path / "can").mkdir()
    photo(7).save(tmp_path / bench.picture_file_name(can, 0, 0))
    row = bench.score_pictures([can], tmp_path, *nets, lambda done, total: None, 2)[0]
    assert row.scores["dino_vit32x2-7"] is None and row.why["dino_vit32x2-7"].startswith("no edited picture 00-1.png")
    assert row.scores["copy/dino_vit32x2-7"] is not None


def test_real_images_leave_out_equal_pairs(data, nets):
    subjects = bench.read_subjects(data)[0]
    found = bench.real_image_baseline(subjects, nets[0], MissingEncoder("vitb32", "not here"))
    values = []
    for subject in subjects:
        photos = nets[0].encode_images([Image.open(p).convert("RGB") for p in subject.photos])
        n = len(photos)
        values.append(np.mean([float(photos[i] @ photos[j]) for i in range(n) for j in range(n) if i != j]))
    assert found["real/dino_vit32x2-7"]["value"] == pytest.approx(np.mean(values), abs=1e-5)
    assert found["real/clip_i_vitb32"]["value"] is None and found["real/clip_i_vitb32"]["coverage"] == 0


def test_real_image_values_are_compared_with_the_papers():
    def entries(a, b):
        return {"real/dino_vits16": {"value": a}, "real/clip_i_vitb32": {"value": b}}

    assert bench.real_image_baseline_problems(entries(0.7765, 0.8805)) == []
    assert "expected 0.774 +- 0.005; got 0.7100" in bench.real_image_baseline_problems(entries(0.71, 0.885))[0]
    assert "not proven" in bench.real_image_baseline_problems(entries(0.774, None))[0]


def test_the_inputs_are_those_of_the_thirty_subjects():
    assert len(bench.INPUTS) == bench.SUBJECTS and set(bench.INPUTS.values()) <= set(range(6))
    assert bench.INPUTS["poop_emoji"] == 0 and bench.INPUTS["dog3"] == 5


def test_a_copy_scores_the_same_as_the_copy_baseline(data, tmp_path):
    """The editor that does nothing scores what stands beside it as the copy."""
    words = ["evaluate", "dreambench", data, "--copy", "--pictures", 1, "--out", tmp_path / "r"]
    words += ["--dino", data / "dino", "--clip", data / "clip"]
    done = CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    assert "not the official subjects" in re.sub(r"\s+", " ", done.output)
    found = json.loads((tmp_path / "r" / "summary.json").read_text())
    for name in ("dino_vit32x2-7", "dino_vit32x2-7_held_out", "clip_i_vit32x2-7", "clip_t_vit32x2-7"):
        assert found[name]["value"] == pytest.approx(found[f"copy/{name}"]["value"], abs=1e-6) and found[name]["n"] == 6
    assert found["dino_vit32x2-7_input"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["real/dino_vit32x2-7"]["value"] < 1
