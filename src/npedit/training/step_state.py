"""The state of a step and of the sampler as a checkpoint holds it: collect it, and put it back into fresh ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from npedit.errors import UserError
from npedit.runs import checkpoint
from npedit.steps.base import Step
from npedit.training.failure_sampling import PREFIX, FailureSampler


def collect_state(step: Step, sampler: FailureSampler) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a step and of the sampler by their names in a checkpoint, and the numbers of each learner by its
    role."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for role, learner in step.learners.items():
        learner_tensors, numbers[role] = learner.state()
        tensors |= {f"{role}/{name}": value for name, value in learner_tensors.items()}
    tensors |= {f"extra/{name}": value for name, value in step.extra_state().items()}
    return tensors | sampler.state(), numbers


def restore_state(step: Step, sampler: FailureSampler, folder: Path) -> None:
    """Load a checkpoint's tensors and numbers into a freshly built step and a fresh sampler.

    Raises:
        UserError: the checkpoint is damaged, or is one of another model.
    """
    state = checkpoint.read_state(folder)
    try:
        for role, learner in step.learners.items():
            tensors = checkpoint.iterate_tensors(folder, f"{role}/", learner.parameter_of)
            learner.load_tensors(tensors, state["learners"][role])
        step.load_extra_tensors(checkpoint.iterate_tensors(folder, "extra/", step.extra_state().get))
        record = checkpoint.iterate_tensors(folder, PREFIX, lambda name: None)
        sampler.load_state({PREFIX + name: tensor for name, tensor in record})
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"expected a checkpoint of this recipe and its weights; got another ({error}); "
            "put the weights back that the run was started with, or choose another folder"
        ) from error
