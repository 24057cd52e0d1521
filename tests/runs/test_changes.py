"""What may change when a run is resumed: a decision for every setting, in code and in docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from npedit.errors import UserError
from npedit.recipe.config import Recipe, available_names, find_class, find_module, make_recipe
from npedit.runs import checkpoint
from npedit.runs.changes import DECISIONS, data_change, decision_for, decisions_table

ROOT = Path(__file__).parents[2]
STUDENT = {"lr": 0.001, "decay": "cosine"}


def recipe(updates: int = 4, batch_size: int = 4, accumulate: int = 1, **changes) -> Recipe:
    stage = {"step": "reference_copy", "updates": 2, "batch_size": 2}
    last = stage | {"updates": updates, "batch_size": batch_size, "accumulate": accumulate}
    raw = {"name": "small", "family": {"name": "flux"}, "critic": {"name": "llava_onevision"}, "data": {"name": "toy"}}
    return make_recipe(raw | {"stages": [stage, last | {"settings": {"student": STUDENT}}]} | changes)


def write_run(run: Path, made: Recipe, **manifest) -> list:
    facts = checkpoint.make_manifest(made, "d" * 8, torch.device("cpu"))
    with checkpoint.hold_run(run, made, True):
        return checkpoint.write_run_metadata(run, made, facts | manifest)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six updates, five of which are done."""
    write_run(tmp_path / "run", recipe())
    checkpoint.save_checkpoint(tmp_path / "run", 5, {"a": torch.ones(1)}, {"stage": 1, "update": 3, "step": 5}, 2)
    return tmp_path / "run"


def leaves(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [m for m in inner if isinstance(m, type) and issubclass(m, BaseModel)]
        if path + key in ("stages", "data"):
            continue
        yield from leaves(models[0], f"{path}{key}.") if models else [path + key]


def all_settings() -> Iterator[str]:
    yield from leaves(Recipe)
    for name in available_names("data"):
        yield from (f"data.{leaf}" for leaf in ("name", *leaves(find_module("data", name).Settings)))
    yield from (f"stages.0.{key}" for key in ("step", "updates", "batch_size", "accumulate"))
    for name in available_names("steps"):
        yield from (f"stages.0.settings.{leaf}" for leaf in leaves(find_class("steps", name).Settings))


def test_every_setting_has_a_decision_and_every_decision_a_setting() -> None:
    settings = list(all_settings())
    assert len(settings) > 80 and {"memory.offload", "critic.bits", "stages.0.settings.student.lr"} <= set(settings)
    assert not [s for s in settings if decision_for(s) not in DECISIONS]
    assert {decision_for(s) for s in settings} == set(DECISIONS)
    assert decision_for("something.new").kind == "refused"


def test_the_docs_have_the_same_table() -> None:
    assert decisions_table() in (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"offload": True, "gradient_checkpointing": True}},
        {"trainer": {"sample_every": 7, "evaluate_every": 3, "evaluate_items": 5, "keep": 3}},
        {"name": "another"},
    ],
)
def test_free_changes_leave_no_trace(run: Path, changes: dict) -> None:
    assert write_run(run, recipe(**changes)) == []
    assert checkpoint.read_manifest(run)["changes"] == []


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (recipe(updates=8), [("stages.1.updates", 4, 8)]),
        (recipe(updates=3), [("stages.1.updates", 4, 3)]),
        (recipe(batch_size=2, accumulate=2), [("stages.1.accumulate", 1, 2), ("stages.1.batch_size", 4, 2)]),
        (recipe(critic={"name": "llava_onevision", "bits": 8}), [("critic.bits", 0, 8)]),
        (recipe(memory={"packed_questions": True}), [("memory.packed_questions", False, True)]),
        (recipe(memory={"cached_latents": 9}), [("memory.cached_latents", 0, 9)]),
        (recipe(memory={"cached_prompts": 9}), [("memory.cached_prompts", 0, 9)]),
        (recipe(memory={"decode_tile": 64}), [("memory.decode_tile", 0, 64)]),
    ],
)
def test_recorded_changes_are_listed_in_the_manifest(run: Path, made: Recipe, expected: list) -> None:
    write_run(run, made)
    listed = checkpoint.read_manifest(run)["changes"]
    assert [(c["setting"], c["old"], c["new"]) for c in listed] == expected and {c["update"] for c in listed} == {5}
    assert make_recipe(checkpoint.read_config(run)) == made
    write_run(run, made)
    assert checkpoint.read_manifest(run)["changes"] == listed


def test_the_schedule_after_a_longer_stage_is_stated(run: Path) -> None:
    write_run(run, recipe(updates=8))
    note = checkpoint.read_manifest(run)["changes"][0]["note"]
    assert note == "student: cosine to zero at update 8, so the rate goes from 0.146 to 0.691 of lr here"


def test_another_number_of_processes_is_recorded(run: Path) -> None:
    write_run(run, recipe(), processes=3)
    assert checkpoint.read_manifest(run)["changes"] == [{"setting": "processes", "old": 1, "new": 3, "update": 5}]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (recipe(seed=1), "seed: 0 -> 1"),
        (recipe(updates=2), "stages.1.updates: 4 -> 2 .3 updates of this stage are done"),
        (recipe(batch_size=2), "batch_size x accumulate: 4 -> 2"),
        (recipe(lora={"rank": 4}), "lora"),
        (recipe(critic=None), "critic"),
        (recipe(stages=[{"step": "reference_copy", "updates": 4, "batch_size": 2}] * 3), "stages.2"),
        (
            recipe(stages=[{"step": "reference_copy", "updates": n, "batch_size": 2} for n in (3, 4)]),
            "only the last stage",
        ),
    ],
)
def test_refused_changes_name_the_way_out(run: Path, made: Recipe, reason: str) -> None:
    before = (run / checkpoint.MANIFEST).read_text()
    with pytest.raises(UserError, match=f"(?s){reason}.*start={run}"):
        write_run(run, made)
    assert (run / checkpoint.MANIFEST).read_text() == before


def test_a_lost_photo_is_named_and_other_data_are_refused() -> None:
    old = {"metadata": "m", "photos": {"a.png": 10, "b.png": 20, "c.png": -1}}
    assert data_change(old, old | {"photos": {"a.png": 10, "b.png": -1, "c.png": -1}}) == (
        "missing or unreadable: b.png", True)  # fmt: skip
    assert data_change(old, old | {"photos": {"a.png": 10, "b.png": 20, "c.png": 5}}) == ("back again: c.png", True)
    words, allowed = data_change(old, old | {"photos": {"a.png": 11, "b.png": 20, "c.png": -1}})
    assert "a.png" in words and not allowed
    assert data_change(old, old | {"metadata": "n"}) == ("the metadata file has changed", False)
    assert not data_change(None, None)[1]
