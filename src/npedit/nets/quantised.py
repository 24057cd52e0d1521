"""Linear layers whose weights are held in 8 or 4 bits, for use of a model on a small card. Plain torch, so it works on
every device.

8 bits: integers from -127 to 127 with one scale per output row. 4 bits: blocks of 64 weights along a row, each with one
scale and the 16 levels of the NormalFloat type (QLoRA, arXiv 2305.14314). A layer unpacks its weight for each call, so
activations have the model's number type and the result is rounded by the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_SIZE = 64  # weights of 4 bits that share a scale
NORMAL_FLOAT_LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


class QuantisedLinear(nn.Module):
    """A frozen linear layer with its weight in 8 or 4 bits; called like the `nn.Linear` that it is made from."""

    codes: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        """Raises ValueError for other numbers of bits."""
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"expected 4 or 8 bits; got {bits}")
        self.bits, self.in_features, self.out_features = bits, linear.in_features, linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        codes, scales = _to_8_bits(weight) if bits == 8 else _to_4_bits(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(weight.dtype))
        self.register_buffer("levels", torch.tensor(NORMAL_FLOAT_LEVELS, device=weight.device).to(weight.dtype), False)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, unpacked."""
        if self.bits == 8:
            return self.codes.to(self.scales.dtype) * self.scales
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(1).long()
        blocks = self.levels[codes].unflatten(1, (-1, BLOCK_SIZE)) * self.scales.unsqueeze(-1)
        return blocks.flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


def quantise_linear_layers(modules: Iterable[nn.Module], bits: int, skip: Iterable[str] = ()) -> None:
    """Replace the linear layers inside the modules, in place. Layers whose dotted name has a part in `skip`, and those
    of adapters ("lora_A", "lora_B"), are left as they are.

    Raises:
        ValueError: `bits` is neither 8 nor 4.
    """
    skipped = {*skip, "lora_A", "lora_B"}
    for module in modules:
        for name, layer in list(module.named_modules()):
            if type(layer) is nn.Linear and not skipped & set(name.split(".")):
                parent, _, key = name.rpartition(".")
                setattr(module.get_submodule(parent), key, QuantisedLinear(layer, bits))


def _to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight.float() / scales).round().to(torch.int8), scales


def _to_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, padded in / 2), two in a byte, and scales (out, blocks)."""
    padded = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    scales = padded.abs().amax(-1).clamp_min(1e-12)
    levels = torch.tensor(NORMAL_FLOAT_LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(padded / scales.unsqueeze(-1), borders).flatten(1).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales
