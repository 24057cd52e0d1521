"""Every benchmark from end to end: the toy's editor, a tiny judge, tiny encoders; nothing is left out in silence."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import replace

import pytest

from npedit import benchmarks
from npedit.export.measured_scores import find_scores, read_scores
from npedit.recipe.config import embedded_weights
from npedit.runs.editor_facts import EditorFacts
from npedit.runs.resolve import resolve_editor
from npedit.toy.dataset import write_dataset
from tests.benchmarks.test_dreambench import write_data as write_dreambench
from tests.benchmarks.test_imgedit import write_data as write_imgedit
from tests.judges.test_local import model_that_answers
from tests.support.command_line import run
from tests.support.encoder_sets import clip, dino
from tests.support.judge_server import write_gedit

NETS = ("--dino", "nets/dino", "--clip", "nets/clip")
COMMANDS = {
    "toy": ("--items", 9, "--json", "r/summary.json"),
    "gedit": ("--data", "gedit", "--judge", "judge", *NETS, "--out", "r"),
    "imgedit": ("--data", "imgedit", "--judge", "judge", "--items", 3, *NETS, "--out", "r"),
    "own": ("own", *NETS, "--out", "r"),
    "dreambench": ("dreambench", "--pictures", 1, *NETS, "--out", "r"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data of each form, a judge that says 7 and 8, and encoders."""
    root = tmp_path_factory.mktemp("all")
    for name in ("judge", "nets", "dreambench"):
        (root / name).mkdir()
    model_that_answers(0).save(root / "judge")
    dino(root / "nets" / "dino"), clip(root / "nets" / "clip")
    write_gedit(root / "gedit")
    write_imgedit(root / "imgedit")
    write_dataset(root / "own", 12, 0, pairs=True)
    write_dreambench(root / "dreambench")
    return root


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name[0] != "_"))
def test_the_toy_editor_is_evaluated_on_every_benchmark(name, root, tmp_path, monkeypatch):
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    for place in root.iterdir():
        (tmp_path / place.name).symlink_to(place)
    (tmp_path / "r").mkdir()
    unscored = name == "imgedit"  # the judge gives two numbers where three are wanted
    run("evaluate", name, *COMMANDS[name], "--steps", 1, code=2 if unscored else 0)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary
    check_card(name, tmp_path)
    if name == "toy":
        assert summary["n"] == 9
        return
    rows = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == {"dreambench": 6, "gedit": 11, "own": 12}.get(name, 3)
    named = {score for row in rows for score in row["scores"]}
    assert named
    for row in rows:  # a number, or the reason why there is none
        for score in named & set(row["scores"]):
            assert (row["scores"][score] is None) == (score in row["why"]), (row["id"], score)
    for figure in summary.values():
        assert figure["value"] is None or figure["n"] > 0
    if name in ("gedit", "imgedit"):
        kept = json.loads((tmp_path / "r" / "preservation" / "summary.json").read_text())
        assert {"l1", "ssim"} < set(kept) and any(k.startswith("dino") for k in kept), set(kept)
        assert any(k.startswith("clip") for k in kept) and all(f["n"] for k, f in kept.items() if k.startswith("dino"))


def check_card(name, folder):
    """The card of a run in whose folder the results lie has their scores, and each has an interval."""
    paths = find_scores(replace(resolve_editor("embedded"), run=folder))
    scores = read_scores(paths, EditorFacts.read(embedded_weights("editor")).steps)
    metrics = {score.metric for score in scores}
    assert all(score.benchmark.endswith("; steps 1") for score in scores)
    kept = {"l1", "psnr", "ssim"}
    wanted = {
        "toy": {"applied", "preserved", "both"},
        "gedit": {"en/full/SC", "en/full/PQ", "en/full/O"} | kept,
        "imgedit": kept,
        "own": kept,
        "dreambench": set(),
    }[name]
    assert wanted <= metrics and not any(metric.endswith("micro") for metric in metrics), metrics
    assert metrics
