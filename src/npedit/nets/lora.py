"""LoRA (arXiv 2106.09685): one frozen base serves student, fake score and teacher.

A trained role is an `LoraAdapter`: a net whose forward is the base's with this role's low-rank layers switched on. Outside
such a call none is on, so the base itself is the teacher, and its output stays bitwise that of the untouched model.
The base keeps its type (bfloat16, say); an adapter's weights are float32, the master weights that a learner trains.

Every linear layer is adapted: attention and MLPs, the modulation, and the embedders, through which what is new to an
editor comes in: the reference and the instruction. With attention and MLPs alone the toy learns half as fast.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

WEIGHTS_FILE = (
    "pytorch_lora_weights.safetensors"  # this name, the prefix and the metadata's key are those diffusers looks for
)
KEY_PREFIX = "transformer"
METADATA_KEY = "lora_adapter_metadata"


class LoraAdapter(nn.Module):
    """One role's adapter of a base: called like the base, and what is not its own (config, dtype) is the base's.

    Its own parameters alone are in `state_dict` and are reached by `float`; those of the base, frozen, come first in
    `parameters`, where families look for the type to compute in.
    """

    def __init__(self, base: nn.Module, role: str):
        """A view of the adapter `role` that `base` has already; see `new` and `open`."""
        super().__init__()
        self.__dict__["base"] = base  # not as a submodule: it is shared
        self.role, self.settings = role, base.peft_config[role]
        self.own = nn.ModuleDict()
        for name, layer in base.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer._active_adapter = []
                layer.set_requires_grad(list(base.peft_config), True)  # peft freezes all but the newest
                for part in ("lora_A", "lora_B"):
                    self.own[f"{name}.{part}".replace(".", "/")] = getattr(layer, part)[role]
        self.own.float()  # peft makes them in the base's type

    @classmethod
    def create(cls, base: nn.Module, role: str, rank: int, alpha: float, seed: int) -> Self:
        """A fresh adapter of every linear layer; it changes nothing yet. An earlier one of this role is dropped, and
        refuses to be called from then on."""
        if role in getattr(base, "peft_config", {}):
            base.delete_adapters(role)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            torch.manual_seed(zlib.crc32(f"{role} {seed}".encode()))
            base.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear_layer_names(base)), role)
        return cls(base, role)

    @classmethod
    def open(cls, base: nn.Module, role: str, folder: Path) -> Self:
        """The adapter that `save` wrote to this folder, frozen.

        Raises:
            ValueError: it holds no adapter of a model like `base`.
        """
        base.load_lora_adapter(folder, prefix=KEY_PREFIX, weight_name=WEIGHTS_FILE, adapter_name=role)
        if role not in getattr(base, "peft_config", {}):
            raise ValueError(f"expected keys that begin with {KEY_PREFIX} in {folder / WEIGHTS_FILE}; got none")
        found = cls(base, role).requires_grad_(False)
        found.load_weights(folder)  # again: the first time, peft rounded to the base's type
        return found

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of the family's pipeline opens."""
        whole = {_file_key(name): p.detach().cpu().contiguous() for name, p in self.own.named_parameters()}
        chosen = {
            f"{KEY_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in self.settings.to_dict().items()
        }
        metadata = {"format": "pt", METADATA_KEY: json.dumps(chosen, indent=2, sort_keys=True)}
        safetensors.torch.save_file(whole, folder / WEIGHTS_FILE, metadata)

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Take over the weights that an adapter like this one has saved to this folder.

        Raises:
            KeyError, RuntimeError: it has other layers or another rank.
        """
        whole = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        for name, p in self.own.named_parameters():
            p.copy_(whole[_file_key(name)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with this adapter.

        Raises:
            RuntimeError: the role has been given another adapter.
        """
        if getattr(self.base, "peft_config", {}).get(self.role) is not self.settings:
            raise RuntimeError(f"expected the adapter {self.role} on its base; got one that a newer one has replaced")
        with _activate_adapters(self.base, [self.role]):
            return self.base(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's (frozen, without any adapter), then the adapter's own."""
        yield from ((f"base.{n}", p) for n, p in self.base.named_parameters() if ".lora_" not in n)
        yield from super().named_parameters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


def _file_key(name: str) -> str:
    """The name of a parameter of `LoraAdapter.own`, as diffusers writes it."""
    return f"{KEY_PREFIX}.{name.replace('/', '.')}"


def linear_layer_names(net: nn.Module) -> list[str]:
    """The names of a net's layers that mix all their channels: linear ones, and convolutions without groups."""
    wrapped = [n for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)]
    plain = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) or _is_full_convolution(m)]
    return wrapped or plain


def _is_full_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


@contextmanager
def _activate_adapters(module: nn.Module, roles: list[str]) -> Iterator[None]:
    """Switch these adapters on, and all others off, below `module`.

    Not by peft's `set_adapter`, which also freezes the parameters of all others: theirs, and those of one whose
    backward pass is still to come, are to stay as they are.
    """
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = roles
    try:
        yield
    finally:
        for layer, was in zip(layers, before):
            layer._active_adapter = was


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Have a net (a model of its own, or an `LoraAdapter`) keep only its blocks' inputs for the backward pass, which
    computes the rest again.

    Raises:
        ValueError: the model cannot do that.
    """
    net.enable_gradient_checkpointing(_checkpoint_with_active_adapters)


def _checkpoint_with_active_adapters(block: nn.Module, *args: Any) -> Any:
    """Run a block, and once more in the backward pass, under the adapter that is on now: by then another may be."""
    roles = next((m.active_adapters for m in block.modules() if isinstance(m, BaseTunerLayer)), [])

    def run(*given: Any) -> Any:
        with _activate_adapters(block, roles):
            return block(*given)

    return checkpoint(run, *args, use_reentrant=False)
