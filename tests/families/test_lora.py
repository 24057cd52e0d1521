"""Adapters on every family's own base: where they begin, what they train, and blocks that are computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npedit.families.sana import REFERENCES, Sana
from npedit.nets.lora import LoraAdapter, enable_gradient_checkpointing, linear_layer_names
from npedit.recipe.config import available_names, find_class
from tests.support.parts import nudge, trained


@pytest.mark.parametrize("name", available_names("families"))
def test_an_adapter_begins_as_the_base_and_trains_alone(name: str) -> None:
    family = find_class("families", name).tiny(0)
    stream = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, family.facts.channels, 4, 4, generator=stream)
    t, text = torch.tensor([0.7]), family.encode_text(["make it night"])

    def velocity(net: torch.nn.Module, *references: Tensor) -> Tensor:
        return family.velocity(net, x, t, text, references)

    untouched = velocity(family.base)
    adapters = {role: LoraAdapter.create(family.lora_base(), role, 2, 2.0, 0) for role in ("student", "fake")}
    net = adapters["student"]
    torch.testing.assert_close(velocity(net).detach(), untouched, atol=1e-6, rtol=0)
    assert torch.equal(velocity(net, reference), velocity(adapters["fake"], reference))
    nudge(net)
    found = []
    for again in (False, True):
        if again:
            enable_gradient_checkpointing(net)
        v = velocity(net, reference)
        velocity(adapters["fake"])  # as in a training step, another role is called before the backward pass
        found.append([v, *torch.autograd.grad(v.square().sum(), trained(net), allow_unused=True)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True) if pair[0] is not None)
    assert (found[0][0] - velocity(net)).abs().max() > 1e-4  # it looks at its reference
    assert len([g for g in found[0][1:] if g is not None and g.any()]) > 0.8 * len(trained(net))
    assert torch.equal(velocity(family.base), untouched)
    assert not any(p.requires_grad for n, p in family.base.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("name", available_names("families"))
def test_every_layer_that_mixes_channels_is_adapted(name: str) -> None:
    """So that nothing that a reference or an instruction goes through stays as it was; norms, biases and depthwise
    convolutions stay."""
    base = find_class("families", name).tiny(0).lora_base()
    matrices = [n for n, p in base.named_parameters() if p.ndim > 1 and p.shape[0] > 1 and p.shape[1] > 1]
    layers = linear_layer_names(base)
    kept = {n for n in matrices if n.rpartition(".")[0] not in layers}
    assert all("table" in n or "pos_embed" in n for n in kept), kept
    LoraAdapter.create(base, "student", 2, 2.0, 0)
    assert sorted(linear_layer_names(base)) == sorted(layers)  # the next role's are the same


def test_sanas_wider_net_is_one_and_shares_the_bases_weights() -> None:
    family = Sana.tiny(0)
    wide, base = family.lora_base(), dict(family.base.named_parameters())
    assert wide is family.lora_base() and wide is not family.base and not wide.training
    own = [n for n, p in wide.named_parameters() if p is not base[n]]
    assert own == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert not any(p.requires_grad for p in wide.parameters())
    assert (family.base.config.in_channels, wide.config.in_channels) == (4, 4 * (1 + REFERENCES))
