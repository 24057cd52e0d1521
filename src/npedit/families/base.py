"""What a family of text-to-image flow models must offer. One file in this folder is one family; none imports another.

A family translates between `flow.py`'s convention and its own model (sign, scale, packing, guidance input, ids of the
reference's tokens). The denoiser is an argument of `velocity`, so student, teacher and fake score are three nets of ONE
family, and text encoders and VAE exist once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from npedit.families._prompts import text_after


@dataclass(frozen=True)
class Facts:
    """What the method must know of a base model."""

    channels: int  # of a latent
    stride: int  # pixels per latent pixel
    multiple: int  # widths and heights in pixels must be multiples of it
    guidance: float  # the guidance that its own pipeline uses by default
    blocks: tuple[str, ...]  # names of the lists of blocks to shard and to checkpoint


@dataclass(frozen=True)
class Text:
    """Encoded prompts. Only `velocity` of the family that made it looks inside; each part has the batch first."""

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def select(self, index: Sequence[int] | Tensor) -> Text:
        """The prompts at these positions."""
        index = torch.as_tensor(index, device=self.parts[0].device)
        return Text(tuple(p[index] for p in self.parts))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """Several batches of prompts as one."""
        return Text(tuple(torch.cat(p) for p in zip(*(t.parts for t in texts))))


class Family(ABC):
    """See the module's head. `load` and `tiny` build it; all its own modules are frozen and in eval mode."""

    facts: Facts
    device: torch.device
    pipe: DiffusionPipeline  # all parts, as diffusers opens them
    base: nn.Module  # the text-to-image model's own denoiser, frozen: the teacher

    @classmethod
    @abstractmethod
    def load(cls, weights: str | Path, dtype: torch.dtype, device: torch.device) -> Self:
        """Open a Hub id or a local diffusers folder.

        Raises:
            FileNotFoundError: a part is missing; the message names it.
            ValueError: the folder holds another family's pipeline.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int) -> Self:
        """The same real classes at toy size with random weights, for tests."""

    @abstractmethod
    def trainable_net(self) -> nn.Module:
        """A fresh, trainable copy of the base model's denoiser in its loaded dtype."""

    def lora_base(self) -> nn.Module:
        """The frozen net that adapters are laid on: the base itself. A family whose `net` is wider than its base gives
        one such net, frozen, the same at every call."""
        return self.base

    @abstractmethod
    def open_net(self, folder: Path) -> nn.Module:
        """A denoiser that was saved in a diffusers folder (`save_pretrained`)."""

    @abstractmethod
    def shift(self, height: int, width: int) -> float:
        """The noise shift of the base model's schedule for images of this size in pixels (see `flow.shift_times`)."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Encode prompts, as the family's own pipeline does. No gradient."""

    def encode_negative_text(self, prompts: Sequence[str]) -> Text:
        """Encode negative prompts for classifier-free guidance, as the family's own pipeline does. No gradient. Most
        pipelines encode them as they encode prompts."""
        return self.encode_text(prompts)

    @abstractmethod
    def text_window(self) -> tuple[PreTrainedTokenizerBase, int]:
        """(the tokenizer of the text encoder that takes the longest prompts, how many tokens of a prompt it takes).
        Tokens of a template and of marks around the prompt are not counted."""

    def truncated_part(self, texts: Sequence[str]) -> list[str]:
        """For each text, the end that `encode_text` does not read because the text is too long; "" if it reads all."""
        tokenizer, limit = self.text_window()
        return [text_after(tokenizer, limit, text) for text in texts]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1] -> normalised latents (b, c, h, w) in float32, the posterior's mean. No
        gradient."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) -> images (b, 3, H, W), about [0, 1], NOT clamped. Gradient flows to the latents."""

    @abstractmethod
    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: Text, references: Sequence[Tensor] = ()) -> Tensor:
        """v at (x, t): x (b, c, h, w), t (b,) in [0, 1], references are latents (b, c, h', w'). Gradient flows to
        all."""

    @abstractmethod
    def few_step_scheduler(self, shift: float) -> SchedulerMixin:
        """The scheduler to save with a few-step editor: the class of the family's pipeline, with a fixed shift."""
