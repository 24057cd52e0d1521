"""`npedit check`: exit codes, files, JSON; the cost section; the whole demo and each planted fault (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npedit.check import cost
from npedit.check.check import SECTIONS, check_recipe, run_section
from npedit.check.cost import check_cost, chosen_updates, measure_updates
from npedit.check.findings import Section
from npedit.check.subject import CheckOptions, Subject
from npedit.errors import UserError
from npedit.nets.device import CPU
from npedit.recipe.config import load_recipe
from npedit.rehearsal.phase_memory import PhaseMemory
from npedit.toy.dataset import write_dataset
from npedit.toy_models.critic import untrained_critic
from npedit.training.stages import student_calls
from tests.check.conftest import severities
from tests.check.test_critic import changed_critic, swap, use_spare_tokens
from tests.check.test_data import drop_objects_of_one_type, mix_captions, repeat_captions
from tests.support.command_line import names, run


def on_folder(folder: Path) -> str:
    return f"data={{name: imagefolder, path: {folder}, sizes: [[32, 32]], prefetch: 0}}"


def rewrite(folder: Path, change) -> Path:
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    change(rows)
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_good_recipe_ends_with_0_and_leaves_page_and_json(tmp_path) -> None:
    text = run("check", "demo", "--only", "data", "--samples", 4, "--out", tmp_path / "out")
    assert "0 warning, 0 will not learn" in text and "report.html" in text
    assert names(tmp_path / "out") == ["check.json", "report.html"]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["verdict"] == "ok"


def test_a_recipe_that_will_not_learn_ends_with_1_and_json_is_all_that_is_printed(tmp_path) -> None:
    folder = rewrite(write_dataset(tmp_path / "rows", 30, 0), repeat_captions)
    words = ("check", "demo", on_folder(folder), "--only", "data", "--samples", 4, "--out", tmp_path / "out", "--json")
    text = run(*words, code=1)
    found = json.loads(text[text.index("{") :])
    assert (found["verdict"], found["exit_code"]) == ("will not learn", 1)
    assert [s["name"] for s in found["sections"]] == ["data"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--only", "dates"), "--only: expected one of data, critic, gradient, base, cost; got 'dates'"),
        (("no.such.key=1",), "expected"),
        (("data={name: imagefolder, path: nowhere}",), "does not exist"),
        (("critic.weights=nowhere",), "critic.weights: expected a model that opens"),
        (("--only", "critic", "--labelled", "nowhere"), "--labelled: expected a folder"),
    ],
)
def test_bad_input_ends_with_2(tmp_path, words, expected) -> None:
    assert expected in run("check", "demo", *words, "--samples", 2, "--out", tmp_path / "out", code=2)


def test_the_sections_are_the_ones_that_are_asked_for() -> None:
    report = check_recipe(load_recipe("demo"), CheckOptions(samples=2), ["data"])
    assert [s.name for s in report.sections] == ["data"] and report.sections[0].seconds > 0
    with pytest.raises(UserError, match="Did you mean"):
        check_recipe(load_recipe("demo"), CheckOptions(samples=2), ["dat"])
    assert list(SECTIONS) == ["data", "critic", "gradient", "base", "cost"]


@pytest.mark.parametrize("name", ["critic", "gradient", "base"])
def test_a_section_that_exhausts_the_memory_has_a_finding_and_the_others_are_reported(monkeypatch, name) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")

    place = {"critic": "critic.ask_critic", "gradient": "gradient.check_question", "base": "base.generate_images"}[name]
    monkeypatch.setattr(f"npedit.check.{place}", exhausted)
    report = check_recipe(load_recipe("demo"), CheckOptions(samples=4), ["data", name])
    assert [s.name for s in report.sections] == ["data", name] and report.exit_code == 0
    assert severities(report.sections[1]) == {"section-out-of-memory": "warning"}
    assert "Tried to allocate 8.00 GiB" in report.sections[1].findings[0].measured


def test_a_sharded_recipe_is_not_run_in_one_process(demo) -> None:
    recipe = load_recipe("demo", ["trainer.shard=full"])
    subject = Subject(recipe, demo.data, demo.parts, demo.options, demo.examples[:1])
    for name in ("gradient", "cost"):
        section = run_section(name, subject)
        assert severities(section) == {"sharded": "note"} and "npedit rehearse" in section.findings[0].advice
    assert severities(run_section("data", subject)).keys().isdisjoint({"sharded"})


@pytest.mark.parametrize("name", ["gradient", "cost"])
def test_a_stage_that_training_refuses_is_a_finding(demo, name) -> None:
    """The toy's critic has no digits; the report of the other sections must not be lost."""
    recipe = load_recipe("demo", ["stages.1.settings.grade=beside"])
    section = run_section(name, Subject(recipe, demo.data, demo.parts, demo.options, demo.examples[:1]))
    assert severities(section) == {"stage-refused": "will not learn"}
    assert "grade" in section.findings[0].measured


def test_updates_with_one_call_and_with_two_are_run() -> None:
    recipe = load_recipe("z-image-8x80gb")
    for number in range(2):
        warm_up, short, long = chosen_updates(recipe, number)
        assert warm_up != long
        assert [student_calls(recipe, number, u) for u in (warm_up, short, long)] == [2, 1, 2]
    assert load_recipe("demo").trainer.steps == 1 and chosen_updates(load_recipe("demo"), 1) == [0, 1, 2]


def test_the_time_of_training_weighs_updates_with_one_call_and_stages_with_the_same_step(demo, monkeypatch) -> None:
    """An update takes a second for each item and each call of the student; the editor has four steps."""
    stages = [f"stages.{i}={{step: np_edit, updates: 1000, batch_size: {size}}}" for i, size in ((0, 8), (1, 2))]
    recipe = load_recipe("demo", [*stages, "trainer.steps=4"])

    def seconds(subject, stage, step, update) -> dict[str, float]:
        number = subject.recipe.stages.index(stage)
        return {"time/update": float(stage.batch_size * student_calls(recipe, number, update))}

    monkeypatch.setattr(cost, "build_step", lambda *_: None)
    monkeypatch.setattr(cost, "run_update", seconds)
    monkeypatch.setattr(cost, "_estimate", lambda *_: None)
    section = check_cost(Subject(recipe, demo.data, demo.parts, demo.options, demo.examples))
    expected = 1000 * (8 + 2) * (1 / 4 * 1 + 3 / 4 * 2) / 3600
    assert any(f"2000 updates take about {expected:.1f} hours" in f.measured for f in section.findings)
    rows = {row[0]: row[1] for row in section.tables[0].rows}
    assert rows["np_edit (stages.0): update"] == 16 and rows["np_edit (stages.1): update with one call"] == 2


def test_updates_of_each_stage_are_timed_by_phase(demo) -> None:
    recipe = load_recipe("demo", ["stages.0.batch_size=2", "stages.1.batch_size=2"])
    memory, section = PhaseMemory(CPU), Section("cost", "Cost")
    seconds = measure_updates(section, Subject(recipe, demo.data, demo.parts, demo.options, demo.examples), memory)
    assert severities(section) == {}
    assert seconds is not None
    assert {"reference_copy: update", "np_edit: update", "np_edit: critic", "np_edit: fake"} <= seconds.keys()
    assert not memory.can_measure or "np_edit: critic" in memory.peaks


@pytest.mark.slow  # the estimate runs in a new process
def test_cost_has_time_memory_estimate_and_eta(demo) -> None:
    small = ["stages.0.batch_size=2", "stages.1.batch_size=2"]
    subject = Subject(load_recipe("demo", small), demo.data, demo.parts, demo.options, demo.examples)
    section = check_cost(subject)
    assert severities(section) == {}
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    seconds, peak, planned = rows["np_edit: critic"]
    assert seconds > 0 and planned > 0
    assert peak is None or peak > 0.01  # the models alone
    assert any("850 updates take about" in f.measured for f in section.findings)


def test_updates_that_are_not_finite_are_found(demo) -> None:
    recipe = load_recipe("demo", ["stages.1=null", "stages.0.batch_size=2", "trainer.benchmark=''"])
    subject = Subject(recipe, demo.data, demo.parts, demo.options, demo.examples)
    with torch.no_grad():
        next(subject.student().parameters()).fill_(float("nan"))
    section = Section("cost", "Cost")
    measure_updates(section, subject, PhaseMemory(CPU))
    assert severities(section) == {"update-not-finite": "will not learn"}


# --------------------------------------------------------------------------------------------- the whole command, slow


@pytest.mark.slow
def test_the_demo_is_silent(tmp_path) -> None:
    run("check", "demo", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["verdict"] == "ok", [f for s in found["sections"] for f in s["findings"] if f["severity"] != "ok"]
    assert [s["name"] for s in found["sections"]] == list(SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "section", "key", "severity"),
    [
        ("weak critic", "critic", "critic-weak", "will not learn"),
        ("wrong tokens", "critic", "answer-tokens", "will not learn"),
        ("exchanged tokens", "critic", "critic-reversed", "will not learn"),
        ("repeated captions", "data", "captions-repeat", "will not learn"),
        ("mixed captions", "data", "captions-own", "will not learn"),
        ("no objects", "data", "no-objects", "warning"),
        ("learning rate", "gradient", "learning-rate", "will not learn"),
    ],
)
def test_each_planted_fault_fires_in_the_command(tmp_path, fault, section, key, severity) -> None:
    code = int(severity == "will not learn")
    words = (*planted(fault, tmp_path), "--only", section, "--samples", 24, "--out", tmp_path / "out")
    run("check", "demo", *words, code=code)
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert severity in [f["severity"] for s in found["sections"] for f in s["findings"] if f["key"] == key]


def planted(fault: str, place: Path) -> list[str]:
    """The change to the recipe that plants a fault."""
    changes = {"repeated captions": repeat_captions, "mixed captions": mix_captions,
               "no objects": drop_objects_of_one_type}  # fmt: skip
    if fault in changes:
        folder = rewrite(write_dataset(place / "rows", 60, 0), changes[fault])
        return [on_folder(folder)]
    if fault == "learning rate":
        return ["stages.1.settings.student.lr=1.0e-2"]
    if fault == "weak critic":
        (place / "critic").mkdir()
        untrained_critic(0).save(place / "critic")
    elif fault == "exchanged tokens":
        changed_critic(place / "critic", lambda vocabulary: swap(vocabulary, "yes", "no"))
    else:
        changed_critic(place / "critic", use_spare_tokens)
    return [f"critic.weights={place / 'critic'}"]
