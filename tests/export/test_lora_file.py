"""An exported LoRA file, opened by diffusers' own pipeline class of each family, and the merged transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from npedit.errors import UserError
from npedit.export.lora_file import fold_alpha, merged_transformer, write_lora
from npedit.families.base import Family
from npedit.families.sana import Sana
from npedit.nets.lora import METADATA_KEY, WEIGHTS_FILE, LoraAdapter
from npedit.recipe.config import available_names, find_class
from tests.support.parts import nudge

FAMILIES = available_names("families")
RANK, ALPHA = 2, 6.0


def open_tiny(name: str) -> Family:
    """The family with the same random weights at every call."""
    return find_class("families", name).tiny(0)


def train_adapter(family: Family) -> LoraAdapter:
    net = LoraAdapter.create(family.lora_base(), "student", RANK, ALPHA, 0)
    nudge(net, by=0.1)
    return net


@torch.no_grad()
def velocity(family: Family, net: nn.Module) -> Tensor:
    stream = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, family.facts.channels, 4, 4, generator=stream)
    return family.velocity(net, x, torch.tensor([0.7]), family.encode_text(["make it night"]), (reference,))


def facts(name: str) -> dict[str, Any]:
    return {"family": name, "base": "/somewhere/private/base", "times": [1.0, 0.5]}


def drop_metadata(path: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)


def widen(family: Family) -> None:
    """Give Sana's pipeline the net with slots for references, which its LoRA files are for."""
    family.pipe.transformer = family.base = family.lora_base()


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_familys_own_pipeline_loads_the_editor(name: str, with_metadata: bool, tmp_path: Path) -> None:
    family = open_tiny(name)
    adapter = train_adapter(family)
    wanted, untrained = velocity(family, adapter), velocity(family, family.lora_base())
    path = write_lora(adapter, tmp_path, facts(name))
    if not with_metadata:
        drop_metadata(path)
    other = open_tiny(name)
    if isinstance(other, Sana):
        widen(other)
    other.pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(other, other.base), wanted, atol=2e-6, rtol=1e-5)
    assert (wanted - untrained).abs().max() > 1e-3


def test_sanas_plain_pipeline_refuses_the_file_of_the_wider_net(tmp_path: Path) -> None:
    write_lora(train_adapter(open_tiny("sana")), tmp_path, facts("sana"))
    with pytest.raises(RuntimeError, match="size mismatch for patch_embed.proj"):
        open_tiny("sana").pipe.load_lora_weights(tmp_path)


def test_the_metadata_say_what_the_file_is_for_and_no_path_of_this_computer(tmp_path: Path) -> None:
    path = write_lora(train_adapter(open_tiny("flux")), tmp_path, facts("flux"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata[METADATA_KEY])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == RANK
    assert metadata["npedit_rank"] == str(RANK) and metadata["npedit_base"] == "base"
    assert json.loads(metadata["npedit_times"]) == [1.0, 0.5]
    assert "private" not in json.dumps(metadata)


def test_folding_twice_is_folding_once(tmp_path: Path) -> None:
    path = write_lora(train_adapter(open_tiny("flux")), tmp_path, facts("flux"))
    once = safetensors.torch.load_file(path)
    fold_alpha(path, facts("flux"))
    again = safetensors.torch.load_file(path)
    assert once.keys() == again.keys() and all(torch.equal(once[k], again[k]) for k in once)


def test_the_editor_opens_an_exported_file_as_before(tmp_path: Path) -> None:
    family = open_tiny("flux")
    adapter = train_adapter(family)
    wanted = velocity(family, adapter)
    write_lora(adapter, tmp_path, facts("flux"))
    other = open_tiny("flux")
    opened = LoraAdapter.open(other.lora_base(), "student", tmp_path)
    torch.testing.assert_close(velocity(other, opened), wanted, atol=2e-6, rtol=1e-5)
    assert (tmp_path / WEIGHTS_FILE).is_file()


def test_training_starts_from_an_exported_file_with_the_same_output(tmp_path: Path) -> None:
    """Its alpha is its rank; that of the new adapter is not."""
    family = open_tiny("flux")
    adapter = train_adapter(family)
    wanted = velocity(family, adapter)
    write_lora(adapter, tmp_path, facts("flux"))
    other = open_tiny("flux")
    student = LoraAdapter.create(other.lora_base(), "student", RANK, ALPHA, 1)
    student.load_weights(tmp_path)
    torch.testing.assert_close(velocity(other, student), wanted, atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="of rank 3"):
        LoraAdapter.create(other.lora_base(), "fake", 3, 3.0, 1).load_weights(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_transformer_is_the_adapter(name: str, tmp_path: Path) -> None:
    family = open_tiny(name)
    adapter = train_adapter(family)
    LoraAdapter.create(family.lora_base(), "fake", RANK, ALPHA, 1)  # another role's adapter is left out
    wanted = velocity(family, adapter)
    merged: Any = merged_transformer(adapter)
    torch.testing.assert_close(velocity(family, merged), wanted, atol=2e-6, rtol=1e-5)
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]
    merged.save_pretrained(tmp_path)
    opened = family.denoiser.from_pretrained(tmp_path)
    torch.testing.assert_close(velocity(family, opened), wanted, atol=1e-5, rtol=1e-5)
