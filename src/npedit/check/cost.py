"""The cost section: two updates of each stage with the real weights, their time and memory, and the estimate."""

from __future__ import annotations

import gc
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from torch import nn

from npedit.check.findings import Cell, Section
from npedit.check.subject import Subject
from npedit.check.trial import build_step, measure_memory, run_update
from npedit.errors import UserError
from npedit.nets.device import device_name, is_accelerator
from npedit.recipe.config import Recipe, Stage
from npedit.rehearsal.phase_memory import PhaseMemory
from npedit.training.estimate import GIB, Estimate, estimate
from npedit.training.out_of_memory import failed_part, is_out_of_memory

UPDATES = 2  # of each stage; the second is timed
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
    """Run `UPDATES` updates of each stage; the seconds of the last one by phase. None where memory was exhausted, which
    becomes a finding."""
    seconds: dict[str, float] = {}
    with measure_memory(memory):
        for stage in subject.recipe.stages:
            memory.prefix = f"{stage.step}: "
            gc.collect()
            try:
                _measure_stage(section, subject, stage, seconds)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _report_out_of_memory(section, subject, stage, failed_part(error))
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


def _measure_stage(section: Section, subject: Subject, stage: Stage, seconds: dict[str, float]) -> None:
    """Run the updates; put the seconds of the last one by phase into `seconds`."""
    step = build_step(subject, stage, subject.student(), {})
    broken: dict[str, float] = {}
    for update in range(UPDATES):
        metrics = run_update(subject, stage, step, update)
        broken |= {k: v for k, v in metrics.items() if k.startswith(FINITE) and not math.isfinite(v)}
        found = {k: v for k, v in metrics.items() if k.startswith("time/")}
    seconds |= {f"{stage.step}: {key.removeprefix('time/')}": value for key, value in found.items()}
    if broken:
        section.add("update-not-finite", "will not learn", f"{stage.step}: {', '.join(sorted(broken))} are not finite "
                    f"in the first {UPDATES} updates.", "Such updates are skipped.",
                    "Lower lr, or use float32 for family and critic.")  # fmt: skip
    else:
        section.add("update-finite", "ok", f"{stage.step}: losses and gradients of {UPDATES} updates are finite.")


def _model_bytes(subject: Subject) -> int:
    """The weights of all open models, and of the student."""
    parts = subject.parts
    modules = [m for m in parts.family.pipe.components.values() if isinstance(m, nn.Module)]
    modules += [subject.student(), *([parts.critic.model] if parts.critic else [])]
    weights = {id(p): p.numel() * p.element_size() for m in modules for p in m.parameters()}
    return sum(weights.values())


def _report_out_of_memory(section: Section, subject: Subject, stage: Stage, part: str) -> None:
    section.add(
        "out-of-memory", "will not learn", f"{stage.step}: the memory of {device_name(subject.parts.device)} was "
        f"exhausted in the part {part or 'unknown'}.", "The recipe cannot train on this device.",
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
        f"Phases of an update (time of update {UPDATES}; memory with the models)",
        ("phase", "seconds", "peak GiB", "estimate GiB"),
        rows,
    )
    if measured and expected:
        section.add("memory", "ok", f"Peak memory: {max(measured.values()):.2f} GiB, models included; estimate: "
                    f"{expected.peak.total / GIB:.2f} GiB.")  # fmt: skip


def _report_eta(section: Section, subject: Subject, seconds: dict[str, float]) -> None:
    total = sum(stage.updates * seconds[f"{stage.step}: update"] for stage in subject.recipe.stages)
    section.add(
        "eta", "ok", f"{subject.recipe.total_updates()} updates take about {_duration(total)} with one process on "
        "this machine, without samples, evaluations and saves.",
    )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
