"""LoRA (arXiv 2106.09685): one frozen base serves student, fake score and teacher.

A trained role is a `LoraAdapter`: a model whose forward is that of the base with this role's low-rank layers active.
Outside such a call no adapter is active, so the base itself is the teacher, bit for bit. An adapter computes in the
base's type, such as bfloat16. Its weights that are trained, saved and loaded are float32 (`master_weights.py`).

Every linear layer gets an adapter: attention, MLPs, modulation, and the embedders. The embedders read what is new to an
editor, the reference and the instruction. With attention and MLPs alone the toy learns half as fast.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from npedit.errors import UserError
from npedit.nets.distributed import compute_dtype
from npedit.nets.lora_layers import LoraLayer, read_layers
from npedit.nets.master_weights import add_master_weights, master_weight, set_weight

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # this name, the prefix and the key are diffusers' own
KEY_PREFIX = "transformer"
METADATA_KEY = "lora_adapter_metadata"


class LoraAdapter(nn.Module):
    """One role's LoRA adapter of a base. It is called like the base, and has the base's attributes, such as config.

    `state_dict` has the parameters of the adapter alone. `parameters` gives the frozen parameters of the base first.
    """

    def __init__(self, base: Any, role: str):
        """A view of the adapter `role` that `base` has already; see `new` and `open`."""
        super().__init__()
        self.__dict__["base"] = base  # not as a submodule: the base is shared
        self.role, self.settings = role, base.peft_config[role]
        self.lora_layers = nn.ModuleDict()
        for name, layer in base.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer._active_adapter = []
                layer.set_requires_grad(list(base.peft_config), True)  # peft freezes all adapters but the newest
                for part in ("lora_A", "lora_B"):
                    self.lora_layers[f"{name}.{part}".replace(".", "/")] = getattr(layer, part)[role]
        self.lora_layers.to(compute_dtype(base))

    @classmethod
    def create(cls, base: Any, role: str, rank: int, alpha: float, seed: int) -> Self:
        """A new adapter of every linear layer; its output equals the base's at first. An earlier adapter of this role
        is deleted, and fails when it is called."""
        if role in getattr(base, "peft_config", {}):
            base.delete_adapters(role)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            torch.manual_seed(zlib.crc32(f"{role} {seed}".encode()))
            base.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear_layer_names(base)), role)
        made = cls(base, role)
        add_master_weights(made.lora_layers.parameters())
        return made

    @classmethod
    def open(cls, base: Any, role: str, folder: Path) -> Self:
        """The adapter that `save` wrote to this folder, frozen.

        Raises:
            ValueError: the folder holds no adapter of a model like `base`.
        """
        base.load_lora_adapter(folder, prefix=KEY_PREFIX, weight_name=WEIGHTS_FILE, adapter_name=role)
        if role not in getattr(base, "peft_config", {}):
            raise ValueError(f"expected keys that begin with {KEY_PREFIX} in {folder / WEIGHTS_FILE}; got none")
        return cls(base, role).requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of the family's pipeline opens."""
        tensors = {
            _file_key(name): master_weight(p).detach().cpu().contiguous()
            for name, p in self.lora_layers.named_parameters()
        }
        chosen = {
            f"{KEY_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in self.settings.to_dict().items()
        }
        metadata = {"format": "pt", METADATA_KEY: json.dumps(chosen, indent=2, sort_keys=True)}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata)

    def load_weights(self, folder: Path) -> None:
        """Copy the weights that an adapter of the same layers and rank saved to this folder. Its alpha may differ.

        Raises:
            UserError: the saved adapter has other layers or another rank.
        """
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        self.load_layers(read_layers(tensors, json.loads(metadata) if metadata else None, {}, KEY_PREFIX))

    @torch.no_grad()
    def load_layers(self, layers: Mapping[str, LoraLayer]) -> None:
        """Copy layers, by the names of their modules. Their scale is kept: weights are multiplied by it where this
        adapter's alpha / rank differs.

        Raises:
            UserError: there are other layers than this adapter's, or one of another shape or rank.
        """
        own = {name.replace("/", "."): p for name, p in self.lora_layers.named_parameters()}
        modules = {name.removesuffix(".lora_A.weight") for name in own if name.endswith(".lora_A.weight")}
        if modules != layers.keys():
            missing, more = sorted(modules - layers.keys()), sorted(layers.keys() - modules)
            raise UserError(
                f"expected a LoRA of the same {len(modules)} layers as this one; got one that lacks {len(missing)} "
                f"({', '.join(missing[:3])}) and has {len(more)} others ({', '.join(more[:3])}); npedit trains every "
                "linear layer"
            )
        for name, layer in layers.items():
            down, up = own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]
            if (down.shape, up.shape) != (layer.down.shape, layer.up.shape):
                raise UserError(
                    f"expected a LoRA of rank {self.settings.r} and shapes {tuple(down.shape)}, {tuple(up.shape)} in "
                    f"{name}; got {tuple(layer.down.shape)}, {tuple(layer.up.shape)}; set lora.rank to the LoRA's, or "
                    "choose another"
                )
            set_weight(down, layer.down)
            set_weight(up, layer.up * (layer.scale / (self.settings.lora_alpha / self.settings.r)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the base with this adapter active.

        Raises:
            RuntimeError: the role has been given another adapter.
        """
        if getattr(self.base, "peft_config", {}).get(self.role) is not self.settings:
            raise RuntimeError(f"expected the adapter {self.role} on its base; got one that a newer one has replaced")
        with _activate_adapters(self.base, [self.role]):
            return self.base(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The frozen parameters of the base, without any adapter, then those of this adapter."""
        yield from ((f"base.{n}", p) for n, p in self.base.named_parameters() if ".lora_" not in n)
        yield from super().named_parameters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


def weights_module(net: nn.Module) -> nn.Module:
    """The module that holds all weights of a call of `net`: of an adapter its base, which contains its layers."""
    return net.base if isinstance(net, LoraAdapter) else net


def _file_key(name: str) -> str:
    """The name of a parameter of `LoraAdapter.lora_layers`, as diffusers writes it."""
    return f"{KEY_PREFIX}.{name.replace('/', '.')}"


def linear_layer_names(net: nn.Module) -> list[str]:
    """The names of a model's layers that get an adapter: linear layers, and convolutions without groups."""
    wrapped = [n for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)]
    plain = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) or _is_full_convolution(m)]
    return wrapped or plain


def _is_full_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


@contextmanager
def _activate_adapters(module: nn.Module, roles: list[str]) -> Iterator[None]:
    """Inside the `with` block the adapters of these roles are active in `module`, and no others.

    peft's `set_adapter` would also freeze all other adapters. Their backward pass may still be to come, so they must
    stay trainable.
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


def enable_gradient_checkpointing(net: Any) -> None:
    """Make a model or a `LoraAdapter` keep only its blocks' inputs for the backward pass, which recomputes the rest.

    Raises:
        ValueError: the model has no gradient checkpointing.
    """
    net.enable_gradient_checkpointing(_checkpoint_with_active_adapters)


def _checkpoint_with_active_adapters(block: nn.Module, *args: Any) -> Any:
    """The output of a block. The backward pass runs the block again with the adapter that is active now, since another
    one may be active by then.

    Inputs are given usual strides first. FSDP2 does so in the forward pass but not when a block runs again. A linear
    layer without bias and with a frozen weight keeps tensors of a shape that depends on the strides of dimensions of
    size 1, and `checkpoint` refuses a second run that keeps other shapes.
    """
    args = tuple(_with_usual_strides(a) if isinstance(a, torch.Tensor) else a for a in args)
    roles: list[str] = next((m.active_adapters for m in block.modules() if isinstance(m, BaseTunerLayer)), [])

    def run(*given: Any) -> Any:
        with _activate_adapters(block, roles):
            return block(*given)

    return checkpoint(run, *args, use_reentrant=False)


def _with_usual_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a view of it in which dimensions of size 1, whose strides are arbitrary, have those that torch
    gives to a new view."""
    usual = tensor.detach().view_as(tensor).stride()
    return tensor if tensor.stride() == usual else tensor.view_as(tensor)
