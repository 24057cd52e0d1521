"""Real updates of a stage with the real weights, without a run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from npedit.check.subject import Subject
from npedit.recipe.config import Stage, find_class
from npedit.rehearsal.phase_memory import PhaseMemory
from npedit.steps.base import Step, Timers
from npedit.training.parts import STAGE_SEEDS
from npedit.training.trainer import batches_per_update


def build_step(subject: Subject, stage: Stage, student: nn.Module, changes: Mapping[str, Any]) -> Step:
    """The step of a stage that trains `student`; `changes` replaces settings."""
    seed = subject.recipe.seed + STAGE_SEEDS * subject.recipe.stages.index(stage)
    settings = stage.settings.model_copy(update=dict(changes))
    return find_class("steps", stage.step)(settings, subject.parts, student, stage.updates, seed)


def run_update(subject: Subject, stage: Stage, step: Step, update: int) -> dict[str, float]:
    """What update number `update` of a step logs, and time/data and time/update in seconds."""
    began = time.monotonic()
    changed = stage.model_copy(update={"settings": step.settings})
    count = batches_per_update(changed)
    batches = [subject.data.batch(update * count + k, stage.batch_size) for k in range(count)]
    batches = [batch.to(subject.parts.device) for batch in batches]
    loaded = time.monotonic()
    with Timers.around("update"):
        metrics = step.step(batches, update)
    return metrics | {"time/data": loaded - began, "time/update": time.monotonic() - began}


@contextmanager
def measure_memory(memory: PhaseMemory) -> Iterator[None]:
    """Inside the `with` block the parts of each update are measured."""
    Timers.around = memory.measure
    try:
        yield
    finally:
        Timers.around = nullcontext
