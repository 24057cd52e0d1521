"""Begin training from a LoRA or a transformer that diffusers opens, whether npedit trained the model or not."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from npedit.errors import UserError
from npedit.families.base import Family
from npedit.nets.lora import KEY_PREFIX, LoraAdapter
from npedit.nets.lora_layers import LoraLayer, read_layers
from npedit.runs.start import DiffusersStart, transformer_class


def load_diffusers_start(start: DiffusersStart, family: Family, student: nn.Module) -> None:
    """Load a LoRA into an adapter, or a transformer into a model that is trained completely.

    Raises:
        UserError: a LoRA for a model or a transformer for an adapter, or another family, rank or set of layers.
        OSError, ValueError, RuntimeError: the file is damaged, or holds neither.
    """
    if start.is_lora and not isinstance(student, LoraAdapter):
        raise UserError(
            f"start: expected a transformer, as this recipe trains all weights; got {start}; add lora: {{rank: ..., "
            "alpha: ...}} to the recipe"
        )
    if not start.is_lora and isinstance(student, LoraAdapter):
        raise UserError(
            f"start: expected a LoRA, as this recipe trains one; got {start}; use it as family.weights, or leave lora "
            "out of the recipe"
        )
    if isinstance(student, LoraAdapter):
        student.load_layers(_read_lora(start, family))
    else:
        _load_transformer(start, family, student)


def _read_lora(start: DiffusersStart, family: Family) -> dict[str, LoraLayer]:
    """The layers of a LoRA file in any form that the family's pipeline loads."""
    read: Any = family.pipeline.lora_state_dict
    more = {"return_alphas": True} if "return_alphas" in inspect.signature(read).parameters else {}
    state, *alphas, metadata = read(
        str(start.path.parent), weight_name=start.path.name, return_lora_metadata=True, **more
    )
    try:
        return read_layers(state, metadata, (alphas[0] if alphas else None) or {}, KEY_PREFIX)
    except ValueError as error:
        raise UserError(f"start: {error}; got {start}; choose another LoRA") from None


def _load_transformer(start: DiffusersStart, family: Family, student: nn.Module) -> None:
    found, expected = transformer_class(start), family.denoiser.__name__
    if found != expected:
        raise UserError(f"start: expected a {expected}; got {found or 'no class'} in {start}; correct the recipe")
    load_whole_net(start.path, family, student)


def load_whole_net(folder: Path, family: Family, student: nn.Module) -> None:
    """Load the weights of a transformer's folder into a model that is trained completely.

    Raises:
        UserError: it was trained with its references in another form: a Z-Image from `npedit convert` has them as
            frames, which its config says and `ZImage.velocity` reads.
    """
    net: Any = family.open_net(folder)
    ours: Any = student
    found, expected = (n.config.get("_references", "the family's own form") for n in (net, ours))
    if found != expected:
        raise UserError(
            f"start: expected a transformer that takes its references as this recipe's base does ({expected}); got one "
            f"that takes them as {found} in {folder}; training cannot start from it: choose another start"
        )
    student.load_state_dict(net.state_dict())
