"""`--json`: standard output is one JSON object with the keys of docs/scripting.md, other text is on standard error."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from npedit.cli import main as cli
from npedit.cli.doctor import _check_package, required_packages
from npedit.cli.json_output import print_json
from tests.support.command_line import names, picture, run
from tests.support.edit_sets import photo, write_parquet
from tests.support.toy_writer_server import serving_writer


def call(*words, code=0):
    """(the object on standard output, the text on standard error) of a command with --json."""
    done = CliRunner().invoke(cli.app, [str(word) for word in (*words, "--json")], env={"COLUMNS": "200"})
    assert done.exit_code == code, (done.output, done.exception)
    return json.loads(done.stdout) if done.stdout else None, done.stderr


RECIPE = """
name: small
family: {name: flux}
data: {name: toy}
stages: [{step: reference_copy, updates: 1, batch_size: 1, settings: {steps: 4}}]
trainer: {sample_items: 1}
"""


def test_estimate(here):
    (here / "small.yaml").write_text(RECIPE)
    found, _ = call("estimate", "small.yaml", "--gpu", "24GB")
    assert set(found) == {"recipe", "processes", "warnings", "phases", "peak", "disk_bytes", "offloaded_bytes", "fit"}
    totals = {phase["name"]: sum(phase["bytes"].values()) for phase in found["phases"]}
    assert totals == {phase["name"]: phase["total_bytes"] for phase in found["phases"]}
    assert totals[found["peak"]["phase"]] == found["peak"]["bytes"] == max(totals.values())
    assert set(found["disk_bytes"]) == {"models", "checkpoints", "final"}
    assert found["fit"]["verdict"] == "fits" and found["fit"]["free_gib"] == 24 - found["peak"]["bytes"] / 2**30
    assert call("estimate", "small.yaml", "--gpu", "many", code=2)[0] is None


def test_doctor(here):
    found, said = call("doctor")
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] is True and all(check["ok"] for check in checks.values())
    assert {"torch", "diffusers", "rich"} <= {need.name for need in required_packages()} <= set(checks)
    assert "ray" not in checks  # of an extra
    assert "9 right" in checks["nine edits"]["found"]
    assert "nine edits" in said


def test_doctor_prints_its_object_when_a_check_fails(here, monkeypatch):
    needs = [Requirement("no-such-package"), Requirement("torch>=99"), Requirement("rich>=1")]
    monkeypatch.setattr("npedit.cli.doctor.required_packages", lambda: needs)
    found, said = call("doctor", code=2)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] is False and checks["rich"]["ok"] and not checks["no-such-package"]["ok"]
    assert "pip install 'torch>=99'" in checks["torch"]["found"] and "nine edits" not in checks
    assert "expected all checks to pass; got 2 problems" in said


def test_doctor_knows_nightly_builds_and_a_folder_that_was_not_installed(here, monkeypatch):
    monkeypatch.setattr("npedit.cli.doctor.version", lambda name: "2.14.0.dev20260101+cu130")
    assert _check_package(Requirement("torch>=2.6"))[1] and not _check_package(Requirement("torch>=2.14"))[1]

    def not_installed():
        raise PackageNotFoundError("npedit")

    monkeypatch.setattr("npedit.cli.doctor.required_packages", not_installed)
    found, _ = call("doctor", code=2)
    assert [check["ok"] for check in found["checks"]] == [True, False] and found["checks"][1]["name"] == "npedit"


def test_edit(here):
    picture(here / "a.png"), picture(here / "b.png", seed=1)
    found, said = call("edit", "a.png", "b.png", "make it night", "-o", "out/", "--seed", 3)
    assert found["editor"] == "embedded" and found["seed"] == 3
    assert [(e["picture"], e["instruction"]) for e in found["edits"]] == [
        ("a.png", "make it night"),
        ("b.png", "make it night"),
    ]
    assert all((here / e["result"]).is_file() for e in found["edits"])
    assert 'a.png "make it night" -> out/a-edited.png' in said
    assert "-o -" in call("edit", "a.png", "make it night", "-o", "-", code=2)[1]


def test_evaluate_toy_writes_to_standard_output(here):
    """Its --json takes a file name, as before; - is standard output."""
    run("evaluate", "toy", "--items", 9, "--json", "scores.json")
    done = CliRunner().invoke(cli.app, ["evaluate", "toy", "--items", "9", "--json", "-"])
    assert json.loads(done.stdout) == json.loads((here / "scores.json").read_text())
    assert "recolour" in done.stderr and names(here) == ["scores.json"]


def write_results(folder, values):
    """A folder of results: item k has these scores of two metrics."""
    folder.mkdir()
    rows = [{"id": str(k), "task": "t", "scores": {"ssim": v, "l1": 1 - v}} for k, v in enumerate(values)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_compare(here):
    write_results(here / "a", [0.1, 0.2, 0.3, 0.4]), write_results(here / "b", [0.2, 0.3, 0.4, 0.1])
    write_results(here / "c", [0.1, 0.2, 0.3, 0.4])
    labels = [{"result": r, "id": str(k), "score": k} for r in "abc" for k in range(4)]
    (here / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    found, said = call("compare", "a", "b", "c", "--people", "labels.jsonl", "--plot", "p.png")
    assert set(found) == {"editors", "notes", "metrics", "ranking", "agreement", "plot"}
    assert found["editors"] == ["a", "b", "c"] and found["plot"] == "p.png" and "Differences from a" in said
    metrics = {metric["metric"]: metric for metric in found["metrics"]}
    assert metrics["ssim"]["better"] == "higher" and metrics["l1"]["better"] == "lower"
    first, second, third = metrics["l1"]["editors"]
    assert first["difference"] is None and first["mean"] == pytest.approx(0.75) and first["n"] == 4
    d = second["difference"]
    assert d["mean"] == pytest.approx(0) and (d["wins"], d["ties"], d["losses"], d["win_rate"]) == (3, 0, 1, 0.75)
    assert d["ci95"][0] <= d["mean"] <= d["ci95"][1] and 0 <= d["p_holm"] <= 1
    assert third["difference"]["mean"] == 0 and third["difference"]["p_holm"] == 1
    for ranked in found["ranking"]:
        elo = [editor["elo"] for editor in ranked["editors"]]
        assert elo == sorted(elo, reverse=True) and sum(elo) == pytest.approx(3000)
    agreement = {metric["metric"]: metric for metric in found["agreement"]}
    assert agreement["ssim"]["n"] == 12 and agreement["ssim"]["spearman"][0] > 0.3
    assert {"kendall_tau_b", "pairwise_accuracy", "pairwise_accuracy_with_ties"} <= set(agreement["l1"])


def test_compare_tells_of_results_whose_judge_is_unknown(here):
    for name in "ab":
        write_results(here / name, [0.1, 0.2])
        (here / name / "settings.json").write_text(json.dumps({"scores": "scores.csv", "judge": None}))
    found, said = call("compare", "a", "b", "--plot", "p.png")
    assert "the judge of a, b is unknown" in said and "is unknown" in found["notes"][0]


def test_import(here):
    row = {"omni_edit_id": "a_1", "task": "addition", "src_img": photo(1), "edited_img": None}
    write_parquet(here / "omni" / "data" / "train-0.parquet", [row | {"edited_prompt_list": ["Add a kite"]}])
    found, _ = call("import", "omniedit", "omni", "--out", "set")
    assert (found["folder"], found["rows"], found["photos"], found["types"]) == ("set", 1, 1, {"add": 1})
    assert found["missing"] == {"target_caption": 1, "source_caption": 1} and found["skipped"] == {}


def test_prepare(here, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    run("toy", "data", "photos", "--items", 4, "--bare")
    with serving_writer() as (url, _):
        words = ("prepare", "photos", "--writer", url, "--writer-model", "toy", "--held-out", 0)
        found, said = call(*words, "--out", "set")
        prices = ("--price-in", 1e6, "--price-out", 1e6, "--max-cost", 1e-9, "--workers", 1)
        stopped, why = call(*words, "--out", "dear", *prices, code=2)
        assert "leave one out" in call(*words, "--out", "set", "--dry-run", 1, code=2)[1]
    assert found == json.loads((here / "set" / "prepare.json").read_text()) | {"folder": "set"}
    assert found["counts"]["rows"] > 0 and found["stopped"] == "" and "Train on it" in said
    assert stopped is None and "expected edits; got none" in why


def test_toy_grade(here):
    run("toy", "data", "set", "--items", 3)
    assert call("toy", "grade", "set")[0] == {"rows": 3, "wrong": 0, "faults": {}}


def test_paths_and_numbers_become_json_and_nan_does_not(capsys):
    print_json({"path": Path("a/b"), "count": np.int64(3), "rate": np.float32(0.5)})
    assert json.loads(capsys.readouterr().out) == {"path": "a/b", "count": 3, "rate": 0.5}
    with pytest.raises(ValueError):
        print_json({"value": float("nan")})


def test_the_page_names_every_command_that_has_the_option():
    page = (Path(__file__).parents[2] / "docs" / "scripting.md").read_text(encoding="utf-8")
    for path in commands_with_json(typer.main.get_command(cli.app)):
        assert f"`{path} --json" in page, path


def commands_with_json(command, path=()):
    """The names of all commands that have --json."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_with_json(inner, (*path, name))
    if any("--json" in parameter.opts for parameter in command.params):
        yield " ".join(path)
