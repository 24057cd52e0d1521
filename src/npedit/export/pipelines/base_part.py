"""A part of an exported editor that is loaded from its base model. diffusers calls `from_pretrained` of this class in
the place of the part's own class, because model_index.json names this file. It imports nothing of npedit.

`base_part.json` beside this file says where the part is:
`{"base": "black-forest-labs/FLUX.1-dev", "subfolder": "transformer", "library": "diffusers", "class":
"FluxTransformer2DModel", "lora": "pytorch_lora_weights.safetensors"}`. With an empty `base` the part is in this folder.
`lora` is a file beside model_index.json. With `in_channels` the input's convolution gets so many channels, the new ones
with zero weights, before the LoRA is added.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download


class BasePart(torch.nn.Module):
    """Loads a part of the base model; no object of this class is ever made."""

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, dtype: Any = None) -> Any:
        """The part: a model, tokenizer or scheduler of the class that its `base_part.json` names."""
        facts = json.loads((Path(folder) / "base_part.json").read_text(encoding="utf-8"))
        kind = getattr(importlib.import_module(facts["library"]), facts["class"])
        options: dict[str, Any] = {"subfolder": facts["subfolder"]} if facts["base"] else {}
        if issubclass(kind, torch.nn.Module):
            options["dtype" if facts["library"] == "transformers" else "torch_dtype"] = dtype or torch_dtype
        part = kind.from_pretrained(facts["base"] or folder, **options)
        if "in_channels" in facts:
            _widen_input(part, facts["in_channels"])
        if "lora" in facts:
            path = _beside_index(Path(folder), facts["lora"])
            part.load_lora_adapter(path.parent, prefix="transformer", weight_name=path.name)
        return part


def _beside_index(folder: Path, name: str) -> Path:
    """A file beside model_index.json. Of an editor on the Hub, diffusers does not download a LoRA file with it."""
    path = folder.parent / name
    if not path.is_file() and folder.parent.parent.name == "snapshots":
        snapshot = folder.parent
        repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
        path = Path(hf_hub_download(repository, name, revision=snapshot.name, cache_dir=snapshot.parents[2]))
    return path


def _widen_input(net: Any, in_channels: int) -> None:
    """Give the input's convolution further channels of zero weights, in place."""
    old = net.patch_embed.proj
    new = torch.nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    new = new.to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if new.bias is not None:
            new.bias.copy_(old.bias)
    net.patch_embed.proj = new
    net.register_to_config(in_channels=in_channels, out_channels=net.proj_out.out_features // net.config.patch_size**2)
