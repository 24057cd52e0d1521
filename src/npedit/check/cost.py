"""The cost section: three updates of each stage with the real weights, their time and memory, and the estimate."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from torch import nn

from npedit.check.findings import Cell, Section
from npedit.check.subject import Subject
from npedit.check.trial import build_step, measure_memory, run_update
from npedit.errors import UserError
from npedit.nets.device import device_name, is_accelerator
from npedit.recipe.config import Recipe
from npedit.rehearsal.phase_memory import PhaseMemory
from npedit.training.estimate import GIB, Estimate, estimate
from npedit.training.out_of_memory import failed_part, is_out_of_memory
from npedit.training.stages import stage_names, student_calls

LOOKED_THROUGH = 1000  # updates, for those that are run
ONE_CALL = "update with one call"  # of the student; the other rows are of an update with two
FINITE = ("loss/", "grad_norm/")


def check_cost(subject: Subject) -> Section:
    """The cost section of the report."""
    section = Section("cost", "Time and memory")
    expected = _estimate(section, subject)
    memory = PhaseMemory(subject.parts.device)
    seconds = measure_updates(section, subject, memory)
    if seconds is None:
        return section
    held = memory.baseline if is_accelerator(subject.parts.device) else _model_bytes(subject) / GIB
    measured = {name: peak + held for name, peak in memory.peaks.items()} if memory.can_measure else {}
    _report_phases(section, seconds, measured, expected)
    _report_eta(section, subject, seconds)
    return section


def measure_updates(section: Section, subject: Subject, memory: PhaseMemory) -> dict[str, float] | None:
    """Run the updates of `chosen_updates` of each stage; the seconds by phase of those with two calls of the student,
    and of the whole update with one. None where memory was exhausted, which becomes a finding."""
    seconds: dict[str, float] = {}
    with measure_memory(memory):
        for number, name in enumerate(stage_names(subject.recipe)):
            memory.prefix = f"{name}: "
            gc.collect()
            try:
                seconds |= {f"{name}: {part}": s for part, s in _measure_stage(section, subject, number, name).items()}
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _report_out_of_memory(section, subject, name, failed_part(error))
                return None
    return seconds


def _estimate(section: Section, subject: Subject) -> Estimate | None:
    """The recipe's estimate, made in a new process; None where it cannot be made."""
    at_once = is_accelerator(subject.parts.device)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_estimate_or_message, subject.recipe, at_once).result()
    except UserError as error:
        section.add("no-estimate", "note", f"The memory cannot be estimated: {error}")
        return None


def _estimate_or_message(recipe: Recipe, at_once: bool) -> Estimate:
    return estimate(recipe, 1, at_once)


def chosen_updates(recipe: Recipe, number: int) -> list[int]:
    """The numbers of the updates of a stage that are run: one to warm up, one that calls the student once, and one that
    calls it twice. An editor of one step has no such second kind."""
    calls = [student_calls(recipe, number, update) for update in range(LOOKED_THROUGH)]
    if 2 not in calls:
        return [0, 1, 2]
    first = calls.index(2)
    return [first, calls.index(1), calls.index(2, first + 1)]


def _measure_stage(section: Section, subject: Subject, number: int, name: str) -> dict[str, float]:
    """Run the updates; returns seconds by phase, see `measure_updates`."""
    stage = subject.recipe.stages[number]
    step = build_step(subject, stage, subject.student(), {})
    logged = [run_update(subject, stage, step, update) for update in chosen_updates(subject.recipe, number)]
    _report_finite(section, name, logged)
    _, short, long = logged
    parts = {key.removeprefix("time/"): value for key, value in long.items() if key.startswith("time/")}
    return parts | {ONE_CALL: short["time/update"]}


def _report_finite(section: Section, name: str, logged: Sequence[dict[str, float]]) -> None:
    broken = {k for metrics in logged for k, v in metrics.items() if k.startswith(FINITE) and not math.isfinite(v)}
    if broken:
        section.add("update-not-finite", "will not learn", f"{name}: {', '.join(sorted(broken))} are not finite "
                    f"in {len(logged)} updates.", "Such updates are skipped.",
                    "Lower lr, or use float32 for family and critic.")  # fmt: skip
    else:
        section.add("update-finite", "ok", f"{name}: losses and gradients of {len(logged)} updates are finite.")


def _model_bytes(subject: Subject) -> int:
    """The weights of all open models, and of the student."""
    parts = subject.parts
    modules = [m for m in parts.family.pipe.components.values() if isinstance(m, nn.Module)]
    modules += [subject.student(), *([parts.critic.model] if parts.critic else [])]
    weights = {id(p): p.numel() * p.element_size() for m in modules for p in m.parameters()}
    return sum(weights.values())


def _report_out_of_memory(section: Section, subject: Subject, name: str, part: str) -> None:
    section.add(
        "out-of-memory", "will not learn", f"{name}: the memory of {device_name(subject.parts.device)} was "
        f"exhausted in the part {part or 'unknown'}.", "The recipe cannot train on this device with one process.",
        "See docs/one-gpu.md for the settings that save memory, or use a smaller batch_size.",
    )  # fmt: skip


def _report_phases(
    section: Section, seconds: dict[str, float], measured: dict[str, float], expected: Estimate | None
) -> None:
    """Add the table of phases; `measured` is the peak memory in GiB by phase."""
    planned = {phase.name: phase.total / GIB for phase in expected.phases} if expected else {}
    names = dict.fromkeys([*seconds, *measured, *planned])
    rows: list[tuple[Cell, ...]] = [(n, seconds.get(n), measured.get(n), planned.get(n)) for n in names]
    section.add_table(
        "Phases of an update (time of an update with two calls of the student; memory with the models)",
        ("phase", "seconds", "peak GiB", "estimate GiB"),
        rows,
    )
    if measured and expected:
        section.add("memory", "ok", f"Peak memory: {max(measured.values()):.2f} GiB, models included; estimate: "
                    f"{expected.peak.total / GIB:.2f} GiB.")  # fmt: skip


def _report_eta(section: Section, subject: Subject, seconds: dict[str, float]) -> None:
    recipe, total = subject.recipe, 0.0
    share = 1 / recipe.trainer.steps  # of updates with one call of the student
    for stage, name in zip(recipe.stages, stage_names(recipe), strict=True):
        one, two = seconds[f"{name}: {ONE_CALL}"], seconds[f"{name}: update"]
        total += stage.updates * (share * one + (1 - share) * two)
    section.add(
        "eta", "ok", f"{recipe.total_updates()} updates take about {_duration(total)} with one process on "
        "this machine, without samples, evaluations and saves.",
    )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
