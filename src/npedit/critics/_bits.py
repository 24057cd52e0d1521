"""A critic's weights in 8 or 4 bits, by bitsandbytes on CUDA (arXiv 2208.07339, 2305.14314): the linear layers of the
language model, where most of the weights are. The part that sees keeps its type: it is small, and all gradient to the
picture goes through it.

The critic is frozen, so its weights need no gradient; that of the picture flows through the quantised layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from npedit.nets.device import is_cuda

NOT_QUANTISED = (
    "lm_head",
    "vision_tower",
    "visual",
    "vision_model",
    "multi_modal_projector",
    "connector",
)  # not quantised
BLOCK_SIZE = 64  # weights of 4 bits that share a scale


def quantisation_arguments(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments that make `from_pretrained` hold weights in 8 or 4 bits; none for 0.

    Raises:
        ValueError: another number; or no CUDA device, or no bitsandbytes.
    """
    if bits == 0:
        return {}
    if bits not in (4, 8):
        raise ValueError(f"expected bits 0, 4 or 8; got {bits}")
    if not is_cuda(device) or not is_bitsandbytes_available():
        has = "with" if is_bitsandbytes_available() else "without"
        raise ValueError(
            f"expected a CUDA device and the package bitsandbytes for weights of {bits} bits; got {device.type} {has} "
            "bitsandbytes: pip install 'npedit[8bit]', or set bits to 0"
        )
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=[rf"(?:.*\.)?{name}" for name in NOT_QUANTISED],  # wherever in the model it stands
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def freeze_on(model: nn.Module, device: torch.device) -> nn.Module:
    """The model frozen and on its device, where quantised weights were put as they were opened."""
    model.requires_grad_(False).eval()
    return model if is_quantised(model) else model.to(device)


def is_quantised(model: nn.Module) -> bool:
    """Were its weights opened in 8 or 4 bits? Then it cannot be moved, nor be given another type."""
    return bool(getattr(model, "is_quantized", False))


def quantisable_weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights that would be quantised, of a model that was opened whole."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(NOT_QUANTISED) & set(name.split("."))
    ]


def bytes_per_weight(bits: int) -> float:
    """Of a quantised weight, with the scales of 4 bits; those of 8 bits, one a row, are too few to count."""
    return 1.0 if bits == 8 else 0.5 + 4 / BLOCK_SIZE
