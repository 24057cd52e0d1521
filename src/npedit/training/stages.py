"""A recipe's stages: their names in tables, and how often an update calls the student."""

from __future__ import annotations

import torch

from npedit.generator import sample_training_times, seeded_generator
from npedit.recipe.config import Recipe
from npedit.training.parts import STAGE_SEEDS


def stage_names(recipe: Recipe) -> list[str]:
    """A name for each stage: its step's, with the stage's number where several stages have this step."""
    steps = [stage.step for stage in recipe.stages]
    return [step if steps.count(step) == 1 else f"{step} (stages.{i})" for i, step in enumerate(steps)]


def student_calls(recipe: Recipe, number: int, update: int) -> int:
    """How often update `update` of stage `number` calls the few-step student, once or twice, where the stage draws its
    times (`sample_training_times`). One of `trainer.steps` updates has one call on average."""
    generator = seeded_generator(recipe.seed + STAGE_SEEDS * number, "times", update)
    return len(sample_training_times(torch.ones(recipe.trainer.steps), generator))
