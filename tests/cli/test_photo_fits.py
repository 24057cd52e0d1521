"""What does not go together is refused before anything is trained: parts of a recipe, and a recipe with its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import Recipe, load_recipe, make_recipe
from npedit.runs import checkpoint
from npedit.steps.base import Parts
from npedit.training import trainer
from npedit.training.parts import build_parts, build_source, check_recipe_fits
from tests.support.command_line import run
from tests.support.photo_sets import opened, plain, row, save, write_metadata


def raw(*stages: dict, **changes) -> dict:
    made = {"name": "small", "family": {"name": "flux"}, "critic": {"name": "llava_onevision"}, "data": {"name": "toy"}}
    made["stages"] = [{"step": "np_edit", "updates": 1, "batch_size": 1} | s for s in stages or ({},)]
    return made | changes


def parts(made: Recipe) -> Parts:
    return Parts(Flux.tiny(0), LlavaOnevision.tiny(0), "short", torch.device("cpu"))


def never(recipe: Recipe) -> Parts:
    raise AssertionError("no model should be opened")


def photos(folder: Path, *captions: str):
    for i in range(len(captions)):
        save(folder, f"{i}.png", plain(64, 64))
    rows = [row(f"{i}.png", **({"source_caption": c} if c else {})) for i, c in enumerate(captions)]
    return opened(write_metadata(folder, rows))


def test_sources_say_whether_they_have_the_references_captions(tmp_path: Path) -> None:
    assert photos(tmp_path / "all", "red", "green").has_source_captions
    assert not photos(tmp_path / "one", "red", "").has_source_captions
    assert build_source(make_recipe(raw())).has_source_captions
    assert build_source(make_recipe(raw(data={"name": "toy_pairs"}))).has_source_captions


def test_the_warm_up_wants_the_references_captions(tmp_path: Path) -> None:
    made = make_recipe(raw({}, {"step": "reference_copy"}))
    said = r"stages.1: expected data with source_caption.*metadata.jsonl:2; write what each photo shows.*npedit caption"
    with pytest.raises(UserError, match=said):
        trainer.train(made, tmp_path / "run", parts=never, source=lambda r: photos(tmp_path / "photos", "red", ""))
    assert not checkpoint.is_run(tmp_path / "run")


@pytest.mark.parametrize("command", [["train"], ["check", "--only", "data"]])
def test_missing_captions_are_told_before_any_model_is_opened(tmp_path: Path, command: list[str]) -> None:
    photos(tmp_path / "photos", "red", "")
    recipe = ["sana-24gb", f"data.path={tmp_path / 'photos'}", "data.held_out=0", "data.max_enlargement=100"]
    recipe += ["--out", str(tmp_path / "run")] if command == ["train"] else []
    said = run(*command, *recipe, code=2)
    assert "expected data with" in said and "npedit caption SET --out NEW" in said and "weights" not in said


@pytest.mark.parametrize(
    ("trainer_steps", "stages", "named"),
    [
        (4, ({"settings": {"steps": 2}},), "trainer.steps = 4, stages.0.settings.steps = 2"),
        (2, ({"step": "reference_copy"},), "trainer.steps = 2, stages.0.settings.steps = 4"),
        (2, ({"step": "supervised"},), "trainer.steps = 2, stages.0.settings.steps = 4"),
        (4, ({"step": "reference_copy", "settings": {"steps": 8}}, {}), "stages.0.settings.steps = 8, stages.1"),
    ],
)
def test_the_number_of_steps_is_one_number(tmp_path: Path, trainer_steps: int, stages: tuple, named: str) -> None:
    wrong = raw(*stages, trainer={"steps": trainer_steps})
    with pytest.raises(UserError) as caught:
        make_recipe(wrong)
    assert named in str(caught.value) and str(caught.value).startswith("trainer.steps and stages.0.settings.steps")
    alike = [s | {"settings": {"steps": 3}} for s in stages]
    assert make_recipe(raw(*alike, trainer={"steps": 3})).trainer.steps == 3


def test_an_override_of_one_of_the_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(str(raw()))
    assert load_recipe(path, ["trainer.steps=2", "stages.0.settings.steps=2"]).trainer.steps == 2
    with pytest.raises(UserError, match="stages.0.settings.steps = 4"):
        load_recipe(path, ["trainer.steps=2"])


def test_the_toy_benchmark_wants_its_own_size() -> None:
    made = make_recipe(raw(trainer={"benchmark": "toy"}))
    with pytest.raises(UserError, match="trainer.benchmark: .*32x32.*got data of 64x64, 80x48"):
        check_recipe_fits(made, _sized(((64, 64), (32, 32), (48, 80))), parts(made))
    check_recipe_fits(made, _sized(((32, 32),)), parts(made))
    check_recipe_fits(make_recipe(raw()), _sized(((64, 64),)), parts(made))


def _sized(sizes) -> SimpleNamespace:
    return SimpleNamespace(sizes=sizes, has_target_captions=True, has_source_captions=True, texts=lambda: iter(()))


def test_the_toy_benchmark_wants_a_family_that_takes_its_size() -> None:
    made = make_recipe(raw(trainer={"benchmark": "toy"}))
    coarse = parts(made)
    coarse.family.facts = replace(coarse.family.facts, multiple=64)
    with pytest.raises(UserError, match=r"multiples of 64"):
        check_recipe_fits(made, _sized(((32, 32),)), coarse)


@pytest.mark.parametrize(
    "without",
    [{"step": "reference_copy", "settings": {"steps": 1}},
     {"settings": {"critic_weight": 0, "fake_updates": 1, "steps": 1}}],
)  # fmt: skip
def test_a_recipe_without_critic(tmp_path: Path, without: dict) -> None:
    made = raw(without, trainer={"steps": 1, "sample_items": 1})
    del made["critic"]
    recipe = make_recipe(made)
    assert recipe.critic is None and make_recipe(recipe.as_dict()) == recipe
    found = build_parts(recipe)
    assert found.critic is None and found.wording == "plain"
    trainer.train(recipe, tmp_path / "run", parts=lambda r: Parts(Flux.tiny(0), None, "plain", torch.device("cpu")))
    assert "vision-language" not in (tmp_path / "run" / "final" / "README.md").read_text()


def test_a_critic_that_is_needed_and_missing() -> None:
    made = raw({"settings": {"critic_weight": 0}}, {})
    del made["critic"]
    said = r"critic: expected a value; got none; stages\.1 \(np_edit\).*stages\.1\.settings\.critic_weight to 0"
    with pytest.raises(UserError, match=said):
        make_recipe(made)


@pytest.mark.parametrize(
    "wrong",
    [{"guidance_by_type": {"remove": -1.0}}, {"guidance_by_type": {"remove": float("inf")}}, {"guidance": float("nan")},
     {"guidance_by_type": {"remove": float("nan")}}, {"guidance": float("inf")}, {"critic_weight": float("inf")}],
)  # fmt: skip
def test_guidance_is_finite_and_not_negative(wrong: dict) -> None:
    with pytest.raises(UserError, match=rf"stages\.0\.settings\.{next(iter(wrong))}"):
        make_recipe(raw({"settings": wrong}))
    assert make_recipe(raw({"settings": {"guidance_by_type": {"remove": 0.0}, "guidance": 0}}))
