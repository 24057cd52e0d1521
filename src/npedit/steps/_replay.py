"""The student's samples of its last updates, for a fake score that is trained on samples more than once."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npedit.nets.device import offload_device
from npedit.nets.distributed import all_gather, rank, world_size


@dataclass(frozen=True)
class Samples:
    """What the student made of one batch: latents x0 (b, c, h, w), and the target captions."""

    x0: Tensor
    captions: tuple[str, ...]


class ReplayBuffer:
    """The samples of the last `updates` updates, each as the batches of that update. Every process holds the global
    batches, in host memory, and gives out its own rows. So another number of processes can continue."""

    def __init__(self, updates: int, device: torch.device):
        self.device = device
        self._kept: deque[list[Samples]] = deque(maxlen=updates)  # the newest last

    def add(self, samples: Sequence[Samples]) -> None:
        """Keep this process's samples of one update together with those of the other processes, unless a number in
        them is not finite."""
        mine = [(s.x0.to(offload_device()), s.captions) for s in samples]
        batches = [
            Samples(torch.cat([x0 for x0, _ in batch]), tuple(c for _, captions in batch for c in captions))
            for batch in zip(*all_gather(mine), strict=True)
        ]
        if all(bool(whole.x0.isfinite().all()) for whole in batches):
            self._kept.append(batches)

    def local_samples(self, age: int) -> list[Samples]:
        """This process's samples of `age` updates ago, 0 for the newest. Beyond the oldest it starts again at 0. The
        list is empty if none are kept."""
        found = self._kept[-1 - age % len(self._kept)] if self._kept else []
        rows = [_local_rows(len(whole.captions)) for whole in found]
        return [Samples(w.x0[r].to(self.device), w.captions[r]) for w, r in zip(found, rows)]

    def local_captions(self) -> list[tuple[str, ...]]:
        """The captions of this process's samples, by batch."""
        return [whole.captions[_local_rows(len(whole.captions))] for batches in self._kept for whole in batches]

    def state(self) -> dict[str, Tensor]:
        """All samples as tensors, to be saved."""
        tensors: dict[str, Tensor] = {}
        for i, batches in enumerate(self._kept):
            for k, samples in enumerate(batches):
                tensors[f"replay.{i}.{k}.x0"] = samples.x0
                tensors[f"replay.{i}.{k}.captions"] = _to_bytes(samples.captions)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned, except batches that today's processes cannot share equally."""
        self._kept.clear()
        found: dict[int, list[Samples]] = {}
        names = [name for name in tensors if name.startswith("replay.") and name.endswith(".x0")]
        for name in sorted(names, key=lambda n: [int(part) for part in n.split(".")[1:3]]):
            captions = _captions_from_bytes(tensors[name.removesuffix("x0") + "captions"])
            if len(captions) % world_size() == 0:
                found.setdefault(int(name.split(".")[1]), []).append(Samples(tensors[name].clone(), captions))
        self._kept.extend(found.values())


def _local_rows(size: int) -> slice:
    """This process's rows of a global batch."""
    mine = size // world_size()
    return slice(rank() * mine, (rank() + 1) * mine)


def _to_bytes(words: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(words)).encode()), dtype=torch.uint8)


def _captions_from_bytes(tensor: Tensor) -> tuple[str, ...]:
    return tuple(json.loads(bytes(tensor.tolist()).decode()))
