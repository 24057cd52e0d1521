"""What every way to train shares. One file in this folder is one way; none imports another.

A step owns its learners and nothing else that changes: all its randomness comes from (seed, update), so a resumed run
repeats itself bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from npedit.critics._bits import is_quantised
from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families import _decode
from npedit.families.base import Family, Text
from npedit.nets.device import offload_device
from npedit.nets.learner import Learner
from npedit.nets.lora import LoraAdapter, enable_gradient_checkpointing
from npedit.nets.meta_device import current_part
from npedit.recipe.config import LoraChoice, MemorySettings, Settings


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
    latents: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict)  # likewise, by what was encoded
    judge: Judge | None = None
    names_on_device: set[str] = field(default_factory=set)  # frozen parts in use, by the names that `awake` takes

    def __post_init__(self) -> None:
        _decode.check_tile(self.family.facts, self.memory.decode_tile)
        with self.on_device("text", "vae", "critic", "judge"):
            pass  # with `memory.offload` they rest from here on

    def create_trainable(self, role: str, seed: int) -> nn.Module:
        """A trainable net that starts as the base: an adapter of it, or a copy. With LoRA a role has one at a time.

        Raises:
            UserError: gradient checkpointing is asked for, and the model does not offer it.
        """
        if self.lora is None:
            net = self.family.trainable_net().to(self.device)
        else:
            net = LoraAdapter.create(self.family.lora_base(), role, self.lora.rank, self.lora.alpha, seed)
        if self.memory.gradient_checkpointing:
            try:
                enable_gradient_checkpointing(net)
            except ValueError as error:
                raise UserError(f"memory.gradient_checkpointing: {error}; set it to false") from None
        return net

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Encode prompts, each distinct one once while the cache (`memory.cached_prompts`) has room for it. Encoders
        are frozen, so the prompt alone is the key."""
        room = self.memory.cached_prompts
        if not room:
            with self.on_device("text"):
                return self.family.encode_text(prompts)
        here: dict[str, Text] = {}
        for prompt in dict.fromkeys(prompts):
            found = _get_cached(self.prompts, room, prompt, partial(self._encode_prompt, prompt))
            here[prompt] = Text(tuple(p.to(self.device) for p in found.parts))
        return Text.cat([here[prompt] for prompt in prompts])

    def _encode_prompt(self, prompt: str) -> Text:
        with self.on_device("text"):
            return Text(tuple(p.to(offload_device()) for p in self.family.encode_text([prompt]).parts))

    def encode_images(self, images: Tensor) -> Tensor:
        """The family's `encode`, of each distinct picture once while the cache (`memory.cached_latents`) has room for
        it. The VAE is frozen and draws nothing, so the pixels that it is given are the key: their values, type and
        size, after cropping and scaling, and not the item's id."""
        room = self.memory.cached_latents
        if not room:
            with self.on_device("vae"):
                return self.family.encode(images)
        keys, here = [image_digest(image) for image in images], {}
        for key, image in dict(zip(keys, images)).items():
            here[key] = _get_cached(self.latents, room, key, partial(self._encode_image, image)).to(self.device)
        return torch.cat([here[key] for key in keys])

    def _encode_image(self, image: Tensor) -> Tensor:
        with self.on_device("vae"):
            return self.family.encode(image[None]).to(offload_device())

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The family's `decode`, as `memory.decoder_checkpointing` and `memory.decode_tile` say. Call it, and end its
        backward pass, inside `awake("vae")`."""
        return _decode.decode_latents(self.family, latents, self.memory.decode_tile, self.memory.decoder_checkpointing)

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Use the frozen parts of these names ("text", "vae", "critic", "judge") inside the block, where they are on
        the device. With `memory.offload` they rest in the CPU's memory outside of all such blocks; a backward pass
        through them must end inside."""
        if not self.memory.offload:
            yield
            return
        mine = [name for name in names if name not in self.names_on_device]
        self.names_on_device.update(mine)
        try:
            self.move_modules(mine, self.device)
            yield
        finally:
            self.move_modules(mine, offload_device())
            self.names_on_device.difference_update(mine)

    def move_modules(self, names: Sequence[str], device: torch.device) -> None:
        """Take frozen parts elsewhere; the names are those of `awake`."""
        for name in names:
            for module in self.frozen_modules(name):
                module.to(device)

    def frozen_modules(self, name: str) -> list[nn.Module]:
        """The frozen modules behind a name of `awake`."""
        if name in ("critic", "judge"):
            critic = self.critic if name == "critic" else self.judge and self.judge.critic
            members = getattr(critic, "members", [critic]) if critic else []
            return [m.model for m in members if not is_quantised(m.model)]  # which cannot be moved
        pipe = {n: m for n, m in self.family.pipe.components.items() if isinstance(m, nn.Module)}
        return [m for n, m in pipe.items() if (n == "vae" if name == "vae" else n.startswith("text_encoder"))]


Key, Value = TypeVar("Key", bound=Hashable), TypeVar("Value")


def _get_cached(cache: OrderedDict[Key, Value], room: int, key: Key, make: Callable[[], Value]) -> Value:
    """What is kept under a key, made if it is not there; of more than `room`, the one not used for longest goes."""
    found = cache.pop(key) if key in cache else make()
    cache[key] = found
    while len(cache) > room:
        cache.popitem(last=False)
    return found


def image_digest(image: Tensor) -> bytes:
    """A digest of a tensor's values, type and shape."""
    plain = image.detach().to(offload_device()).contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.view(torch.uint8).numpy())
    return digest.digest()


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


class Timers:
    """Seconds spent in named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the block to `time/<part>`."""
        start = time.perf_counter()
        before = current_part.set(part)
        try:
            yield
        finally:
            current_part.reset(before)
        key = f"time/{part}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
