"""Offloaded models: every value comes back as it was, and page-locked memory is little more than the weights."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from npedit.critics.internvl import InternVL
from npedit.families.sd3 import SD3
from npedit.nets.offload import ALIGNMENT, LARGEST_ARENA, OffloadedModule, host_bytes, pack_into_arenas, plan_arenas
from npedit.training.models_without_weights import open_without_weights
from tests.support.pretend_gpu import CPU, GPU, pretend_gpu

GIB, MIB = 2**30, 2**20


def plain_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Same type, shape and bits, also where values are NaN."""
    bits = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def kinds_of_tensors() -> list[Tensor]:
    """Types and layouts that models have."""
    x = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(250, dtype=torch.uint8)
    return [
        x, x.half(), x.bfloat16(), x.double(), codes, codes[3:].view(13, 19), codes.to(torch.int8), x > 0, x.cfloat(),
        x.to(torch.float8_e4m3fn), torch.tensor(3), torch.tensor(torch.nan), torch.empty(0, 5),
        x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[:, ::2], x[0, 0].expand(7, 3, 5), x[1:, 1],
    ]  # fmt: skip


def test_tensors_of_all_types_and_layouts_are_packed_bit_for_bit() -> None:
    given = kinds_of_tensors()
    packed = pack_into_arenas(given, plain_bytes)
    assert all(same(a, b) for a, b in zip(given, packed, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in packed}) == 1
    for tensor, kept in zip(given, packed, strict=True):
        assert kept.storage_offset() * kept.itemsize % ALIGNMENT == 0
        assert kept.stride() == torch.empty_like(tensor).stride()
    wanted = [t.clone() for t in given]
    for i, kept in enumerate(packed):  # no two overlap
        kept.copy_(torch.zeros_like(kept))
        assert all(same(a, b) for a, b in zip(wanted[i + 1 :], packed[i + 1 :]))


def test_a_tied_weight_stays_tied_and_is_kept_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[1].weight = nn.Parameter(net[0].weight.data)  # another parameter, the same values
    with pretend_gpu():
        net.to(GPU)
        net[1].weight.data = net[0].weight.data
        kept = OffloadedModule(net, GPU)
        held = sum(t.nbytes for t in {id(t): t for t in (*net.parameters(), *net.buffers())}.values())
        for _ in range(2):
            assert kept.load() == held - net[0].weight.nbytes
            assert net[0].weight.data_ptr() == net[1].weight.data_ptr()
            kept.unload()
            assert net[0].weight.data_ptr() == net[1].weight.data_ptr()


@pytest.mark.parametrize("kind", [InternVL, SD3])
def test_weights_on_a_pretended_gpu_come_back_bit_for_bit(kind: type) -> None:
    """Through several turns of `load` and `unload`; away from the GPU all weights are views of few arenas."""
    made = kind.tiny(0)
    net: nn.Module = made.model if kind is InternVL else nn.ModuleList([*made.text_encoders(), made.pipe.vae])
    wanted = [t.detach().clone() for t in tensors(net)]
    with pretend_gpu() as gpu:
        kept = OffloadedModule(net.to(GPU), GPU)
        for _ in range(3):
            kept.unload()
            assert {gpu.device(t) for t in tensors(net)} == {CPU}
            arenas = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(net)}
            assert sum(arenas.values()) == host_bytes([net]) and len(arenas) < 5
            assert all(same(a, b) for a, b in zip(wanted, tensors(net), strict=True))
            kept.load()
            assert {gpu.device(t) for t in tensors(net)} == {GPU}
            assert all(same(a, b) for a, b in zip(wanted, tensors(net), strict=True))


def tensors(net: nn.Module) -> Iterable[Tensor]:
    return [*net.parameters(), *net.buffers()]


# ------------------------------------------------------------------------------------------------- room and places


def assert_places_do_not_overlap(sizes: list[int]) -> list[int]:
    """Each tensor is inside its arena, aligned, and after the one before it; returns the arenas."""
    arenas, places = plan_arenas(sizes)
    assert all(size.bit_count() == 1 for size in arenas)
    ends = dict.fromkeys(range(len(arenas)), 0)
    for (arena, start), size in sorted(zip(places, sizes, strict=True)):
        assert start % ALIGNMENT == 0 and start >= ends[arena]
        ends[arena] = start + size
        assert ends[arena] <= arenas[arena]
    return arenas


def test_the_arenas_of_real_models_are_at_most_a_hundredth_larger_than_the_weights(recipe_models) -> None:
    """InternVL3-14B, for instance: 28.2 GiB, of which an allocation per tensor would make 48.2."""
    for name, sizes in recipe_models.items():
        arenas, weights = assert_places_do_not_overlap(sizes), sum(sizes)
        assert sum(arenas) <= 1.01 * weights + 4 * MIB, name
        assert sum(arenas) <= weights + LARGEST_ARENA and len(arenas) <= 12 + weights // LARGEST_ARENA, name
    rounded = sum(1 << (size - 1).bit_length() for size in recipe_models["internvl"] if size)
    assert rounded > 1.6 * sum(recipe_models["internvl"])


@pytest.fixture(scope="module")
def recipe_models() -> dict[str, list[int]]:
    """The sizes of the tensors of frozen models, in bytes."""
    from npedit.recipe.config import load_recipe

    family, critic = open_without_weights(load_recipe("z-image-8x80gb"))
    found = {"internvl": critic.model, "text": family.pipe.text_encoder, "vae": family.pipe.vae, "base": family.base}
    return {name: [t.nbytes for t in tensors(model)] for name, model in found.items()}


@pytest.mark.parametrize(
    ("sizes", "arenas"),
    [
        ([], []),
        ([0], [64]),
        ([10, 1, 65], [256]),
        ([5 * GIB, 3 * GIB], [8 * GIB]),  # a tensor above the largest arena
        ([GIB] * 9, [4 * GIB, 4 * GIB, GIB]),
        ([3 * MIB // 2] * 3, [4 * MIB, 2 * MIB]),
    ],
)
def test_arenas_of_small_lists(sizes: list[int], arenas: list[int]) -> None:
    assert assert_places_do_not_overlap(sizes) == arenas


def test_random_lists_of_sizes_have_places() -> None:
    for seed in range(20):
        stream = torch.Generator().manual_seed(seed)
        exponents = torch.rand(60, generator=stream) * 30
        sizes = [int(2**e) - 1 for e in exponents.tolist()]
        assert sum(assert_places_do_not_overlap(sizes)) <= sum(sizes) + LARGEST_ARENA
