"""Models of real width with random weights, written to disk as folders that the ordinary loading code opens.

The configs are those of the recipe's own models: copies of the published configs, or a local folder. Tokenizers and
chat templates are stand-ins: those of the family's and the critic's `tiny`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from npedit.critics._without_weights import critic_without_weights
from npedit.errors import UserError, explain_write_errors
from npedit.families._without_weights import family_without_weights
from npedit.nets.device import CPU
from npedit.recipe.config import EMBEDDED, CriticChoice, FamilyChoice, Recipe, find_class, torch_dtype
from npedit.training.models_without_weights import config_folder

DEPTH_KEYS = frozenset(
    {
        "num_layers",
        "num_single_layers",
        "num_hidden_layers",
        "n_layers",
        "n_refiner_layers",
        "num_layerwise_text_blocks",
    }
)  # how many blocks a model has, in the configs of diffusers and transformers
LAYER_LISTS = frozenset({"layer_types"})  # one entry a block


def write_random_models(recipe: Recipe, folder: Path, layers: int | None) -> dict[str, str]:
    """Write the recipe's models with random weights below `folder`; returns recipe key -> the folder written.

    `layers` is the largest number of blocks in each denoiser, text encoder and critic; None keeps the full depth. The
    embedded toy models keep their own weights and are not written. A folder that is complete is not written again.

    Raises:
        UserError: a model's configs are not at hand, the recipe has an ensemble, or the disk is full.
    """
    written = {}
    for part, chosen in (("family", recipe.family), ("critic", recipe.critic), ("judge", recipe.judge)):
        if chosen is None or chosen.weights == EMBEDDED:
            continue
        if chosen.name == "ensemble":
            raise UserError(
                f"{part}.name: expected a single critic; got an ensemble; rehearse its largest member "
                f"({part}.name=... {part}.weights=...)"
            )
        written[f"{part}.weights"] = str(folder / part)
        if not (folder / part).is_dir():
            _write_model(part, chosen, folder / part, layers)
    return written


def _write_model(part: str, chosen: FamilyChoice | CriticChoice, folder: Path, layers: int | None) -> None:
    aside, configs = folder.with_name(f"{part}.tmp"), folder.with_name(f"{part}.configs")
    for old in (aside, configs):
        shutil.rmtree(old, ignore_errors=True)
    with explain_write_errors(folder):
        _write_shallow_configs(config_folder(part, chosen.weights, chosen.folder), configs, layers)
        torch.manual_seed(0)
        aside.mkdir(parents=True)
        if isinstance(chosen, FamilyChoice):
            kind = find_class("families", chosen.name)
            family_without_weights(kind, configs, chosen.dtypes(), CPU).pipe.save_pretrained(aside)
        else:
            kind = find_class("critics", chosen.name)
            critic: Any = critic_without_weights(kind, configs, torch_dtype(chosen.dtype), chosen.resolution, CPU)
            critic.save(aside)
        aside.rename(folder)
        shutil.rmtree(configs)


def _write_shallow_configs(source: Path, folder: Path, layers: int | None) -> None:
    """Copy a model's JSON files, with at most `layers` blocks in each model."""
    for path in source.rglob("*.json"):
        if path.name.endswith(".index.json"):
            continue
        copied = folder / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json" and path.parent.name != "vae" and layers:
            found = limit_depth(found, layers)
        copied.write_text(json.dumps(found))


def limit_depth(config: Any, layers: int) -> Any:
    """The config with at most `layers` blocks in each model that it describes."""
    if not isinstance(config, Mapping):
        return config
    out = {}
    for key, value in config.items():
        if key in DEPTH_KEYS and isinstance(value, int):
            value = min(value, layers)
        elif key in LAYER_LISTS and isinstance(value, list):
            value = value[:layers]
        out[key] = limit_depth(value, layers)
    return out
