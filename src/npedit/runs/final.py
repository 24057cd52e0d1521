"""The folder `final/` of a run: the finished editor as diffusers opens it, with its model card.

A path on this machine is in one place alone: `base` in npedit.json, where the base model is a local folder. `set_base`
replaces it (`npedit export --base`), and `npedit edit --base` overrides it.
"""

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
from npedit.recipe.config import Recipe, find_class
from npedit.runs.checkpoint import has_seen_pairs
from npedit.runs.editor_facts import FACTS_FILE
from npedit.runs.files import read_json_object, write_text

SET_FACTS = "prepare.json"  # facts about a data set, beside its metadata


def write_final(
    run: Path,
    recipe: Recipe,
    net: torch.nn.Module,
    scheduler: Any,
    times: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    trained_in: Path | None = None,
) -> Path:
    """Write `final/`: the editor as diffusers opens it, and `npedit.json` for `Editor.open`.

    `net` is a diffusers model or a `LoraAdapter` of one, `scheduler` a diffusers object; `times` are the few-step
    times for the first of `sizes` (H, W, pixels). `trained_in` is the training's folder, if it is not `run`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder, aside, base = run / "final", run / "final.tmp", Path(recipe.family.weights)
    facts = {
        "format": 1,
        "family": recipe.family.name,
        "base": str(base.resolve()) if base.is_dir() else recipe.family.weights,
        "dtype": recipe.family.dtype,
        "text_dtype": recipe.family.text_dtype,
        "vae_dtype": recipe.family.vae_dtype,
        "isolated_references": recipe.family.isolated_references,
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
        drop_source_paths(aside)
        write_text(aside / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
        write_text(aside / "README.md", model_card(recipe, facts, has_seen_pairs(recipe, trained_in or run)))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(aside, folder)
    return folder


def drop_source_paths(folder: Path) -> None:
    """Delete the path that diffusers notes in each config file: where the model was loaded from."""
    for path in folder.glob("*/*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(found, indent=2) + "\n")


def set_base(folder: Path, base: str) -> None:
    """Write another base model, a Hub id or a folder, into an editor's npedit.json and model card."""
    facts_file, card = folder / FACTS_FILE, folder / "README.md"
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    write_text(facts_file, json.dumps({**facts, "base": base}, indent=2) + "\n")
    if card.is_file():
        old, new = (f"started from `{public_name(name)}`" for name in (str(facts["base"]), base))
        write_text(card, card.read_text(encoding="utf-8").replace(old, new))


def public_name(weights: str) -> str:
    """A Hub id as it is; of a path, the last part alone."""
    is_path = os.path.isabs(weights) or weights.startswith((".", "~")) or os.path.isdir(weights)
    return Path(weights).name if is_path else weights


def model_card(recipe: Recipe, facts: Mapping[str, Any], seen_pairs: bool | None) -> str:
    """A short card: what the editor is, how it was made, how to use it. `seen_pairs` is what `has_seen_pairs` tells."""
    stages = "\n".join(f"- `{s.step}`: {s.updates} updates of {s.batch_size * s.accumulate}" for s in recipe.stages)
    sizes = ", ".join(f"{w}x{h}" for h, w in facts["sizes"])
    how = "No edited image was used, and no critic."
    if recipe.critic:
        how = (
            f"No edited image was used: a vision-language model (`{recipe.critic.name}`, "
            f"`{public_name(recipe.critic.weights)}`) "
            "judged the edits, and\ndistribution matching kept them on the base model's image manifold. The method is "
            "that of NP-Edit (arXiv 2510.14978)."
        )
    unpaired = seen_pairs is False
    if not unpaired and not recipe.is_trained_with_pairs():
        how = _start_text(recipe, seen_pairs)
    if recipe.is_trained_with_pairs():
        how = "It was shown edited images in training: a supervised baseline, not NP-Edit."
    trained = " trained without pairs" if unpaired else " trained on pairs" if seen_pairs else ""
    return f"""---
library_name: npedit
tags: [image-editing{", no-pairs" if unpaired else ""}]
---
# {recipe.name}: an image editor{trained}

A {facts["steps"]}-step editor of the family `{facts["family"]}`, started from `{public_name(facts["base"])}`.
{how}

Training data: `{recipe.data.name}`. Sizes (width x height): {sizes}. Seed: {recipe.seed}.
{_rights_text(recipe)}
{stages}

## Use

    npedit edit --run PATH_OF_THIS_RUN picture.png "paint the circle red" -o out.png

{_weights_text(recipe)} and `scheduler/` are as diffusers wants them (the averaged
weights; the scheduler re-noises with fresh noise, as in training). The
times of the steps, 1 being noise: {", ".join(f"{t:.4f}" for t in facts["times"])}.
"""


def _start_text(recipe: Recipe, seen_pairs: bool | None) -> str:
    start = public_name(recipe.start)
    if seen_pairs:
        return f"It starts from the run `{start}`, which was shown edited images; it was shown none itself."
    return f"It starts from `{start}`. Whether that was shown edited images is not known; it was shown none itself."


def _weights_text(recipe: Recipe) -> str:
    """The file or folder of the weights, and what opens it."""
    if not recipe.lora:
        return "`transformer/`"
    if find_class("families", recipe.family.name).has_wider_input:
        return f"`{LORA_FILE}` (for a net with a wider input than the base's, whose own pipeline refuses it)"
    return f"`{LORA_FILE}` (for `load_lora_weights` of the base's pipeline)"


def _rights_text(recipe: Recipe) -> str:
    lines = rights_lines(read_set_facts(recipe))
    return "\n".join(["", *lines]) if lines else ""


def read_set_facts(recipe: Recipe) -> dict[str, Any]:
    """The facts about the training photos in the prepare.json that `npedit prepare` and `npedit import` write; {} if
    there is none."""
    path = getattr(recipe.data.settings, "path", "")
    try:
        return read_json_object(Path(path).expanduser() / SET_FACTS) if path else {}
    except ValueError:
        return {}


def rights_lines(facts: Mapping[str, Any]) -> list[str]:
    """Licences and sources of the training photos, as a line of Markdown each; [] if prepare.json says nothing."""
    lines = []
    for title, plural, single in (("Licences", "licences", "licence"), ("Sources", "sources", "source")):
        found = facts.get(plural) or facts.get(single)
        counts = [f"{value} ({n} photos)" for value, n in found.items()] if isinstance(found, dict) else [found]
        if found:
            lines.append(f"{title} of the training photos: {', '.join(map(str, counts))}.\n")
    return lines
