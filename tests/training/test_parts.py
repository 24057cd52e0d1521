"""Opening the models that a recipe names."""

import pytest

from npedit.errors import UserError
from npedit.recipe.config import load_recipe
from npedit.training.parts import build_parts


@pytest.mark.parametrize("key", ["family", "critic"])
@pytest.mark.parametrize("name", ["runs/missing", "missing/in/folders", "/missing", "./missing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(key, name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", [f"{key}.weights={name}"])
    with pytest.raises(UserError, match=rf"{key}\.weights: expected a folder with a model; got '{name}'"):
        build_parts(recipe)


@pytest.mark.parametrize("name", ["owner/model", "owner/model@main"])
def test_an_id_of_the_hub_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a model that opens"):
        build_parts(load_recipe("demo", [f"critic.weights={name}"]))
