"""The folder `final/` of a run: the finished editor as diffusers opens it, with its model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from npedit.errors import explain_write_errors
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import Recipe
from npedit.runs.checkpoint import is_trained_without_pairs
from npedit.runs.files import write_text


def write_final(
    run: Path,
    recipe: Recipe,
    net: torch.nn.Module,
    scheduler: Any,
    times: Sequence[float],
    sizes: Sequence[tuple[int, int]],
) -> Path:
    """Write `final/`: the editor as diffusers opens it, and `npedit.json` for `Editor.open`.

    `net` is a diffusers model or a `LoraAdapter` of one, `scheduler` a diffusers object; `times` are the few-step
    times for the first of `sizes` (H, W, pixels).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder, aside, base = run / "final", run / "final.tmp", Path(recipe.family.weights)
    facts = {
        "format": 1,
        "family": recipe.family.name,
        "base": str(base.resolve()) if base.is_dir() else recipe.family.weights,
        "dtype": recipe.family.dtype,
        "steps": len(times),
        "tile": recipe.memory.decode_tile,
        "times": [round(float(t), 6) for t in times],
        "sizes": [list(s) for s in sizes],
        "recipe": recipe.name,
    }
    shutil.rmtree(aside, ignore_errors=True)
    with explain_write_errors(folder):
        aside.mkdir()
        if isinstance(net, LoraAdapter):
            net.save(aside)
        else:
            diffusers_net: Any = net
            diffusers_net.save_pretrained(aside / "transformer")
        scheduler.save_pretrained(aside / "scheduler")
        write_text(aside / "npedit.json", json.dumps(facts, indent=2) + "\n")
        write_text(aside / "README.md", model_card(recipe, facts))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(aside, folder)
    return folder


def model_card(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """A short card: what the editor is, how it was made, how to use it."""
    stages = "\n".join(f"- `{s.step}`: {s.updates} updates of {s.batch_size * s.accumulate}" for s in recipe.stages)
    sizes = ", ".join(f"{w}x{h}" for h, w in facts["sizes"])
    how = "No edited image was used, and no critic."
    if recipe.critic:
        how = (
            f"No edited image was used: a vision-language model (`{recipe.critic.name}`, `{recipe.critic.weights}`) "
            "judged the edits, and\ndistribution matching kept them on the base model's image manifold. The method is "
            "that of NP-Edit (arXiv 2510.14978)."
        )
    unpaired = is_trained_without_pairs(recipe)
    if not unpaired and not recipe.uses_pairs():
        how = f"It starts from the run `{recipe.start}`, which was shown edited images; it was shown none itself."
    if recipe.uses_pairs():
        how = "It was shown edited images in training: a supervised baseline, not NP-Edit."
    weights = f"`{LORA_FILE}` (for `load_lora_weights` of the base's pipeline)" if recipe.lora else "`transformer/`"
    return f"""---
library_name: npedit
tags: [image-editing{", no-pairs" if unpaired else ""}]
---
# {recipe.name}: an image editor trained {"without" if unpaired else "on"} pairs

A {facts["steps"]}-step editor of the family `{facts["family"]}`, started from `{facts["base"]}`.
{how}

Training data: `{recipe.data.name}`. Sizes (width x height): {sizes}. Seed: {recipe.seed}.

{stages}

## Use

    npedit edit --run PATH_OF_THIS_RUN picture.png "paint the circle red" -o out.png

{weights} and `scheduler/` are as diffusers wants them (the averaged weights; the scheduler re-noises with fresh noise,
as in training). The times of the steps, 1 being noise: {", ".join(f"{t:.4f}" for t in facts["times"])}.
"""
