"""What every way to train shares. One file in this folder is one way; none imports another.

A step owns its learners and nothing else that changes: all its randomness comes from (seed, update), so a resumed run
repeats itself bit for bit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from npedit.config import LoraChoice, MemorySettings, Settings, rest_device
from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families.base import Family, Text
from npedit.learner import Learner
from npedit.lora import Adapter, checkpoint_gradients
from npedit.meta import under_way


@dataclass(frozen=True)
class Judge:
    """A critic that is asked at evaluations and never trained against, and how questions are put to it."""

    critic: Critic
    wording: str


@dataclass(frozen=True)
class Parts:
    """The frozen parts that a step works with. `critic` is None only where no step needs one; `judge`, which no step
    may ask, only where the recipe names none."""

    family: Family
    critic: Critic | None
    wording: str
    device: torch.device
    lora: LoraChoice | None = None
    memory: MemorySettings = MemorySettings()
    prompts: OrderedDict[str, Text] = field(default_factory=OrderedDict)  # encoded, the last used at the end
    judge: Judge | None = None
    woken: set[str] = field(default_factory=set)  # frozen parts in use, by the names that `awake` takes

    def __post_init__(self) -> None:
        with self.awake("text", "vae", "critic", "judge"):
            pass  # with `memory.offload` they rest from here on

    def net(self, role: str, seed: int) -> nn.Module:
        """A trainable net that starts as the base: an adapter of it, or a copy. With LoRA a role has one at a time.

        Raises:
            UserError: gradient checkpointing is asked for, and the model does not offer it.
        """
        if self.lora is None:
            net = self.family.net().to(self.device)
        else:
            layers, chosen = self.family.facts.lora, self.lora
            net = Adapter.new(self.family.lora_base(), role, layers, chosen.rank, chosen.alpha, seed)
        if self.memory.gradient_checkpointing:
            try:
                checkpoint_gradients(net)
            except ValueError as error:
                raise UserError(f"memory.gradient_checkpointing: {error}; set it to false") from None
        return net

    def text(self, prompts: Sequence[str]) -> Text:
        """Encode prompts, each distinct one once while the cache (`memory.cached_prompts`) has room for it. Encoders
        are frozen, so the prompt alone is the key."""
        room = self.memory.cached_prompts
        if not room:
            with self.awake("text"):
                return self.family.encode_text(prompts)
        here: dict[str, Text] = {}
        for prompt in dict.fromkeys(prompts):
            found = self.prompts.pop(prompt, None)
            if found is None:
                with self.awake("text"):
                    found = Text(tuple(p.to(rest_device()) for p in self.family.encode_text([prompt]).parts))
            self.prompts[prompt] = found
            here[prompt] = Text(tuple(p.to(self.device) for p in found.parts))
            while len(self.prompts) > room:
                self.prompts.popitem(last=False)
        return Text.cat([here[prompt] for prompt in prompts])

    def encode(self, images: Tensor) -> Tensor:
        """The family's `encode`."""
        with self.awake("vae"):
            return self.family.encode(images)

    @contextmanager
    def awake(self, *names: str) -> Iterator[None]:
        """Use the frozen parts of these names ("text", "vae", "critic", "judge") inside the block, where they are on
        the device. With `memory.offload` they rest in the CPU's memory outside of all such blocks; a backward pass
        through them must end inside."""
        if not self.memory.offload:
            yield
            return
        mine = [name for name in names if name not in self.woken]
        self.woken.update(mine)
        try:
            self.move(mine, self.device)
            yield
        finally:
            self.move(mine, rest_device())
            self.woken.difference_update(mine)

    def move(self, names: Sequence[str], device: torch.device) -> None:
        """Take frozen parts elsewhere; the names are those of `awake`."""
        for name in names:
            for module in self.modules(name):
                module.to(device)

    def modules(self, name: str) -> list[nn.Module]:
        """The frozen modules behind a name of `awake`."""
        if name == "critic":
            return [self.critic.model] if self.critic else []
        if name == "judge":
            return [self.judge.critic.model] if self.judge else []
        pipe = {n: m for n, m in self.family.pipe.components.items() if isinstance(m, nn.Module)}
        return [m for n, m in pipe.items() if (n == "vae" if name == "vae" else n.startswith("text_encoder"))]


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
        before = under_way.set(part)
        try:
            yield
        finally:
            under_way.reset(before)
        key = f"time/{part}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
