"""What is known against a recipe's base model, said before training starts: `families/_published.py` has the facts."""

from __future__ import annotations

from typing import Any

from npedit.families._published import PublishedCheckpoint, find_published, is_step_distilled
from npedit.families.base import Family
from npedit.recipe.config import FamilyChoice, Recipe


def checkpoint_warnings(recipe: Recipe, family: Family | None = None) -> list[str]:
    """Sentences about the recipe's base model: number types that it is not right in, and a step-distilled teacher.
    With `family`, the opened pipeline's own mark of a distilled model counts too."""
    known, chosen = find_published(recipe.family.weights), recipe.family
    found = _dtype_warnings(known, chosen) if known else []
    pipe_config: Any = family.pipe.config if family is not None else {}
    is_distilled = is_step_distilled(recipe.family.weights, pipe_config)
    if is_distilled and any(getattr(stage.settings, "dmd_weight", 0) for stage in recipe.stages):
        found.append(_distilled_teacher_warning(chosen.weights, known))
    return found


def _dtype_warnings(known: PublishedCheckpoint, chosen: FamilyChoice) -> list[str]:
    instead = f", or take {known.instead}" if known.instead else ""
    found = []
    if known.dtypes and chosen.dtype not in known.dtypes:
        found.append(
            f"expected {' or '.join(known.dtypes)} for {chosen.weights}, which was trained so; got dtype "
            f"{chosen.dtype}. Its pictures are known to be damaged, and training would follow them. Set family.dtype"
            f"{instead}."
        )
    for key in ("text_dtype", "vae_dtype"):
        dtype = getattr(chosen, key) or chosen.dtype
        if known.text_and_vae_dtypes and dtype not in known.text_and_vae_dtypes:
            found.append(
                f"expected {' or '.join(known.text_and_vae_dtypes)} for the text encoder and the VAE of "
                f"{chosen.weights}; got {dtype}. Set family.{key}."
            )
    return found


def _distilled_teacher_warning(weights: str, known: PublishedCheckpoint | None) -> str:
    instead = (
        f" Prefer {known.instead}." if known and known.instead else " Prefer the model that it was distilled from."
    )
    return (
        f"{weights} is distilled to a few steps. It was trained at the few times of its own schedule, so at the other "
        "times that distribution matching draws its velocity may be no usable score. Classifier-free guidance is not "
        "meant for it either: set guidance to 1. No result with such a teacher is known to us."
        f"{instead}"
    )
