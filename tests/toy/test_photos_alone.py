"""From photos alone to an editor: bare pictures, a writer behind HTTP, `npedit prepare`, training."""

import json

import pytest
from command_line import run as npedit
from photo_sets import opened
from toy_writer_server import serving_writer

from benchmarks.photos_alone import write_set
from npedit.toy.dataset import write_dataset
from npedit.toy.edits import EDIT_TYPES
from npedit.toy.grade import grade_dataset
from npedit.toy.writer import ErrorRates


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bare") / "photos", 24, seed=0, bare=True)


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    """The set that the documentation's commands make."""
    folder = tmp_path_factory.mktemp("written") / "set"
    with serving_writer(ErrorRates()) as (url, served):
        words = ["--writer", url, "--writer-model", "toy-writer", "--jpeg-quality", 0, "--duplicates", "off"]
        npedit("prepare", photos, "--out", folder, *words, "--types", ",".join(EDIT_TYPES), "--held-out", 0)
        assert served.counts["look"] == 24 and served.counts["verify"] >= 40
    return folder


def test_the_words_of_a_writer_without_mistakes_are_right(written):
    rows, wrong, _ = grade_dataset(written)
    assert rows >= 40 and wrong == 0
    kinds = {json.loads(line)["edit_type"] for line in (written / "metadata.jsonl").read_text().splitlines()}
    assert kinds == set(EDIT_TYPES)
    source = opened(written, sizes=((32, 32),))
    batch = source.batch(0, 8)
    assert batch.references.shape == (8, 3, 32, 32) and all(batch.target_captions)
    assert source.has_source_captions and source.has_target_captions


@pytest.mark.slow
def test_an_editor_is_trained_on_written_words(written, tmp_path):
    data = ["data.name=imagefolder", f"data.path={written}", "data.sizes=[[32, 32]]"]
    short = ["stages.0.updates=1", "stages.1.updates=1", "stages.0.batch_size=2", "stages.1.batch_size=2"]
    short += ["trainer.evaluate_items=9", "trainer.evaluate_every=0", "trainer.sample_every=0"]
    npedit("train", "demo", *data, *short, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "final").is_dir()


def test_the_verifying_pass_takes_mistakes_out(photos, tmp_path):
    wrong = write_set(photos, tmp_path / "wrong", 0.5, is_verified=False)
    checked = write_set(photos, tmp_path / "checked", 0.5, is_verified=True)
    assert wrong["wrong_share"] > 0.25 and checked["wrong_share"] < 0.1
    assert checked["counts"]["rejected"] > 5 and checked["counts"]["rows"] < wrong["counts"]["rows"]


def test_broken_answers_and_a_server_without_structured_output(photos, tmp_path):
    folder = tmp_path / "set"
    with serving_writer(ErrorRates(broken=0.5), structured=False) as (url, served):
        words = ["--writer", url, "--writer-model", "toy-writer", "--jpeg-quality", 0, "--duplicates", "off"]
        npedit("prepare", photos, "--out", folder, *words, "--types", "style,background,move", "--held-out", 0)
    rows, wrong, _ = grade_dataset(folder)
    rejected = [json.loads(line)["reason"] for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert served.counts["broken"] > 5 and any("unreadable" in reason for reason in rejected)
    assert wrong == 0 and rows >= 20
