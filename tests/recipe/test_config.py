"""Recipes: strict keys and values, names that are files, overrides, and messages that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from npedit.errors import UserError, did_you_mean
from npedit.recipe.config import (
    Settings,
    available_names,
    embedded_weights,
    find_class,
    find_module,
    load_recipe,
    make_recipe,
    validate_settings,
)
from npedit.recipe.differences import differences


def plain() -> dict:
    """A small valid recipe."""
    return {
        "name": "small",
        "family": {"name": "flux"},
        "critic": {"name": "llava_onevision"},
        "data": {"name": "toy", "nothing_share": 0.25},
        "stages": [
            {"step": "reference_copy", "updates": 3, "batch_size": 2, "settings": {"student": {"lr": 0.001}}},
            {"step": "np_edit", "updates": 5, "batch_size": 2, "settings": {"fake_updates": 2}},
        ],
    }


def written(folder: Path, raw: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_values_reach_their_classes_and_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, plain()))
    assert recipe.data.settings.nothing_share == 0.25
    assert recipe.stages[0].settings.student.lr == 0.001
    assert recipe.stages[1].settings.fake_updates == 2
    assert recipe.total_updates() == 8
    assert recipe.as_dict()["stages"][1]["settings"]["critic_weight"] > 0  # a default


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = make_recipe(plain())
    again = load_recipe(written(tmp_path, recipe.as_dict()))
    assert again == recipe
    assert again.as_dict() == recipe.as_dict()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(plain()).seed = 3


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("stages.1.updates=9", lambda r: r.stages[1].updates == 9),
        ("stages.0.settings.student.lr=1e-5", lambda r: r.stages[0].settings.student.lr == 1e-5),
        ("trainer.save_every=3", lambda r: r.trainer.save_every == 3),
        ("data.nothing_share=0", lambda r: r.data.settings.nothing_share == 0),
        ("name='a=b'", lambda r: r.name == "a=b"),
        ("stages.0=null", lambda r: [s.step for s in r.stages] == ["np_edit"]),
    ],
)
def test_overrides(tmp_path: Path, override: str, read) -> None:
    assert read(load_recipe(written(tmp_path, plain()), [override]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=7", ["sed", "Did you mean 'seed'?"]),
        ("trainer.save_evry=7", ["trainer.save_evry", "'save_every'"]),
        ("family.wieghts=x", ["family.wieghts", "'weights'"]),
        ("stages.0.updats=7", ["stages.0.updats", "'updates'"]),
        ("stages.1.settings.critic_wait=7", ["stages.1.settings.critic_wait", "'critic_weight'"]),
        ("stages.0.settings.student.rl=7", ["stages.0.settings.student.rl", "'lr'"]),
        ("data.nothing_shar=7", ["data.nothing_shar", "'nothing_share'"]),
        ("data.nothing_share=7", ["data.nothing_share", "less than or equal to 1", "got 7"]),
        ("stages.1.updates=0", ["stages.1.updates", "greater than or equal to 1", "got 0"]),
        ("seed=two", ["seed", "integer", "'two'"]),
        ("stages=[]", ["stages", "at least 1"]),
        ("stages=3", ["stages", "got 3"]),
        ("stages.0.step=np_edt", ["stages.0.step", "'np_edit'"]),
        ("family.name=fluxx", ["family.name", "'flux'"]),
        ("critic.name=llava", ["critic.name", "'llava_onevision'"]),
        ("data.name=imagefoldr", ["data.name", "'imagefolder'"]),
        ("trainer.benchmark=tooy", ["trainer.benchmark", "'toy'"]),
        ("stages.0.settings=3", ["stages.0.settings", "got 3"]),
        ("stages.9.updates=3", ["stages.9", "from 0 to 1"]),
        ("name.a=3", ["name.a", "a key inside a mapping"]),
        ("seed", ["KEY=VALUE"]),
        ("seed=[", ["YAML"]),
    ],
)
def test_a_bad_override_names_key_and_cure(tmp_path: Path, override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(written(tmp_path, plain()), [override])
    for part in said:
        assert part in str(caught.value)


def test_an_ensemble_has_no_vocabulary_to_answer_from() -> None:
    raw = plain() | {"critic": {"name": "ensemble", "weights": "critics.yaml"}}
    assert make_recipe(raw).critic.name == "ensemble"
    raw["stages"][1]["settings"]["answer"] = "vocabulary"
    with pytest.raises(UserError, match=r"stages\.1\.settings\.answer: expected two_way with an ensemble"):
        make_recipe(raw)
    assert make_recipe(raw | {"critic": {"name": "llava_onevision"}}).stages[1].settings.answer == "vocabulary"


@pytest.mark.parametrize("role", ["student", "fake"])
@pytest.mark.parametrize("shard", ["full", "hybrid"])
def test_8_bit_moments_are_not_sharded(monkeypatch: pytest.MonkeyPatch, role: str, shard: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if bitsandbytes were there
    raw = plain()
    raw["stages"][1]["settings"][role] = {"optimizer": "adamw8bit"}
    assert make_recipe(raw).trainer.shard == "none"
    with pytest.raises(
        UserError, match=rf"stages\.1\.settings\.{role}\.optimizer: expected adamw where models are sharded"
    ):
        make_recipe(raw | {"trainer": {"shard": shard}})


def test_all_mistakes_of_one_class_are_told_at_once() -> None:
    raw = plain() | {"seed": -1, "sped": 3}
    with pytest.raises(UserError) as caught:
        make_recipe(raw)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("missing", ["name", "family", "critic", "data", "stages"])
def test_a_missing_key_is_named(missing: str) -> None:
    raw = plain()
    del raw[missing]
    with pytest.raises(UserError, match=f"{missing}: expected a value; got none"):
        make_recipe(raw)


@pytest.mark.parametrize("content", [b"name: [", b"- a\n", b"", b"\xff\xfe\x00", b"just words"])
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"expected .*bad\.yaml"):
        load_recipe(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_names_are_files() -> None:
    assert "flux" in available_names("families") and "base" not in available_names("families")
    assert find_module("benchmarks", "toy").__name__ == "npedit.benchmarks.toy"
    assert find_class("families", "flux").__name__ == "Flux"
    for name in available_names("steps"):
        assert issubclass(find_class("steps", name).Settings, Settings)
        assert find_class("steps", name).Settings is not Settings
    with pytest.raises(UserError, match="Did you mean 'np_edit'"):
        find_module("steps", "np_edits")


def test_embedded_weights_that_are_not_there() -> None:
    with pytest.raises(UserError, match="install it again"):
        embedded_weights("nothing_like_it")


def test_check_accepts_numbers_written_as_yaml_reads_them() -> None:
    class Small(Settings):
        lr: float

    assert validate_settings(Small, yaml.safe_load("lr: 1e-4"), "x").lr == 1e-4  # YAML reads 1e-4 as a string


def test_differences() -> None:
    old = {"a": 1, "b": {"c": [1, 2]}, "d": 5}
    new = {"a": 1, "b": {"c": [1, 3]}, "e": 6}
    assert differences(old, new) == {"b.c.1": (2, 3), "d": (5, "(absent)"), "e": ("(absent)", 6)}
    assert differences(old, old) == {}


def test_nearest() -> None:
    assert did_you_mean("sed", ["seed", "name"]) == " Did you mean 'seed'?"
    assert did_you_mean("zzz", ["seed", "name"]) == ""


def test_dtype_names() -> None:
    from npedit.recipe.config import torch_dtype

    assert torch_dtype("bfloat16") is torch.bfloat16


def test_a_stage_with_several_mistakes_is_not_reported_as_a_list_that_is_too_short():
    with pytest.raises(UserError) as caught:
        make_recipe({"name": "x", "family": {"name": "flux"}, "data": {"name": "toy"}, "stages": [{}]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(line.startswith("stages.0.") for line in lines)


@pytest.mark.parametrize("name", available_names("families"))
def test_only_families_that_can_isolate_references_are_asked_to(name):
    raw = plain() | {"family": {"name": name, "weights": "owner/model", "isolated_references": True}}
    if find_class("families", name).can_isolate_references:
        assert make_recipe(raw).family.isolated_references
    else:
        with pytest.raises(UserError, match=f"family.isolated_references: expected false with {name}.*flux, krea2"):
            make_recipe(raw)


def test_a_study_is_no_recipe_and_is_not_listed_as_one():
    with pytest.raises(UserError, match="which is a study; run npedit study"):
        load_recipe("study-toy")
    with pytest.raises(UserError) as told:
        load_recipe("nothing-like-it")
    recipes, studies = str(told.value).split(" (for npedit study: ")
    assert "study-" not in recipes and "demo" in recipes and "study-toy" in studies


def test_a_number_where_a_list_is_wanted_is_told_so():
    with pytest.raises(UserError, match=r"data.sizes: expected a list, such as \[512, 512\]; got 512"):
        load_recipe("sana-24gb", ["data.sizes=512"])
