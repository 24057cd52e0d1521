"""No tensor of the CPU meets one of the GPU: training, editing and checking with a GPU that is only pretended.

`support/pretend_gpu.py` says what it finds. It cannot find what needs a real GPU: kernels, memory, speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from npedit.editor import Editor
from npedit.nets.device import pick_device
from npedit.recipe.config import Recipe, find_class, make_recipe
from npedit.training import trainer
from tests.support.pretend_gpu import CPU, GPU, WrongDevice, pretend_gpu

STUDENT = {"lr": 1e-3, "warmup_updates": 1}
NP_EDIT = {"student": STUDENT, "fake": {"lr": 1e-3, "ema": 0.0}, "fake_updates": 1, "steps": 2}


def stage(step: str, updates: int = 1, **settings: Any) -> dict[str, Any]:
    return {"step": step, "updates": updates, "batch_size": 2, "settings": {"student": STUDENT} | settings}


WARM_UP, EDITING = stage("reference_copy", steps=2), stage("np_edit", **NP_EDIT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the folder of a tiny model of a family or critic."""
    place = tmp_path_factory.mktemp("models")

    def folder(kind: str, name: str) -> Path:
        if not (place / name).exists():
            made = find_class(kind, name).tiny(0)
            (made.pipe.save_pretrained if kind == "families" else made.save)(place / name)
        return place / name

    return folder


def recipe(models, of_family: str = "flux", of_critic: str = "llava_onevision", **changes: Any) -> Recipe:
    raw: dict[str, dict[str, Any]] = {
        "family": {"name": of_family, "weights": str(models("families", of_family))},
        "critic": {"name": of_critic, "weights": str(models("critics", of_critic)), "wording": "short"},
        "data": {"name": "toy"},
        "trainer": {"sample_items": 1, "steps": 2, "sample_every": 1, "save_every": 1},
    }
    merged = {key: raw.get(key, {}) | changes[key] for key in changes if key != "stages"}
    return make_recipe({"name": "small", "stages": changes.get("stages", [EDITING])} | raw | merged)


def train(made: Recipe, run: Path) -> int:
    """Train with a pretended GPU; returns how many operations it did."""
    with pretend_gpu() as gpu:
        trainer.train(made, run)
    return gpu.operations


# ------------------------------------------------------------------------------------------------ what is pretended


def test_what_a_gpu_refuses_is_refused():
    with pretend_gpu() as gpu:
        mine, other, stream = torch.ones(3, device="cuda"), torch.ones(3), torch.Generator()
        refused = {
            "two devices": lambda: mine + other,
            "a number of the GPU": lambda: other + mine[0],
            "a mask of the CPU": lambda: mine.masked_fill(other > 0, 0),
            "indices of the GPU": lambda: other[torch.tensor([0], device="cuda")],
            "a generator": lambda: torch.randn(3, device=mine.device, generator=stream),
            "a generator, in place": lambda: mine.normal_(generator=stream),
            "NumPy": lambda: mine.numpy(),
            "page-locked memory": lambda: mine.pin_memory(),
            "a layer": lambda: torch.nn.Linear(3, 3)(mine),
        }
        for name, fault in refused.items():
            with pytest.raises(WrongDevice):
                fault()
                pytest.fail(name)
        assert pick_device() == torch.device("cuda") and gpu.operations


def test_what_a_gpu_does_is_done():
    plain = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with pretend_gpu() as gpu:
        mine = plain.to("cuda").requires_grad_()
        assert mine.device == GPU and mine.is_cuda and plain.device == CPU and not plain.is_cuda
        layer = torch.nn.Linear(3, 2).to(GPU)
        loss = layer(mine)[torch.tensor([0, 2])].sum() * torch.tensor(2.0)
        (gradient,) = torch.autograd.grad(loss, mine, retain_graph=True)
        loss.backward()
        made = [gradient, mine.grad, layer.weight.grad, loss, mine[1:], torch.zeros_like(mine), mine.new_ones(2)]
        made += [torch.nn.utils.rnn.pad_sequence([mine[0], mine[1, :2]]), torch.cat(mine.unbind())]
        assert [t.device for t in made] == [GPU] * len(made)
        assert mine.cpu().device == CPU and torch.equal(mine.detach().cpu(), plain)
        assert mine.detach().cpu().numpy().shape == (4, 3) and torch.empty(2, device="meta").is_meta
        assert gpu.operations
    assert torch.zeros(1).device == CPU and plain.to(torch.float64).device == CPU


# ------------------------------------------------------------------------------------------------ training and editing


def test_training_stays_on_the_gpu(models, tmp_path):
    assert train(recipe(models), tmp_path / "run") > 1000


@pytest.mark.slow
def test_training_resuming_and_editing_stay_on_the_gpu(models, tmp_path):
    first = recipe(models, stages=[WARM_UP, EDITING])
    assert train(first, tmp_path / "run") > 10_000
    longer = recipe(models, stages=[WARM_UP, EDITING | {"updates": 2}])
    assert train(longer, tmp_path / "run") > 1000
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pretend_gpu() as gpu:
        editor = Editor.open(tmp_path / "run")
        edited = editor.edit_tensor(picture, ["paint it red"])
        assert edited.shape == picture.shape and gpu.operations > 1000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["krea2", "qwen_image", "sana", "sd3", "z_image"])
def test_every_family(models, tmp_path, family):
    assert train(recipe(models, family), tmp_path / "run") > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["internvl", "qwen_vl", "smolvlm"])
def test_every_critic(models, tmp_path, critic):
    assert train(recipe(models, of_critic=critic), tmp_path / "run") > 10_000


@pytest.mark.slow
def test_an_ensemble(models, tmp_path):
    """Its file lists the critics."""
    names = ("llava_onevision", "smolvlm")
    members = [{"name": name, "weights": str(models("critics", name))} for name in names]
    (tmp_path / "critics.yaml").write_text(json.dumps(members))
    critic = {"name": "ensemble", "weights": str(tmp_path / "critics.yaml"), "wording": "short"}
    assert train(recipe(models, critic=critic), tmp_path / "run") > 10_000


SETTINGS: dict[str, dict[str, Any]] = {
    "adapters and offloading": {
        "lora": {"rank": 4, "alpha": 6.0},
        "memory": {"offload": True, "cached_prompts": 50, "cached_latents": 50, "gradient_checkpointing": True},
    },
    "isolated references": {"family": {"isolated_references": True}},
    "bfloat16": {"family": {"dtype": "bfloat16"}},
    "keep loss and decoupled DMD": {
        "stages": [stage("np_edit", **NP_EDIT, keep_weight=1.0, guidance_times="below")], "data": {"masks": True},
    },
    "bootstrap": {"stages": [stage("bootstrap", student={"ema": 0.9}, steps=2)], "data": {"paired_captions": True}},
    "both": {"stages": [stage("np_edit_bootstrap", **NP_EDIT)], "data": {"paired_captions": True}},
    "supervised": {"stages": [stage("supervised", steps=2)], "data": {"name": "toy_pairs"}},
    "flow_grpo": {"stages": [stage("flow_grpo")]},
    "scenes": {"data": {"edit_types": ["scene"]}},
    "sampling by failure": {"trainer": {"by_failure": {"floor": 0.25}}},
    "evaluation": {"trainer": {"benchmark": "toy", "evaluate_items": 9, "evaluate_every": 1}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_computes(models, tmp_path, name):
    assert train(recipe(models, **SETTINGS[name]), tmp_path / "run") > 10_000
