"""Tiny editors on disk as training leaves them, and their exports as diffusers opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from npedit import flow
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import find_class
from tests.support.parts import nudge

SIZES = ((32, 32), (32, 64))  # (height, width)
STEPS = 3


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of random pixels; `size` is (height, width)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_editor(
    kind: str, folder: Path, lora: bool, seed: int = 1, base_name: str = "base", isolated: bool = False
) -> Path:
    """A tiny editor with random weights as training leaves it, and its base model beside it."""
    family = find_class("families", kind).tiny(seed)
    family.pipe.save_pretrained(folder / base_name)
    final = folder / "run" / "final"
    final.mkdir(parents=True)
    if lora:
        net = LoraAdapter.create(family.lora_base(), "student", 2, 6.0, 0)
        nudge(net, by=0.05)
        net.save(final)
    else:
        net = family.trainable_net()
        nudge(net, by=0.05)
        net.save_pretrained(final / "transformer")
    shift = family.noise_shift(*SIZES[0])
    family.few_step_scheduler(shift).save_pretrained(final / "scheduler")
    times = flow.few_step_times(STEPS, shift).tolist()
    facts = {"format": 1, "family": kind, "base": str(folder / base_name), "steps": STEPS, "sizes": SIZES}
    facts |= {"isolated_references": True} if isolated else {}
    (final / "npedit.json").write_text(json.dumps({**facts, "times": times}))
    return final


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The pipeline of an export as diffusers opens it."""
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True, torch_dtype=dtype
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(n) for n in numbers]
