"""A LoRA editor for other tools: the LoRA file, or a transformer with the LoRA merged into the base model's weights.

A run's `final/` keeps alpha and rank as they were in training, because training may resume or start from there. Some
loaders read alpha from the metadata of the file, some from `.alpha` tensors, some from neither; and diffusers refuses a
file that has both metadata and `.alpha` tensors. In an exported file alpha / rank is therefore part of the weights, and
the metadata say alpha = rank, so that all loaders apply the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from npedit.nets.lora import KEY_PREFIX, METADATA_KEY, WEIGHTS_FILE, LoraAdapter
from npedit.runs.final import public_name


def write_lora(net: LoraAdapter, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` to an existing folder; returns its path. `facts` are those of
    npedit.json: family, base and times go into the file's metadata."""
    net.save(folder)
    fold_alpha(folder / WEIGHTS_FILE, facts)
    return folder / WEIGHTS_FILE


def fold_alpha(path: Path, facts: Mapping[str, Any]) -> None:
    """Rewrite a file of `LoraAdapter.save` in place, with alpha / rank multiplied into its lora_B weights. The base
    model is not needed. A second call changes no weight."""
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()[METADATA_KEY])
    rank, alpha = (float(settings[f"{KEY_PREFIX}.{key}"]) for key in ("r", "lora_alpha"))
    tensors = {name: _scaled(name, tensor, alpha / rank) for name, tensor in safetensors.torch.load_file(path).items()}
    settings[f"{KEY_PREFIX}.lora_alpha"] = settings[f"{KEY_PREFIX}.r"]
    safetensors.torch.save_file(tensors, path, _metadata(settings, int(rank), facts))


def _scaled(name: str, tensor: Tensor, scale: float) -> Tensor:
    return tensor * scale if ".lora_B." in name else tensor


def _metadata(settings: Mapping[str, Any], rank: int, facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an exported file: diffusers' own entry, and facts about the editor under keys of npedit."""
    about = {
        "npedit_family": str(facts["family"]),
        "npedit_base": public_name(str(facts["base"])),
        "npedit_rank": str(rank),
        "npedit_times": json.dumps(facts.get("times", [])),
    }
    return {"format": "pt", METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True), **about}


@torch.no_grad()
def merged_transformer(net: LoraAdapter) -> nn.Module:
    """The base of an adapter with this adapter added to its weights, as a model without LoRA layers.

    The base model is changed in place, in its number type: it can no longer serve as a teacher, and its adapters are
    removed. In bfloat16 the sum is rounded, and changes that are small compared with a weight are lost.
    """
    base: Any = net.base
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[net.role])
    base.unload_lora()
    return base
