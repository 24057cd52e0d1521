"""What all training methods share: the base class `Step`, the frozen `Parts`, and `Timers`.

One file in this folder is one training method, and no such file imports another. The state of a step is its learners
and `extra_state`. All its random numbers come from (seed, update), so a resumed run repeats itself bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from npedit.critics._bits import is_quantised
from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families import _decode
from npedit.families.base import EncodedText, Family
from npedit.nets.device import offload_device
from npedit.nets.learner import Learner
from npedit.nets.lora import LoraAdapter, enable_gradient_checkpointing
from npedit.nets.meta_device import current_part
from npedit.nets.offload import OffloadedModule
from npedit.recipe.config import LoraChoice, MemorySettings
from npedit.recipe.config import Settings as StepSettings

FROZEN_PARTS = ("text", "vae", "critic", "judge")  # text encoders, VAE, and the vision-language models


@dataclass(frozen=True)
class Judge:
    """A critic for evaluation only, never trained against, and the wording of its questions."""

    critic: Critic
    wording: str


@dataclass(frozen=True)
class Parts:
    """The frozen models that a step works with. `critic` is None if no step needs one. `judge` is None if the recipe
    names none; steps must not use it."""

    family: Family
    critic: Critic | None
    wording: str
    device: torch.device
    lora: LoraChoice | None = None
    memory: MemorySettings = MemorySettings()
    prompts: OrderedDict[tuple[str, bool], EncodedText] = field(
        default_factory=OrderedDict
    )  # encoded texts by (text, whether it is a negative prompt), the last used at the end
    latents: OrderedDict[bytes, Tensor] = field(
        default_factory=OrderedDict
    )  # encoded images by `image_digest`, the last used at the end
    judge: Judge | None = None
    names_on_device: set[str] = field(default_factory=set)  # parts in use, by the names of `on_device`
    offloaded: dict[str, list[OffloadedModule]] = field(default_factory=dict)  # by the names of `on_device`
    encoded: dict[Hashable, Any] = field(default_factory=dict)  # what `encode_ahead` has encoded
    on_copy: Callable[[str, int], None] = lambda name, size: None  # called for each part copied to the device: bytes

    def __post_init__(self) -> None:
        _decode.check_tile(self.family.facts, self.memory.decode_tile)
        if self.memory.offload:
            self.unload_modules(FROZEN_PARTS)

    def create_trainable(self, role: str, seed: int) -> nn.Module:
        """A new trainable model that equals the base: a LoRA adapter on the base, or a copy of it. A role
        has one adapter at a time.

        Raises:
            UserError: the recipe wants gradient checkpointing, and the model has none.
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

    @contextmanager
    def encode_ahead(
        self, prompts: Sequence[Sequence[str]], images: Sequence[Tensor], negative_prompts: Sequence[Sequence[str]] = ()
    ) -> Iterator[None]:
        """With `memory.offload`, encode all that one update needs before the `with` block, so that text encoders and
        VAE are copied to the device once. In the block `encode_text`, `encode_negative_text` and `encode_images` return
        these results for equal arguments, and the VAE stays on the device. Otherwise this does nothing."""
        if not self.memory.offload:
            yield
            return
        wanted = dict.fromkeys([*((tuple(p), False) for p in prompts), *((tuple(p), True) for p in negative_prompts)])
        is_text_missing = any((p, is_negative) not in self.prompts for many, is_negative in wanted for p in many)
        try:
            with self.on_device(*(["text"] if is_text_missing else [])):
                found = {key: self._encode_texts(*key) for key in wanted}
            with self.on_device("vae"):
                self.encoded.update(found)
                for batch in images:
                    self.encoded[id(batch)] = self.encode_images(batch)
                yield
        finally:
            self.encoded.clear()

    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """The encoded prompts. Distinct prompts are kept in a cache of `memory.cached_prompts` entries. The encoders
        are frozen, so the prompt alone is the key."""
        return self._encode_texts(prompts, is_negative=False)

    def encode_negative_text(self, prompts: Sequence[str]) -> EncodedText:
        """The encoded negative prompts of classifier-free guidance, in the cache of `encode_text`."""
        return self._encode_texts(prompts, is_negative=True)

    def _encode_texts(self, prompts: Sequence[str], is_negative: bool) -> EncodedText:
        if (key := (tuple(prompts), is_negative)) in self.encoded:
            return self.encoded[key]
        encode = self.family.encode_negative_text if is_negative else self.family.encode_text
        capacity = self.memory.cached_prompts
        if not capacity:
            with self.on_device("text"):
                return encode(prompts)
        here: dict[str, EncodedText] = {}
        for prompt in dict.fromkeys(prompts):
            found = _get_cached(
                self.prompts, capacity, (prompt, is_negative), partial(self._encode_text, encode, prompt)
            )
            here[prompt] = EncodedText(tuple(p.to(self.device) for p in found.parts))
        return EncodedText.cat([here[prompt] for prompt in prompts])

    def _encode_text(self, encode: Callable[[Sequence[str]], EncodedText], prompt: str) -> EncodedText:
        with self.on_device("text"):
            return EncodedText(tuple(p.to(offload_device()) for p in encode([prompt]).parts))

    def encode_images(self, images: Tensor) -> Tensor:
        """The latents of images (b, 3, H, W), or (b, k, c, h, w) of images (b, k, 3, H, W). Distinct images are kept in
        a cache of `memory.cached_latents` entries. The VAE is frozen and deterministic, so the pixels (values, type and
        shape, after cropping and scaling) are the key, not the item's id."""
        if id(images) in self.encoded:
            return self.encoded[id(images)]
        if images.ndim == 5:
            return self.encode_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        capacity = self.memory.cached_latents
        if not capacity:
            with self.on_device("vae"):
                return self.family.encode(images)
        keys, here = [image_digest(image) for image in images], {}
        for key, image in dict(zip(keys, images)).items():
            here[key] = _get_cached(self.latents, capacity, key, partial(self._encode_image, image)).to(self.device)
        return torch.cat([here[key] for key in keys])

    def encode_extra(self, batch: Batch) -> Tensor | None:
        """The latents (b, k, c, h, w) of a batch's further references; None if there are none."""
        return None if batch.extra_references is None else self.encode_images(batch.extra_references)

    def _encode_image(self, image: Tensor) -> Tensor:
        with self.on_device("vae"):
            return self.family.encode(image[None]).to(offload_device())

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The images of latents, decoded as `memory.decoder_checkpointing` and `memory.decode_tile` say. Decode, and
        finish the backward pass, inside `on_device("vae")`."""
        return _decode.decode_latents(self.family, latents, self.memory.decode_tile, self.memory.decoder_checkpointing)

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Inside the `with` block the named parts (of `FROZEN_PARTS`) are on the device. With
        `memory.offload` they are in CPU memory outside all such blocks, so a backward pass through them must end
        inside the block."""
        if not self.memory.offload:
            yield
            return
        missing = [name for name in names if name not in self.names_on_device]
        self.names_on_device.update(missing)
        try:
            self.load_modules(missing)
            yield
        finally:
            self.unload_modules(missing)
            self.names_on_device.difference_update(missing)

    def load_modules(self, names: Sequence[str]) -> None:
        """Copy parts to the device; the names are those of `on_device`."""
        for name in names:
            for module in self.offloaded[name]:
                self.on_copy(name, module.load())

    def unload_modules(self, names: Sequence[str]) -> None:
        """Free the device's copies of parts; the names are those of `on_device`."""
        for name in names:
            if name not in self.offloaded:
                self.offloaded[name] = offload_modules(self.frozen_modules(name), self.device)
            for module in self.offloaded[name]:
                module.unload()

    def frozen_modules(self, name: str) -> list[nn.Module]:
        """The frozen modules that a name of `on_device` stands for."""
        if name == "critic":
            return critic_modules(self.critic)
        if name == "judge":
            return critic_modules(self.judge.critic if self.judge else None)
        return family_modules(self.family, name)


def family_modules(family: Family, name: str) -> list[nn.Module]:
    """The frozen modules of a family that "text" or "vae" stands for."""
    return family.text_encoders() if name == "text" else [family.pipe.vae]


def critic_modules(critic: Critic | None) -> list[nn.Module]:
    """The modules of a critic, or of an ensemble's members, that can be moved to another device: those that are not
    quantised."""
    members = getattr(critic, "members", [critic]) if critic else []
    return [m.model for m in members if not is_quantised(m.model)]


def offload_modules(modules: Sequence[nn.Module], device: torch.device) -> list[OffloadedModule]:
    """The modules, moved from the device to host memory."""
    moved = []
    for module in modules:
        moved.append(OffloadedModule(module, device))
        moved[-1].unload()
    return moved


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _get_cached(cache: OrderedDict[Key, Value], capacity: int, key: Key, make: Callable[[], Value]) -> Value:
    """The cached value of a key, made if it is missing. Beyond `capacity` entries the least recently used goes."""
    found = cache.pop(key) if key in cache else make()
    cache[key] = found
    while len(cache) > capacity:
        cache.popitem(last=False)
    return found


def image_digest(image: Tensor) -> bytes:
    """A digest of a tensor's values, type and shape."""
    plain = image.detach().to(offload_device()).contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.digest()


class ItemErrors(NamedTuple):
    """How wrong the critic finds each item of a batch: the mean of 1 - p(wanted answer) over the item's questions."""

    ids: tuple[str, ...]
    edit_types: tuple[str, ...]
    errors: list[float]


class Step(ABC):
    """One training method. `Settings` is the class of its settings in a recipe."""

    Settings: type[StepSettings]
    settings: Any  # an instance of `Settings`
    learners: dict[str, Learner]
    reports_item_errors: ClassVar[bool] = False  # whether `item_errors` is filled if the step has a critic
    most_references: ClassVar[int | None] = None  # of an example, the photo included; None: as many as the family takes
    item_errors: Sequence[ItemErrors] = ()  # of the last update, by batch

    @abstractmethod
    def __init__(self, settings: Any, parts: Parts, student: nn.Module, updates: int, seed: int): ...

    @classmethod
    def batches_per_update(cls, settings: Any) -> int:
        """How many batches one update needs, before gradient accumulation."""
        return 1

    @classmethod
    def requirements(cls, settings: Any) -> frozenset[str]:
        """What the step needs: any of "critic", "target_caption", "source_caption", "keep_mask", "edited"."""
        return frozenset()

    @classmethod
    def check_parts(cls, settings: Any, parts: Parts) -> None:
        """Refuse frozen models that the step cannot work with. Training calls this for all stages before the first
        update, so that no stage fails after those before it have been trained.

        Raises:
            UserError: the message begins with the setting's name.
        """
        return  # any will do

    @abstractmethod
    def step(self, batches: Sequence[Batch], update: int) -> dict[str, float]:
        """One update on `accumulate * batches_per_update` batches; returns what to log."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors to save in a checkpoint in addition to the learners' state."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load what `extra_state` returned."""
        if state:
            raise ValueError(f"expected no state in addition to the learners'; got {', '.join(state)}")

    def load_extra_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load what `extra_state` returned, from tensors that are read one by one. A step with large ones overrides
        this method, and copies each before it asks for the next."""
        self.load_extra_state(dict(tensors))


PART_NOTE = "part of the update: "  # the note that `Timers` adds to an exception, before the part's name


class Timers:
    """Seconds spent in named parts of a step. An exception from a part gets a note that names the part. `around(part)`
    is a context manager around every part, for measurements such as those of `npedit rehearse`."""

    around: ClassVar[Callable[[str], AbstractContextManager[object]]] = nullcontext

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `time/<part>`."""
        start = time.perf_counter()
        before = current_part.set(part)
        try:
            with Timers.around(part):
                yield
        except Exception as error:
            error.add_note(PART_NOTE + part)
            raise
        finally:
            current_part.reset(before)
        key = f"time/{part}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
