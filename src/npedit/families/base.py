"""The interface of a family of text-to-image flow models. One file in this folder is one family; none imports another.

A family translates between `flow.py`'s convention and its own model (sign, scale, packing, guidance input, ids of the
reference's tokens). The denoiser is an argument of `velocity`, so student, teacher and fake score are three nets of one
family, and text encoders and VAE exist once.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from npedit.errors import UserError
from npedit.families._isolated import ReferenceKVCache
from npedit.families._prompts import text_after_tokens
from npedit.families._shared import check_pipeline_folder, schedule_shift

References = Sequence[Tensor] | ReferenceKVCache  # latents (b, c, h, w), or their KV cache
Dtypes = torch.dtype | dict[str, torch.dtype]  # one for all parts, or by part as diffusers takes it, with a "default"


@dataclass(frozen=True)
class ModelProperties:
    """Properties of a base model that the method needs."""

    channels: int  # of a latent
    stride: int  # pixels per latent pixel
    multiple: int  # widths and heights in pixels must be multiples of it
    guidance: (
        float  # the guidance that its own pipeline uses by default: the scale that the net takes, or of two passes
    )
    blocks: tuple[str, ...]  # names of the lists of blocks to shard and to checkpoint


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts. Only `velocity` of the family that made it looks inside; each part has the batch first."""

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def select(self, index: Sequence[int] | Tensor) -> EncodedText:
        """The prompts at these positions."""
        index = torch.as_tensor(index, device=self.parts[0].device)
        return EncodedText(tuple(p[index] for p in self.parts))

    @staticmethod
    def cat(texts: Sequence[EncodedText]) -> EncodedText:
        """Several batches of prompts as one."""
        return EncodedText(tuple(torch.cat(p) for p in zip(*(t.parts for t in texts))))


def require_latents(references: References) -> Sequence[Tensor]:
    """The references, for a family that takes nothing but their latents.

    Raises:
        TypeError: they are those of a family that isolates them.
    """
    if isinstance(references, ReferenceKVCache):
        raise TypeError("expected the latents of references; got their KV cache, which this family does not take")
    return references


class Family(ABC):
    """A text-to-image pipeline as the method uses it. `load` and `tiny` build it; all its modules are frozen and in
    eval mode."""

    pipeline: ClassVar[Any]  # the class of diffusers that opens a folder of this family
    denoiser: ClassVar[Any]  # the class of its part "transformer"
    part_names: ClassVar[tuple[str, ...]]  # the parts that a folder must have
    optional_part_names: ClassVar[tuple[str, ...]] = ()  # parts that the folder's index may declare absent

    has_wider_input: ClassVar[bool] = False  # whether `lora_base` has more input channels than the base

    most_references: int = 16  # of one edit. Each adds as many tokens as the picture; more has not been tried
    can_isolate_references: bool = False  # whether the family defines `_reference_pass`
    isolates_references: bool = False  # set by `isolate_references`

    facts: ModelProperties
    device: torch.device
    pipe: DiffusionPipeline  # all parts, as diffusers opens them
    base: nn.Module  # the text-to-image model's own denoiser, frozen: the teacher

    @abstractmethod
    def __init__(self, pipe: Any, device: torch.device) -> None: ...

    @classmethod
    def load(cls, weights: str | Path, dtype: Dtypes, device: torch.device, net: nn.Module | None = None) -> Self:
        """Open a Hub id or a local diffusers folder. `dtype` may be a dict with the keys "transformer", "vae" and
        "default" (the text encoders). With `net`, a denoiser of this family, `net` is used as the base, and the
        folder's own denoiser is neither needed nor read.

        Raises:
            FileNotFoundError: a part is missing; the message names it.
            ValueError: the folder holds another family's pipeline.
        """
        required = [name for name in cls.part_names if name != "transformer" or net is None]
        name = cls.__module__.rsplit(".", 1)[-1]
        given: dict[str, Any] = dict(
            check_pipeline_folder(weights, name, cls.pipeline.__name__, required, cls.optional_part_names)
        )
        if net is not None:
            given["transformer"] = net
        return cls(cls.pipeline.from_pretrained(weights, dtype=dtype, **given), device)

    @classmethod
    def load_net(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A denoiser that was saved in a diffusers folder (`save_pretrained`)."""
        return cls.denoiser.from_pretrained(folder, dtype=dtype).to(device)

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int) -> Self:
        """The same real classes at toy size with random weights, for tests."""

    def text_encoders(self) -> list[nn.Module]:
        """The text encoders of the pipeline."""
        parts = self.pipe.components.items()
        return [m for name, m in parts if name.startswith("text_encoder") and isinstance(m, nn.Module)]

    def trainable_net(self) -> nn.Module:
        """A fresh, trainable copy of the base model's denoiser in its loaded dtype."""
        return copy.deepcopy(self.base).requires_grad_(True).train()

    def lora_base(self) -> nn.Module:
        """The frozen net that LoRA adapters are added to: the base itself. A family whose `trainable_net` has more
        input channels than the base returns one such net, frozen, and the same object at every call."""
        return self.base

    def base_as_editor(self) -> nn.Module:
        """The base itself, able to take references, for loading a trained editor's weights into it. It is no teacher
        afterwards."""
        return self.base

    def open_net(self, folder: Path) -> nn.Module:
        """A denoiser that was saved in a diffusers folder (`save_pretrained`), in the base's number type."""
        return self.load_net(folder, next(self.base.parameters()).dtype, self.device)

    def noise_shift(self, height: int, width: int) -> float:
        """The noise shift of the base model's schedule for images of this size in pixels (see `flow.shift_times`): the
        scheduler's fixed shift, or exp(mu) of its resolution-dependent one."""
        tokens = (height // self.facts.multiple) * (width // self.facts.multiple)
        return schedule_shift(self.pipe.scheduler.config, tokens)

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts, as the family's own pipeline does. No gradient."""

    def encode_negative_text(self, prompts: Sequence[str]) -> EncodedText:
        """Encode negative prompts for classifier-free guidance, as the family's own pipeline does. No gradient. Most
        pipelines encode them as they encode prompts."""
        return self.encode_text(prompts)

    @abstractmethod
    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """(the tokenizer of the text encoder that takes the longest prompts, how many tokens of a prompt it takes).
        Tokens of a template and of marks around the prompt are not counted."""

    def truncated_part(self, texts: Sequence[str]) -> list[str]:
        """For each text, the end that `encode_text` does not read because the text is too long; "" if it reads all."""
        tokenizer, limit = self.prompt_tokenizer_and_limit()
        return [text_after_tokens(tokenizer, limit, text) for text in texts]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1] -> normalised latents (b, c, h, w) in float32, the posterior's mean. No
        gradient."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) -> images (b, 3, H, W), about [0, 1], NOT clamped. Gradient flows to the latents."""

    def isolate_references(self) -> None:
        """From now on the references' tokens attend to themselves alone and are modulated at time 0, in all nets of
        this family (`_isolated.py`). A net must be used as it was trained.

        Raises:
            UserError: this family cannot do that.
        """
        if not self.can_isolate_references:
            raise UserError(
                "family.isolated_references: expected false with this model, whose references are part of every "
                "call; got true; set it to false, or choose flux, krea2, qwen_image or z_image"
            )
        self.isolates_references = True

    def prepare_references(self, net: nn.Module, references: References, text: EncodedText) -> References:
        """What `velocity` takes as references at every time, with this net and these texts: the given references, or
        with `isolates_references` their KV cache, from one pass of the net over them. Gradient flows to the net."""
        if not self.isolates_references or isinstance(references, ReferenceKVCache) or not references:
            return references
        return self._reference_pass(net, references, text)

    def _reference_pass(self, net: nn.Module, references: Sequence[Tensor], text: EncodedText) -> ReferenceKVCache:
        """The KV cache of one pass of the net over the references. Only a family with `can_isolate_references` has
        it."""
        raise NotImplementedError

    @abstractmethod
    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v at (x, t): x (b, c, h, w), t (b,) in [0, 1]; references are latents (b, c, h', w'), or what
        `prepare_references` returned for this net. Gradient flows to all."""

    def few_step_scheduler(self, shift: float) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler to save with a few-step editor: flow matching's Euler with a fixed shift and fresh noise at
        each step, which the pipelines of all families take. The DPM solver that most Sana folders hold has no fresh
        noise."""
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False, stochastic_sampling=True)
