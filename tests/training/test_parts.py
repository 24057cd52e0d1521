"""Opening the models that a recipe names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import load_recipe, make_recipe
from npedit.training.parts import build_parts
from tests.support.pretend_gpu import CPU, GPU, pretend_gpu


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


def test_an_offloaded_model_leaves_the_gpu_before_the_next_one_opens(tmp_path, monkeypatch):
    Flux.tiny(0).pipe.save_pretrained(tmp_path / "base")
    LlavaOnevision.tiny(0).save(tmp_path / "critic")
    critic = {"name": "llava_onevision", "weights": str(tmp_path / "critic"), "wording": "short"}
    recipe = make_recipe(
        {
            "name": "small",
            "family": {"name": "flux", "weights": str(tmp_path / "base")},
            "critic": critic,
            "judge": critic | {"wording": "plain"},
            "memory": {"offload": True},
            "data": {"name": "toy"},
            "stages": [{"step": "np_edit", "updates": 1, "batch_size": 1}],
        }
    )
    opened: list[nn.Module] = []
    when_opening: list[list[torch.device]] = []

    def watch(kind: Any) -> None:
        load = kind.load

        def watched(*args: Any) -> Any:
            when_opening.append([next(m.parameters()).device for m in opened])
            made = load(*args)
            opened.extend([made.base, *made.text_encoders(), made.pipe.vae] if kind is Flux else [made.model])
            return made

        monkeypatch.setattr(kind, "load", watched)

    watch(Flux)
    watch(LlavaOnevision)
    with pretend_gpu():
        made = build_parts(recipe)
        assert when_opening == [[], [GPU, CPU, CPU, CPU], [GPU, CPU, CPU, CPU, CPU]]
        assert {next(m.parameters()).device for m in opened[1:]} == {CPU}
        assert set(made.offloaded) == {"text", "vae", "critic", "judge"}
        with made.on_device("text", "critic"):
            assert [next(m.parameters()).device for m in opened] == [GPU, GPU, GPU, CPU, GPU, CPU]
