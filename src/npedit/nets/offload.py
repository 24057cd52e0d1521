"""Frozen models that are in host memory, and on the device while they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npedit.nets.device import is_accelerator, offload_device


class OffloadedModule:
    """A frozen module with one copy of its weights in host memory, page-locked where the device is an accelerator, so
    that copies to it are fast. Weights do not change, so nothing is copied back."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self._tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        self._in_host_memory = [_to_host_memory(t.data, device) for t in self._tensors]

    def load(self) -> int:
        """Copy the weights to the device. Returns how many bytes were copied."""
        for tensor, kept in zip(self._tensors, self._in_host_memory):
            tensor.data = kept.to(self.device, non_blocking=True)
        return sum(kept.nbytes for kept in self._in_host_memory)

    def unload(self) -> None:
        """Free the device's copy."""
        for tensor, kept in zip(self._tensors, self._in_host_memory):
            tensor.data = kept


def _to_host_memory(tensor: Tensor, device: torch.device) -> Tensor:
    kept = tensor.to(offload_device())
    return kept.pin_memory() if is_accelerator(device) else kept
