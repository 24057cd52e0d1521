"""A recipe's models without weights, on the meta device, from config files: those of a local folder, or the package's
copies of the published ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npedit.critics._without_weights import critic_without_weights
from npedit.critics.base import Critic
from npedit.errors import UserError
from npedit.families._without_weights import family_without_weights
from npedit.families.base import Family
from npedit.recipe.config import EMBEDDED, CriticChoice, Recipe, find_class, torch_dtype

PUBLISHED = Path(__file__).parents[1] / "published"


def open_without_weights(recipe: Recipe) -> tuple[Family, Critic | None]:
    """The recipe's family, and its critic if it names one, without weights.

    Raises:
        UserError: configs are missing or belong to another family or critic; an ensemble.
    """
    return open_family(recipe), open_critic("critic", recipe.critic) if recipe.critic else None


def open_family(recipe: Recipe) -> Family:
    """The recipe's family without weights. Errors as in `open_without_weights`."""
    chosen = recipe.family
    with _explain_config_errors():
        kind, folder = find_class("families", chosen.name), config_folder("family", chosen.weights, chosen.folder)
        family = family_without_weights(kind, folder, chosen.dtypes())
        if chosen.isolated_references:
            family.isolate_references()
    return family


def open_critic(part: str, chosen: CriticChoice) -> Critic:
    """A critic or a judge (`part` is its key in the recipe) without weights. Errors as in `open_without_weights`."""
    if chosen.name == "ensemble":
        raise UserError(f"{part}.name: expected a single critic; got an ensemble; estimate its largest member")
    with _explain_config_errors():
        kind, folder = find_class("critics", chosen.name), config_folder(part, chosen.weights, chosen.folder)
        return critic_without_weights(kind, folder, torch_dtype(chosen.dtype), chosen.resolution)


@contextmanager
def _explain_config_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"expected the recipe's models by their configs; got: {error}; correct the recipe") from error


def config_folder(part: str, weights: str, folder: Any) -> Path:
    """The folder with the configs of these weights: a local folder, or the package's copy of a published model's
    configs.

    Raises:
        UserError: neither exists.
    """
    if weights == EMBEDDED or Path(weights).is_dir():
        return Path(folder())
    packaged = PUBLISHED / weights.replace("/", "--")
    if packaged.is_dir():
        return packaged
    known = ", ".join(sorted(p.name.replace("--", "/") for p in PUBLISHED.iterdir() if p.is_dir()))
    raise UserError(
        f"{part}.weights: expected a local folder, or one of these, whose configs are in the package: {known}; got "
        f"{weights!r}; give a folder with that model's config files, which needs no weights: hf download ID "
        "--include '*.json' '*.txt' '*.model' --local-dir FOLDER"
    )
