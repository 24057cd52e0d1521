"""Frozen models that are in host memory, and on the device while they are used.

PyTorch rounds each page-locked allocation up to a power of two (ATen/core/CachingHostAllocator.h). One allocation per
tensor would take up to twice the memory of the weights. So the weights are packed into a few large arenas whose sizes
are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from npedit.nets.device import is_accelerator, offload_device

LARGEST_ARENA = 2**32  # bytes; a larger tensor makes an arena of its size
SMALLEST_ARENA = 2**20  # bytes; what is left below this size is one arena
ALIGNMENT = 64  # bytes, as PyTorch aligns its tensors on a CPU


class OffloadedModule:
    """A frozen module with one copy of its weights in host memory, page-locked where the device is an accelerator, so
    that copies to it are fast. Weights do not change, so nothing is copied back. Tied weights stay tied."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self._tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        numbers: dict[tuple, int] = {}
        self._numbers = [numbers.setdefault(_place_of(t), len(numbers)) for t in self._tensors]
        distinct = dict(zip(reversed(self._numbers), reversed(self._tensors)))
        self._in_host_memory = _to_host_memory([distinct[i].data for i in range(len(numbers))], device)

    def load(self) -> int:
        """Copy the weights to the device. Returns how many bytes were copied."""
        copies = [kept.to(self.device, non_blocking=True) for kept in self._in_host_memory]
        for tensor, number in zip(self._tensors, self._numbers):
            tensor.data = copies[number]
        return sum(kept.nbytes for kept in self._in_host_memory)

    def unload(self) -> None:
        """Free the device's copy."""
        for tensor, number in zip(self._tensors, self._numbers):
            tensor.data = self._in_host_memory[number]


def _place_of(tensor: Tensor) -> tuple:
    """Where a tensor's values are; equal for tied weights."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _to_host_memory(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    if is_accelerator(device):
        return pack_into_arenas(tensors, _page_locked_bytes)
    return [tensor.to(offload_device()) for tensor in tensors]


def _page_locked_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=offload_device(), pin_memory=True)


def pack_into_arenas(tensors: Sequence[Tensor], allocate: Callable[[int], Tensor]) -> list[Tensor]:
    """Copies of the tensors, with their types, shapes and (if they are dense) strides, as views of arenas.
    `allocate(size)` gives an arena: bytes (size,) in host memory."""
    sizes, places = plan_arenas([tensor.nbytes for tensor in tensors])
    arenas = [allocate(size) for size in sizes]
    packed = []
    for tensor, (number, start) in zip(tensors, places):
        values = arenas[number][start : start + tensor.nbytes].view(tensor.dtype)
        like = torch.empty_like(tensor, device="meta")  # dense, in the tensor's order of dimensions
        packed.append(values.as_strided(like.shape, like.stride()).copy_(tensor))
    return packed


def plan_arenas(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """(the sizes of the arenas, the arena and the first byte of each tensor), from the tensors' sizes in bytes. Each
    arena takes the largest tensors that are left and fit. Its size is the largest power of two that these tensors
    fill, so all arenas together are little larger than the tensors."""
    padded = [max(1, -(-size // ALIGNMENT)) * ALIGNMENT for size in sizes]
    left = sorted(range(len(sizes)), key=lambda i: padded[i], reverse=True)
    arenas: list[int] = []
    places = [(0, 0)] * len(sizes)
    while left:
        arenas.append(_arena_size([padded[i] for i in left]))
        used, later = 0, []
        for i in left:
            if used + padded[i] > arenas[-1]:
                later.append(i)
                continue
            places[i] = len(arenas) - 1, used
            used += padded[i]
        left = later
    return arenas, places


def _arena_size(sizes: Sequence[int]) -> int:
    """The size of the next arena for tensors of these sizes, the largest first."""
    total = sum(sizes)
    if total < SMALLEST_ARENA:
        return _power_of_two_from(total)
    return max(_power_of_two_from(sizes[0]), min(LARGEST_ARENA, _power_of_two_from(total + 1) // 2))


def _power_of_two_from(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def host_bytes(modules: Sequence[nn.Module]) -> int:
    """The page-locked memory that `OffloadedModule` takes for these modules on an accelerator, in bytes."""
    found = ([t.nbytes for t in (*module.parameters(), *module.buffers())] for module in modules)
    return sum(sum(plan_arenas(sizes)[0]) for sizes in found)
