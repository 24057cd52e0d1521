"""The embedded critic, trained further with other lessons: what `scene_critic.py` and `rubric_critic.py` share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.recipe.config import embedded_weights
from npedit.toy_models.fit import fit
from npedit.toy_models.mistakes import degrade

Loss = tuple[Tensor, dict[str, float]]  # and what to show


def load_critic(folder: Path) -> LlavaOnevision:
    """The critic in a folder, in float32 on the CPU."""
    return LlavaOnevision.load(folder, torch.float32, torch.device("cpu"))


def load_vae() -> AutoencoderKL:
    """The embedded VAE, frozen."""
    return AutoencoderKL.from_pretrained(embedded_weights("base") / "vae").requires_grad_(False)


def train_on(
    name: str,
    critic: LlavaOnevision,
    heads: nn.Module,
    sample: Callable[[random.Random], tuple[Tensor, Any]],
    lesson_loss: Callable[[Tensor, Any], Loss],
    folder: Path,
    steps: int,
    seed: int,
) -> LlavaOnevision:
    """The critic, trained on for `steps` batches and frozen again.

    `sample` returns images (n, 3, H, W) and the lessons about them. `lesson_loss` takes the images with the damage that
    an editor's pictures have, and the lessons. `heads` are trained with the critic and dropped. `folder` keeps the
    state of an interrupted training.
    """
    vae, model = load_vae(), critic.model.requires_grad_(True)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> Loss:
        images, lessons = sample(rng)
        return lesson_loss(degrade(images, vae, rng, generator), lessons)

    trained = nn.ModuleDict({"model": model, "heads": heads})
    fit(name, trained, loss, folder, steps, 8e-4, betas=(0.9, 0.98), weight_decay=0.01, ema=0.99, seed=seed)
    model.requires_grad_(False)
    return critic
