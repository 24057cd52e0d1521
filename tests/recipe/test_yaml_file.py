"""YAML: keys that stand twice are refused with key and lines, anywhere; what YAML allows stays allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from npedit.errors import UserError
from npedit.recipe.config import load_recipe
from npedit.recipe.yaml_file import parse_yaml

RECIPE = """\
name: small
seed: 0
family: {name: flux}
critic: {name: llava_onevision}
data: {name: toy}
stages:
  - step: reference_copy
    updates: 3
    batch_size: 2
"""


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("seed: 7\n", r"'seed' in line 2 and again in line 10"),
        ("    updates: 9\n", r"'updates' in line 8 and again in line 10"),
        ("    settings: {student: {lr: 1.0e-3, lr: 2.0e-3}}\n", r"'lr' in line 10 and again in line 10"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, added: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert load_recipe(path).seed == 0
    path.write_text(RECIPE + added)
    with pytest.raises(UserError, match=f"recipe.yaml: expected each key once; got {said}"):
        load_recipe(path)


def test_an_override_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError, match="expected each key once; got 'rank'"):
        load_recipe(path, ["lora={rank: 4, rank: 8}"])


def test_merge_keys_may_be_overridden() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n", "text")["b"] == {"x": 3, "y": 2}


def test_what_is_no_yaml() -> None:
    for text in ("a: [", "{a", "\0"):
        with pytest.raises(UserError, match="expected YAML; got recipe.yaml"):
            parse_yaml(text, "recipe.yaml")
