"""How far the student's gradients of two updates agree, for NP-Edit and for Flow-GRPO from the same start.

    npedit study recipes/study-toy.yaml --only few_pairs
    python -m benchmarks.gradient_agreement runs/study-toy/few_pairs-0

Every update is computed on other items and from the same weights, which are not changed. Flow-GRPO has the common
settings of the study's search, NP-Edit those of the row `few_pairs_np_edit`, with and without distribution matching.
The mean cosine of all pairs of updates is 1 if all gradients point the same way, and about 0 if they are noise.
"""

from __future__ import annotations

import argparse
from itertools import combinations

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity

from npedit.nets.learner import Learner
from npedit.recipe.config import Recipe, find_class, load_recipe
from npedit.recipe.packaged import recipe_path
from npedit.study.file import load_study
from npedit.training.parts import build_parts, build_source, load_start_weights

FIRST = "data.first=500"  # the start was trained on the items before


def recipes(start: str) -> dict[str, Recipe]:
    """Name -> the recipe, with one stage, of each kind of update."""
    study = load_study(recipe_path("study-toy"))
    search, row = study.search["grpo_search"], study.variants["few_pairs_np_edit"]
    np_edit = [*row.set, FIRST, f"start={start}"]
    return {
        "flow_grpo": load_recipe(search.recipe, [*search.set, f"start={start}"]),
        "np_edit": load_recipe(study.recipe, np_edit),
        "np_edit, the critic alone": load_recipe(study.recipe, [*np_edit, "stages.1.settings.dmd_weight=0"]),
    }


def gradients(recipe: Recipe, updates: int) -> list[Tensor]:
    """The student's gradient (n,) of each of so many updates, in float32, after the limit of its norm. The gradients of
    the policy updates that share one set of samples are added."""
    parts, data, stage = build_parts(recipe), build_source(recipe), recipe.stages[0]
    student = parts.create_trainable("student", recipe.seed)
    load_start_weights(recipe, parts, student)
    step = find_class("steps", stage.step)(stage.settings, parts, student, stage.updates, recipe.seed)
    found: list[Tensor] = []
    for role, learner in step.learners.items():
        kept = found if role == "student" else []
        learner._apply_gradients = lambda rate, learner=learner, kept=kept: kept.append(_flat_gradient(learner))
    sums = []
    for update in range(updates):
        found.clear()
        step.step([data.batch(update, stage.batch_size)], update)
        sums.append(torch.stack(found).sum(0))
    return sums


def _flat_gradient(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner._masters.values() if p.grad is not None])


def agreement(found: list[Tensor]) -> tuple[float, float]:
    """The mean cosine, in [-1, 1], of all pairs of gradients; its standard error as if the pairs were independent."""
    cosines = torch.stack([cosine_similarity(a, b, dim=0) for a, b in combinations(found, 2)])
    return float(cosines.mean()), float(cosines.std() / len(cosines) ** 0.5)


def main() -> None:
    """Print the agreement for each kind of update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="a run that was trained on 500 pairs")
    parser.add_argument("--updates", type=int, default=8)
    options = parser.parse_args()
    for name, recipe in recipes(options.start).items():
        mean, error = agreement(gradients(recipe, options.updates))
        words = f"{name}: mean cosine {mean:.3f}, standard error {error:.3f}"
        Console(soft_wrap=True).print(words, markup=False, highlight=False)


if __name__ == "__main__":
    main()
