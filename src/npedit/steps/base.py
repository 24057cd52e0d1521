"""What every way to train shares. One file in this folder is one way; none imports another.

A step owns its learners and nothing else that changes: all its randomness comes from (seed, update), so a resumed run
repeats itself bit for bit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npedit.config import Settings
from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.families.base import Family
from npedit.learner import Learner


@dataclass(frozen=True)
class Parts:
    """The frozen parts that a step works with. `critic` is None only where no step needs one."""

    family: Family
    critic: Critic | None
    wording: str
    device: torch.device


class Step(ABC):
    """One way to train. `Settings` is the class of its settings in a recipe."""

    Settings: type[Settings]
    learners: dict[str, Learner]

    @abstractmethod
    def __init__(self, settings: Settings, parts: Parts, student: nn.Module, updates: int, seed: int): ...

    @classmethod
    def batches_per_update(cls, settings: Settings) -> int:
        """How many batches one update takes before accumulation."""
        return 1

    @classmethod
    def needs(cls, settings: Settings) -> frozenset[str]:
        """What must be there: any of "critic", "target_caption", "source_caption", "edited"."""
        return frozenset()

    @abstractmethod
    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update on `accumulate * batches_per_update` batches; returns what to log."""

    def extra_state(self) -> dict[str, Tensor]:
        """State beside the learners'."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `extra_state` gave."""
        if state:
            raise ValueError(f"expected no state beside the learners'; got {', '.join(state)}")


class Clock:
    """Seconds spent in named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the block to `time/<part>`."""
        start = time.perf_counter()
        yield
        key = f"time/{part}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
