"""Isolated references: what is cached once equals one call of all tokens with a mask and modulation by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from npedit import flow
from npedit.errors import UserError
from npedit.families.base import EncodedText, Family, ReferenceKVCache
from npedit.families.z_image import FRAMES
from npedit.generator import generate_few_step
from npedit.nets.lora import LoraAdapter, enable_gradient_checkpointing
from npedit.recipe.config import available_names, find_class
from tests.support.family_checks import latents, record_calls
from tests.support.masked_references import masked_velocity
from tests.support.parts import nudge, trained

KINDS = ("flux", "krea2", "qwen_image", "z_image")
TIMES = (1.0, 0.6)


@dataclass(frozen=True)
class Case:
    """A family that isolates references, a student, and what it is called on."""

    family: Family
    net: nn.Module
    x: Tensor
    text: EncodedText
    references: tuple[Tensor, ...]

    def velocity(self, t: float, references: Sequence[Tensor] | ReferenceKVCache | None = None) -> Tensor:
        times = torch.tensor([t, t / 2])
        given = self.references if references is None else references
        return self.family.velocity(self.net, self.x, times, self.text, given)

    def gradients(self, value: Tensor) -> list[Tensor]:
        """The gradients of a weighted sum, for every trained weight; zeros where there is none."""
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(8))
        found = torch.autograd.grad((value * weights).sum(), trained(self.net), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained(self.net))]


def case(kind: str, lora: bool = False, count: int = 1, seed: int = 1) -> Case:
    family = find_class("families", kind).tiny(seed)
    family.isolate_references()
    if lora:
        net: nn.Module = LoraAdapter.create(family.lora_base(), "student", 2, 4.0, 0)
    else:
        net = family.trainable_net()
    nudge(net, by=0.05)
    text = family.encode_text(["make it night", "paint the large wooden fence dark red, and leave the rest as it is"])
    references = tuple(latents(family, 2, seed=i + 1) for i in range(count))
    return Case(family, net, latents(family, 2), text, references)


both_nets = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
every_kind = pytest.mark.parametrize("kind", KINDS)


# -------------------------------------------------------------------------------------------------- the closed form


@every_kind
@both_nets
@pytest.mark.parametrize("count", [1, 2])
def test_cached_references_equal_a_call_with_a_mask(kind: str, lora: bool, count: int) -> None:
    """Values, and gradients of all trained weights."""
    made = case(kind, lora, count)
    found = made.velocity(0.7)
    wanted = masked_velocity(made.family, made.net, made.x, torch.tensor([0.7, 0.35]), made.text, made.references)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(made.gradients(found), made.gradients(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    joint = (
        find_class("families", kind)
        .tiny(1)
        .velocity(made.net, made.x, torch.tensor([0.7, 0.35]), made.text, made.references)
    )
    assert (joint - found).abs().max() > 1e-3


def test_flux_without_a_guidance_scale() -> None:
    made = case("flux", seed=2)
    assert not made.family.base.config.guidance_embeds
    wanted = masked_velocity(made.family, made.net, made.x, torch.tensor([0.7, 0.35]), made.text, made.references)
    torch.testing.assert_close(made.velocity(0.7), wanted, atol=1e-5, rtol=1e-5)


@every_kind
def test_references_may_have_other_sizes_and_are_seen_in_their_order(kind: str) -> None:
    made = case(kind)
    first, second = latents(made.family, 2, 32, 16, seed=5), latents(made.family, 2, seed=6)
    one, other = made.velocity(0.7, (first, second)), made.velocity(0.7, (second, first))
    assert (one - other).abs().max() > 1e-4
    assert (one - made.velocity(0.7, (first,))).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------- invariances


@every_kind
@both_nets
def test_the_cache_depends_neither_on_the_picture_nor_on_its_time(kind: str, lora: bool) -> None:
    """One pass serves all times: cached references give bit for bit what the same references give anew at each time."""
    made = case(kind, lora)
    cache = made.family.prepare_references(made.net, made.references, made.text)
    assert isinstance(cache, ReferenceKVCache)
    again = made.family.prepare_references(made.net, cache, made.text)
    assert again is cache
    for t in (1.0, 0.3):
        assert torch.equal(made.velocity(t, cache), made.velocity(t))


@every_kind
def test_an_edit_runs_the_references_once(kind: str) -> None:
    made = case(kind)
    noise = [latents(made.family, 2, seed=20 + i) for i in range(2)]
    given = (made.family, made.net, made.text, made.references[0], TIMES, noise)
    calls, found = record_calls(made.net, lambda: generate_few_step(*given))
    assert len(calls) == 1 + len(TIMES)
    x0 = torch.zeros_like(made.x)
    for time, eps in zip(TIMES, noise):
        t = torch.full((2,), time)
        x = flow.add_noise(x0, eps, t)
        x0 = flow.predict_x0(x, made.family.velocity(made.net, x, t, made.text, made.references), t)
    torch.testing.assert_close(found, x0, atol=1e-6, rtol=0)
    for ours, theirs in zip(made.gradients(found), made.gradients(x0), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@every_kind
@both_nets
def test_recomputed_blocks_have_the_same_gradients(kind: str, lora: bool) -> None:
    """Gradient checkpointing runs blocks of the reference pass and of later calls again, after all calls are done."""
    made, found = case(kind, lora), []
    noise = [latents(made.family, 2, seed=20 + i) for i in range(2)]
    for again in (False, True):
        if again:
            enable_gradient_checkpointing(made.net)
        x0 = generate_few_step(made.family, made.net, made.text, made.references[0], TIMES, noise)
        with torch.no_grad():  # as in a training step, the base is called without references before the backward pass
            made.family.velocity(made.family.base, made.x, torch.tensor([0.5, 0.5]), made.text)
        found.append([x0, *made.gradients(x0)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@every_kind
def test_without_references_nothing_changes(kind: str) -> None:
    made = case(kind)
    plain = find_class("families", kind).tiny(1).velocity(made.net, made.x, torch.tensor([0.7, 0.35]), made.text)
    assert torch.equal(made.velocity(0.7, ()), plain)
    made.velocity(0.7)
    assert torch.equal(made.velocity(0.7, ()), plain)  # the processors are the net's again


@every_kind
def test_every_weight_of_the_last_block_is_in_the_backward_pass_of_the_references(kind: str) -> None:
    """Else FSDP2 would not gather the last block's weights for the gradient of its keys and values."""
    made = case(kind)
    cache = made.family.prepare_references(made.net, made.references, made.text)
    assert isinstance(cache, ReferenceKVCache)
    arrived = []
    cache.output.register_hook(lambda g: arrived.append(g.abs().max()))
    made.velocity(0.7, cache).sum().backward()
    assert arrived == [0]


# ------------------------------------------------------------------------------------------------------------- errors


def test_the_cache_of_another_net_is_refused() -> None:
    made, other = case("flux"), case("flux")
    cache = other.family.prepare_references(other.net, other.references, other.text)
    with pytest.raises(ValueError, match="that this net has read"):
        made.velocity(0.7, cache)


@pytest.mark.parametrize("kind", sorted(set(available_names("families")) - set(KINDS)))
def test_other_families_refuse(kind: str) -> None:
    family = find_class("families", kind).tiny(0)
    with pytest.raises(UserError, match=r"family\.isolated_references: expected false"):
        family.isolate_references()
    with pytest.raises(TypeError, match="latents of references"):
        family.velocity(family.base, latents(family, 1), torch.ones(1), family.encode_text(["x"]), ReferenceKVCache(1))


def test_a_z_image_that_takes_frames_refuses() -> None:
    family = find_class("families", "z_image").tiny(0)
    family.base.register_to_config(**FRAMES)
    with pytest.raises(UserError, match=r"family\.isolated_references"):
        type(family)(family.pipe, family.device).isolate_references()
    made = case("z_image")
    made.net.register_to_config(**FRAMES)
    with pytest.raises(ValueError, match="trained with frames"):
        made.velocity(0.7)
