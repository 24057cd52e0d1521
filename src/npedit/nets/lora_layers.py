"""The layers of a LoRA file that another tool wrote, with their scale made explicit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

OLD_NAMES = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B.", ".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class LoraLayer:
    """The two matrices of a layer; `scale` is what their product is multiplied by, alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float


def read_layers(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, alphas: Mapping[str, Any], prefix: str
) -> dict[str, LoraLayer]:
    """{name of the module: its layer} of the tensors of a LoRA file.

    `metadata` is the LoraConfig that the file carries, with keys that begin with the prefix; it decides the scale if it
    is there. Else `alphas` does, by key; a layer without an alpha has scale 1, as diffusers takes it.

    Raises:
        ValueError: a tensor belongs to another model than `prefix`, or is none of a plain LoRA.
    """
    tensors = {_peft_name(name): tensor for name, tensor in state.items()}
    names = {name for name in tensors if name.startswith(f"{prefix}.") and name.endswith(SUFFIXES)}
    if unknown := sorted(tensors.keys() - names):
        raise ValueError(f"expected LoRA weights of the {prefix} alone; got {unknown[0]} and {len(unknown) - 1} more")
    modules = {name.removeprefix(f"{prefix}.").removesuffix(s) for name in names for s in SUFFIXES if name.endswith(s)}
    layers = {}
    for module in sorted(modules):
        down, up = (tensors.get(f"{prefix}.{module}{suffix}") for suffix in SUFFIXES)
        if down is None or up is None:
            raise ValueError(f"expected both matrices of each layer; got one of {module}")
        layers[module] = LoraLayer(down, up, _scale(module, down.shape[0], metadata, alphas, prefix))
    return layers


def _peft_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _scale(module: str, rank: int, metadata: Mapping[str, Any] | None, alphas: Mapping[str, Any], prefix: str) -> float:
    if metadata and f"{prefix}.lora_alpha" in metadata:
        alpha = _pattern_value(metadata.get(f"{prefix}.alpha_pattern"), module, metadata[f"{prefix}.lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if metadata.get(f"{prefix}.use_rslora") else rank)
    plain_alpha = alphas.get(f"{prefix}.{module}.alpha")
    return 1.0 if plain_alpha is None else float(plain_alpha) / rank


def _pattern_value(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value for a module in a LoraConfig's pattern of names; `default` if no pattern fits."""
    return (patterns or {}).get(get_pattern_key(list(patterns or {}), module), default)
