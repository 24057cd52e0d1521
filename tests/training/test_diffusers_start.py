"""Training that begins from a LoRA or a transformer of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from torch import Tensor, nn

from npedit.errors import UserError
from npedit.families.base import Family
from npedit.families.z_image import FRAMES
from npedit.nets.lora import LoraAdapter, linear_layer_names
from npedit.recipe.config import Recipe, find_class, load_recipe, make_recipe
from npedit.runs.checkpoint import read_manifest
from npedit.runs.start import DiffusersStart, is_foreign, resolve_start
from npedit.steps.base import Parts
from npedit.training.diffusers_start import load_diffusers_start
from npedit.training.parts import load_start_weights
from npedit.training.trainer import train
from tests.support.hub_downloads import serve_repositories
from tests.support.hub_server import serve_hub, use_hub
from tests.support.parts import nudge

FAMILIES = ["flux", "sd3"]
RANK, ALPHA = 4, 10.0


def open_tiny(name: str) -> Family:
    return find_class("families", name).tiny(0)


def save_lora(name: str, folder: Path, **settings: Any) -> Path:
    """A LoRA file as diffusers itself writes it, of a model with other weights than at the start."""
    net: Any = open_tiny(name).base
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": linear_layer_names(net)} | settings
    assert isinstance(net, PeftAdapterMixin)
    net.add_adapter(LoraConfig(**settings), "mine")
    nudge(net, by=0.1)
    net.save_lora_adapter(folder, adapter_name="mine")
    (path,) = folder.glob("*.safetensors")
    tensors = {f"transformer.{key}": value for key, value in safetensors.torch.load_file(path).items()}
    told = {f"transformer.{key}": _plain(value) for key, value in net.peft_config["mine"].to_dict().items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    return path


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


@torch.no_grad()
def velocity(family: Family, net: nn.Module) -> Tensor:
    stream = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, family.facts.channels, 4, 4, generator=stream)
    return family.velocity(net, x, torch.tensor([0.7]), family.encode_text(["make it night"]), (reference,))


def loaded_by_diffusers(name: str, path: Path) -> Tensor:
    family: Any = open_tiny(name)
    family.pipe.load_lora_weights(path.parent, weight_name=path.name)
    return velocity(family, family.base)


def start_adapter(name: str, path: Path, rank: int = RANK) -> Tensor:
    family = open_tiny(name)
    student = LoraAdapter.create(family.lora_base(), "student", rank, 6.0, 0)  # another alpha than the file's
    start = resolve_start(str(path))
    assert isinstance(start, DiffusersStart) and start.is_lora
    load_diffusers_start(start, family, student)
    return velocity(family, student)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alpha", [ALPHA, float(RANK)])
def test_an_adapter_begins_as_diffusers_applies_the_lora(name: str, alpha: float, tmp_path: Path) -> None:
    path = save_lora(name, tmp_path, lora_alpha=alpha)
    wanted = loaded_by_diffusers(name, path)
    family = open_tiny(name)
    assert (wanted - velocity(family, family.base)).abs().max() > 1e-3
    torch.testing.assert_close(start_adapter(name, path), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(start_adapter(name, tmp_path), wanted, atol=2e-6, rtol=1e-5)  # its folder


@pytest.mark.parametrize("name", FAMILIES)
def test_an_alpha_for_one_layer_is_honoured(name: str, tmp_path: Path) -> None:
    layer = next(n for n in linear_layer_names(open_tiny(name).base) if "attn" in n)
    path = save_lora(name, tmp_path, alpha_pattern={layer: 1.0})
    torch.testing.assert_close(start_adapter(name, path), loaded_by_diffusers(name, path), atol=2e-6, rtol=1e-5)


def test_alpha_tensors_without_metadata_are_honoured(tmp_path: Path) -> None:
    path = save_lora("flux", tmp_path)
    tensors = safetensors.torch.load_file(path)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    tensors |= {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}
    safetensors.torch.save_file(tensors, path)
    torch.testing.assert_close(start_adapter("flux", path), loaded_by_diffusers("flux", path), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_rank_other_layers_and_another_family_are_refused(name: str, tmp_path: Path) -> None:
    path = save_lora(name, tmp_path / "a")
    with pytest.raises(UserError, match=r"of rank 2 .*set lora.rank"):
        start_adapter(name, path, rank=2)
    few = save_lora(name, tmp_path / "b", target_modules=["to_q", "to_k"])
    with pytest.raises(UserError, match="every linear layer"):
        start_adapter(name, few)
    with pytest.raises(UserError, match="lacks"):
        start_adapter("sd3" if name == "flux" else "flux", path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_begins_from_a_transformer(name: str, tmp_path: Path) -> None:
    trained: Any = open_tiny(name).trainable_net()
    nudge(trained, by=0.1)
    trained.save_pretrained(tmp_path / "pipeline" / "transformer")
    family = open_tiny(name)
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        student, start = family.trainable_net(), resolve_start(str(path))
        assert isinstance(start, DiffusersStart) and not start.is_lora
        load_diffusers_start(start, family, student)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), trained.parameters(), strict=True))
    other = open_tiny("sd3" if name == "flux" else "flux")
    with pytest.raises(UserError, match="expected a .*Transformer2DModel; got .*Transformer2DModel"):
        load_diffusers_start(start, other, other.trainable_net())
    adapter = LoraAdapter.create(family.lora_base(), "student", 2, 2.0, 0)
    with pytest.raises(UserError, match="expected a LoRA, as this recipe trains one"):
        load_diffusers_start(start, family, adapter)
    lora = DiffusersStart(save_lora(name, tmp_path / "lora"), True)
    with pytest.raises(UserError, match="add lora:"):
        load_diffusers_start(lora, family, family.trainable_net())


def tiny_parts(made: Recipe) -> Parts:
    return Parts(open_tiny(made.family.name), None, "plain", torch.device("cpu"), made.lora)


def test_a_run_trains_from_a_lora_and_is_not_called_without_pairs(tmp_path: Path) -> None:
    path, lora = save_lora("flux", tmp_path / "lora"), {"rank": RANK, "alpha": 6.0}
    wanted = loaded_by_diffusers("flux", path)
    stage = {"step": "reference_copy", "updates": 1, "batch_size": 2, "settings": {"steps": 1, "student": {"lr": 1e-9}}}
    raw = {"name": "small", "family": {"name": "flux"}, "data": {"name": "toy"}, "stages": [stage], "lora": lora}
    more = {"sample_items": 1, "steps": 1, "sample_every": 0, "evaluate_every": 0}
    made = make_recipe(raw | {"start": str(path), "trainer": more})
    run = train(made, tmp_path / "run", parts=tiny_parts)
    assert read_manifest(run)["no_pairs"] is False
    card = (run / "final" / "README.md").read_text()
    assert "no-pairs" not in card and "is not known" in card and "trained on pairs" not in card
    other = open_tiny("flux")
    editor = LoraAdapter.open(other.lora_base(), "student", run / "final")
    torch.testing.assert_close(velocity(other, editor), wanted, atol=1e-4, rtol=1e-4)


def test_what_is_no_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="which holds none"):
        resolve_start(str(tmp_path / "empty"))
    with serve_hub(monkeypatch):
        with pytest.raises(UserError, match="there is no runs/mistyped on this computer, and as a Hub id"):
            resolve_start("runs/mistyped")
    assert is_foreign("me/mine") and is_foreign("me/mine/file.safetensors") and is_foreign(str(tmp_path / "empty"))
    assert not is_foreign("embedded") and not is_foreign("nowhere") and not is_foreign("runs/x/checkpoint-1")


def test_a_lora_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_lora("flux", tmp_path / "lora")
    path.with_name("v2.safetensors").write_bytes(b"second")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_repositories({"me/mine": path.parent}) as address:
        use_hub(monkeypatch, address)
        for name, content in (("me/mine", path.read_bytes()), ("me/mine/v2.safetensors", b"second")):
            start = resolve_start(name)
            assert isinstance(start, DiffusersStart) and start.is_lora and start.path.read_bytes() == content
        with pytest.raises(UserError, match="no-such"):
            resolve_start("me/mine/no-such.safetensors")


@pytest.mark.parametrize("is_editor", [True, False])
def test_a_converted_z_image_that_takes_frames_is_refused(is_editor: bool, tmp_path: Path) -> None:
    """Its weights would be trained as those of a net that takes its references in the other form."""
    family: Any = open_tiny("z_image")
    made = Parts(family, None, "plain", torch.device("cpu"))
    student = made.create_trainable("student", 0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    family.base.register_to_config(**FRAMES)
    family.base.save_pretrained(tmp_path / "final" / "transformer")
    if is_editor:
        facts = {"format": 1, "family": "z_image", "base": "x", "steps": 4, "sizes": [[32, 32]]}
        (tmp_path / "final" / "npedit.json").write_text(json.dumps(facts))
    start = tmp_path if is_editor else tmp_path / "final" / "transformer"
    recipe = load_recipe("demo", ["family={name: z_image, weights: x}", f"start={start}"])
    with pytest.raises(UserError, match=r"start: expected a transformer that takes its references .* as frames"):
        load_start_weights(recipe, made, student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
