"""Train by a recipe: build the parts, run the stages, log, draw samples, evaluate, save, go on after a stop.

The state of a run is (stage, update) and what the step's learners hold. Data and noise are functions of the seed and
the update's number, so a run that was stopped at any moment, `kill -9` included, repeats itself exactly from its last
checkpoint.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from npedit import checkpoint
from npedit.config import Recipe, find, find_class, pick_device, torch_dtype
from npedit.errors import UserError, own_command
from npedit.flow import few_step_times
from npedit.generator import edit
from npedit.report import write_report
from npedit.samples import held_out, write_samples
from npedit.steps.base import Parts, Step

CHUNK = 16  # pictures edited at a time for samples
STAGE_SEEDS = 1_000_003  # stages have seeds this far apart
PRINT_SECONDS = 20.0  # between lines where there is no terminal
EventFn = Callable[[str, dict[str, Any]], None]


def ignore(event: str, facts: dict[str, Any]) -> None:
    """The `on_event` that does nothing."""


def build_parts(recipe: Recipe) -> Parts:
    """Load the family, and the critic if a stage needs it, as the recipe says.

    Raises:
        UserError: weights are missing or are those of another model.
    """
    device = pick_device()
    wanted = frozenset().union(*(find_class("steps", s.step).needs(s.settings) for s in recipe.stages))
    chosen = recipe.family
    with _loading("family", chosen.weights):
        family = find_class("families", chosen.name).load(chosen.folder(), torch_dtype(chosen.dtype), device)
    critic = None
    if "critic" in wanted:
        judge = recipe.critic
        with _loading("critic", judge.weights):
            kind = find_class("critics", judge.name)
            critic = kind.load(judge.folder(), torch_dtype(judge.dtype), device, judge.resolution)
    wording = recipe.critic.wording if recipe.critic else "plain"
    return Parts(family, critic, wording, device, recipe.lora, recipe.memory)


@contextmanager
def _loading(part: str, weights: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # also cut off, other shapes
        raise UserError(
            f"{part}.weights: expected a model that opens; got {weights!r} ({error}); correct the recipe"
        ) from error


def build_source(recipe: Recipe) -> Any:
    """Open the training data, as the recipe says."""
    return find("data", recipe.data.name).Source(recipe.data.settings, recipe.seed)


def train(
    recipe: Recipe,
    run: Path,
    resume: bool = True,
    on_event: EventFn = ignore,
    parts: Callable[[Recipe], Parts] = build_parts,
    source: Callable[[Recipe], Any] = build_source,
) -> Path:
    """Train, or go on with training, in the folder `run`; the same call goes on after any kind of stop. Returns `run`.

    `on_event(name, facts)` is called with "update", "sample", "evaluate", "save" and "end"; facts hold at least "step".

    Raises:
        UserError: see `checkpoint.claimed`; also a full disk, data that do not fit, gradients that stay not finite.
        SystemExit: SIGINT or SIGTERM came; everything is saved.
    """
    run = Path(run)
    with checkpoint.claimed(run, recipe, resume), stopping() as caught:
        data = source(recipe)
        made = parts(recipe)
        _check_fits(recipe, data, made)
        checkpoint.begin(run, recipe, checkpoint.make_manifest(recipe, data.fingerprint(), made.device))
        _Loop(recipe, run, made, data, on_event, caught).go()
    return run


def _check_fits(recipe: Recipe, data: Any, parts: Parts) -> None:
    for i, stage in enumerate(recipe.stages):
        needs = find_class("steps", stage.step).needs(stage.settings)
        if "target_caption" in needs and not data.has_target_captions:
            raise UserError(
                f"stages.{i}: expected data with target_caption, which {stage.step} needs here; got data without; "
                "add the column or set the weight of the loss that needs it to 0"
            )
        if "source_caption" in needs and not data.has_source_captions:
            raise UserError(
                f"stages.{i}: expected data with source_caption, which {stage.step} needs as its text, in every row; "
                "got data without; add the column (what each photo shows, in a few words) or leave this stage out"
            )
        if "edited" in needs and not getattr(data, "has_pairs", False):
            raise UserError(f"stages.{i}: {stage.step} expected pairs; got data.name {recipe.data.name}; use toy_pairs")
    if getattr(data, "has_pairs", False) and not recipe.uses_pairs():
        raise UserError(f"data.name: every stage trains without pairs; got {recipe.data.name}, which has them; use toy")
    multiple = parts.family.facts.multiple
    for height, width in data.sizes:
        if height % multiple or width % multiple:
            raise UserError(
                f"data: expected sizes that are multiples of {multiple}; got {width}x{height}; change the data's size"
            )
    if recipe.trainer.benchmark:
        _check_benchmark(recipe.trainer.benchmark, data.sizes, multiple)


def _check_benchmark(name: str, sizes: Sequence[tuple[int, int]], multiple: int) -> None:
    side = find("benchmarks", name).SIDE
    other = [f"{w}x{h}" for h, w in sizes if (h, w) != (side, side)]
    if other:
        raise UserError(
            f"trainer.benchmark: {name} expected an editor trained at {side}x{side} pixels; got data of "
            f'{", ".join(other)}; set trainer.benchmark to "" or change the data\'s size'
        )
    if side % multiple:
        raise UserError(
            f"trainer.benchmark: {name} expected a family that takes {side}x{side} pixels; got one whose sizes are "
            f'multiples of {multiple}; set trainer.benchmark to ""'
        )


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying from it; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) for n in numbers}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for n in numbers:
            signal.signal(n, before[n])

    for n in numbers:
        signal.signal(n, note)
    try:
        yield caught
    finally:
        for n in numbers:
            signal.signal(n, before[n])


class _Loop:
    """One training under way."""

    def __init__(
        self, recipe: Recipe, run: Path, parts: Parts, data: Any, on_event: EventFn, caught: list[int]
    ) -> None:
        self.recipe, self.run, self.parts, self.data = recipe, run, parts, data
        self.on_event, self.caught = on_event, caught
        self.total = recipe.total_updates()
        self.console = Console()
        self.saved_at = self.printed_at = time.monotonic()
        self.success = ""
        self.bad_rows, self.rows_seen = checkpoint.trim_rows(run / checkpoint.BAD_ROWS), 0
        self.shown = held_out(recipe, data)

    def go(self) -> None:
        """All stages, from the last checkpoint if there is one."""
        folder = checkpoint.newest_complete(self.run)
        tensors, numbers = checkpoint.load(folder) if folder else ({}, {"stage": 0, "update": 0, "step": -1})
        checkpoint.trim_metrics(self.run, numbers["step"])
        if folder:
            self.console.print(f"Going on from {folder}", highlight=False)
        student = self.parts.net("student", self.recipe.seed)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        )
        with Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=self.console
        ) as self.bar:
            self.task = self.bar.add_task(
                self.recipe.name, total=self.total, completed=max(0, numbers["step"]), figures=""
            )
            for i in range(numbers["stage"], len(self.recipe.stages)):
                step = self._step(i, student)
                start = 0
                if i == numbers["stage"] and folder:
                    restore(step, tensors, numbers)
                    start = numbers["update"]
                if i == 0 and start == 0 and not folder:  # a stop before the first update has saved this row
                    checkpoint.append_row(
                        self.run / checkpoint.METRICS, {"step": 0, **self._look(step, 0), "time": time.time()}
                    )
                self._stage(i, step, start)
                if i + 1 < len(self.recipe.stages):
                    step.learners["student"].settle()
        self._finish(step)
        if self.caught:
            self._leave(f"Stopped at the end; all {self.total} updates are done and saved in {self.run}.")

    def _step(self, i: int, student: nn.Module) -> Step:
        stage = self.recipe.stages[i]
        seed = self.recipe.seed + STAGE_SEEDS * i
        return find_class("steps", stage.step)(stage.settings, self.parts, student, stage.updates, seed)

    def _stage(self, i: int, step: Step, start: int) -> None:
        stage = self.recipe.stages[i]
        count = per_update(stage)
        earlier = self.recipe.stages[:i]
        first_batch, first_step = sum(per_update(s) * s.updates for s in earlier), sum(s.updates for s in earlier)
        for update in range(start, stage.updates):
            if self.caught:
                self._stop(i, step, update, first_step + update)
            began = time.monotonic()
            index = first_batch + update * count
            batches = [self._batch(index + k, stage.batch_size) for k in range(count)]
            loaded = time.monotonic()
            metrics = step.step(batches, update)
            metrics |= {"time/data": loaded - began, "time/update": time.monotonic() - began}
            n = first_step + update + 1
            metrics |= self._counts(step) | self._look(step, n)
            row = {"step": n, "stage": i, "stage_name": stage.step, **metrics, "time": time.time()}
            checkpoint.append_row(self.run / checkpoint.METRICS, row)
            self._show(n, stage.step, metrics)
            due = bool(self.recipe.trainer.save_every) and n % self.recipe.trainer.save_every == 0
            if due or n == self.total or time.monotonic() - self.saved_at >= self.recipe.trainer.save_seconds:
                self._save(i, step, update + 1, n)
            self.on_event("update", row)
        if self.caught and i + 1 < len(self.recipe.stages):
            self._stop(i, step, stage.updates, first_step + stage.updates)

    def _batch(self, index: int, size: int) -> Any:
        batch = self.data.batch(index, size)
        return replace(batch, references=batch.references.to(self.parts.device))

    def _counts(self, step: Step) -> dict[str, float]:
        rows = self.data.bad_rows
        for row in (r for r in rows[self.rows_seen :] if r not in self.bad_rows):
            checkpoint.append_row(self.run / checkpoint.BAD_ROWS, row)
            self.bad_rows.append(row)
        self.rows_seen = len(rows)
        skipped = sum(learner.skipped for learner in step.learners.values())
        return {
            "skipped_steps": float(skipped),
            "data/bad_rows": float(len(self.bad_rows)),
            "mem/peak_gb": _peak_gb(self.parts.device),
        }

    def _look(self, step: Step, n: int) -> dict[str, float]:
        """Samples and evaluation where they are due, with the averaged weights."""
        trainer = self.recipe.trainer
        ends = n in (0, self.total)
        sample = ends or (trainer.sample_every and n % trainer.sample_every == 0)
        evaluate = trainer.benchmark and (ends or (trainer.evaluate_every and n % trainer.evaluate_every == 0))
        if not (sample or evaluate):
            return {}
        began = time.monotonic()
        found: dict[str, float] = {}
        with step.learners["student"].average() as net, self.parts.awake("text", "vae"):
            mode = net.training
            net.eval()
            if sample:
                references, instructions = self.shown
                edited = self._edit(net, references, instructions, 0)
                write_samples(self.run / "samples" / f"step-{n:06d}", references, instructions, edited)
                self.on_event("sample", {"step": n})
            if evaluate:
                found = self._evaluate(net)
                self.success = f"success {found['eval/both']:.0%}"
                self.on_event("evaluate", {"step": n, **found})
            net.train(mode)
        return {**found, "time/look": time.monotonic() - began}

    def _edit(self, net: nn.Module, references: Tensor, instructions: Sequence[str], first: int) -> Tensor:
        """Edits on the CPU; item i has the seed `first` + i."""
        done = []
        for k in range(0, len(references), CHUNK):
            part = references[k : k + CHUNK].to(self.parts.device)
            seeds = list(range(first + k, first + k + len(part)))
            words = list(instructions[k : k + CHUNK])
            done.append(
                edit(self.parts.family, net, part, words, steps=self.recipe.trainer.steps, seeds=seeds).float().cpu()
            )
        return torch.cat(done)

    def _evaluate(self, net: nn.Module) -> dict[str, float]:
        module, seen = find("benchmarks", self.recipe.trainer.benchmark), 0

        def edit_fn(references: Tensor, instructions: list[str]) -> Tensor:
            nonlocal seen
            seen += len(references)
            return self._edit(net, references, instructions, seen - len(references))

        scores = module.score(edit_fn, module.items(self.recipe.trainer.evaluate_items, self.recipe.seed))
        found = {f"eval/{k}": scores[k]["value"] for k in ("both", "applied", "preserved")}
        found |= {f"eval/by_type/{k}": v["both"]["value"] for k, v in scores["by_type"].items()}
        return found | {f"eval/{k}": scores[k] for k in ("copy_rate", "outside_change") if scores[k] is not None}

    def _show(self, n: int, name: str, metrics: dict[str, float]) -> None:
        losses = [f"{k.removeprefix('loss/')} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/")]
        figures = "  ".join([*losses, self.success])
        self.bar.update(self.task, completed=n, description=name, figures=figures)
        if not self.console.is_terminal and (time.monotonic() - self.printed_at > PRINT_SECONDS or n == self.total):
            self.printed_at = time.monotonic()
            self.console.print(f"{name} {n}/{self.total}  {figures}", highlight=False)

    def _save(self, i: int, step: Step, update: int, n: int) -> None:
        tensors, learners = {}, {}
        for name, learner in step.learners.items():
            own, learners[name] = learner.state()
            tensors |= {f"{name}/{k}": v for k, v in own.items()}
        tensors |= {f"extra/{k}": v for k, v in step.extra_state().items()}
        numbers = {"format": 1, "stage": i, "update": update, "step": n, "learners": learners}
        checkpoint.save(self.run, n, tensors, numbers, self.recipe.trainer.keep)
        self.saved_at = time.monotonic()
        self.on_event("save", {"step": n})

    def _stop(self, i: int, step: Step, update: int, n: int) -> None:
        self._save(i, step, update, n)
        self.bar.stop()
        self._leave(f"Stopped after update {n} of {self.total}; all is saved in {self.run}.")

    def _leave(self, words: str) -> None:
        self.console.print(f"{words} To go on, run the same command:", markup=False)
        self.console.print(f"  {own_command()}", highlight=False, soft_wrap=True)
        raise SystemExit(128 + self.caught[0])

    def _finish(self, step: Step) -> None:
        family, steps = self.parts.family, self.recipe.trainer.steps
        shift = family.shift(*self.data.sizes[0])
        with step.learners["student"].average() as net:
            times = few_step_times(steps, shift).tolist()
            final = checkpoint.write_final(
                self.run, self.recipe, net, family.few_step_scheduler(shift), times, self.data.sizes
            )
        report = write_report(self.run)
        places = {
            "editor": final,
            "report": report,
            "log": self.run / checkpoint.METRICS,
            "samples": self.run / "samples",
        }
        for name, place in places.items():
            self.console.print(f"  {name:8} {place}", highlight=False, soft_wrap=True)
        self.on_event("end", {"step": self.total, **places})


def per_update(stage: Any) -> int:
    """Batches that one update of a stage takes."""
    return find_class("steps", stage.step).batches_per_update(stage.settings) * stage.accumulate


def restore(step: Step, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a checkpoint's contents into a freshly built step.

    Raises:
        UserError: they are those of another model.
    """
    try:
        for name, learner in step.learners.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            learner.load_state(own, numbers["learners"][name])
        step.load_extra_state({k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")})
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"expected a checkpoint of this recipe and its weights; got another ({error}); "
            "put the weights back that the run was begun with, or choose another folder"
        ) from error


def _peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
