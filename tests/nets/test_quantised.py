"""Linear layers in 8 and 4 bits: how near, how small, and used like the layers that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npedit.nets.lora import LoraAdapter
from npedit.nets.quantised import QuantisedLinear, quantise_linear_layers


def bytes_of(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("bits", "error", "share"), [(8, 0.01, 0.27), (4, 0.11, 0.15)])
@pytest.mark.parametrize("width", [256, 200])
def test_a_quantised_layer_is_near_and_small(bits, error, share, width):
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 512), torch.randn(8, width)
    packed = QuantisedLinear(linear, bits)
    difference = (packed(x) - linear(x)).norm() / linear(x).norm()
    assert packed.weight.shape == linear.weight.shape and difference < error
    assert bytes_of(packed) < share * bytes_of(linear) + 600 * (width == 200) * 512 / 8


def test_levels_come_back_exactly_and_zeros_stay_zero():
    linear = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        linear.weight[0] = torch.linspace(-127, 127, 64).round()
        linear.weight[1] = 0
    packed = QuantisedLinear(linear, 8)
    torch.testing.assert_close(packed.weight, linear.weight, atol=1e-4, rtol=0)
    assert not QuantisedLinear(linear, 4).weight[1].any()


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits; got 3"):
        QuantisedLinear(nn.Linear(4, 4), 3)


def test_named_parts_and_adapters_are_left_alone():
    net = nn.ModuleDict({"blocks": nn.Linear(64, 64), "visual": nn.Sequential(nn.Linear(64, 64))})
    quantise_linear_layers([net], 8, skip=["visual"])
    assert type(net["blocks"]) is QuantisedLinear and type(net["visual"][0]) is nn.Linear


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_works_on_a_quantised_base(bits):
    from npedit.families.flux import Flux

    family = Flux.tiny(0)
    adapter = LoraAdapter.create(family.lora_base(), "student", 4, 4.0, 0)
    with torch.no_grad():
        for p in adapter.lora_layers.parameters():
            p.normal_(std=0.2)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    text = family.encode_text(["a dog"])
    with torch.no_grad():
        before = family.velocity(adapter, x, t, text)
        quantise_linear_layers([adapter.base.get_submodule(name) for name in family.facts.blocks], bits)
        after = family.velocity(adapter, x, t, text)
    assert any(isinstance(m, QuantisedLinear) for m in adapter.base.modules())
    assert all(p.dtype is torch.float32 for p in adapter.lora_layers.parameters())
    assert 0 < (after - before).norm() / before.norm() < (0.05 if bits == 8 else 0.4)
