"""Train by a recipe: run the stages, log, draw samples, evaluate, save, resume after a stop.

The state of a run is (stage, update) and the state of the step's learners. Data and noise are functions of the seed and
the update's number. So a run that was stopped at any moment, also by `kill -9`, repeats exactly from its last
checkpoint.

Several processes run this loop (`nets/distributed.py`). The main process writes and prints. The processes share each
batch and each set of pictures to edit, they average what is logged, and after each update they agree on stops and
saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from npedit.errors import resume_command
from npedit.flow import few_step_times
from npedit.nets import distributed
from npedit.nets.device import peak_memory_gb
from npedit.recipe.config import Recipe, find_class, torch_dtype
from npedit.report.report import write_report
from npedit.runs import checkpoint
from npedit.runs.final import write_final
from npedit.runs.lock import Lock
from npedit.runs.start import resolve_start
from npedit.scoring.reward_hacking import RewardHackingMonitor
from npedit.steps.base import Parts, Step, Timers
from npedit.training.evaluation import Evaluation, EvaluationStopped
from npedit.training.failure_sampling import FailureSampler
from npedit.training.finite import require_finite_weights
from npedit.training.gradient_ratio import GradientRatioCheck
from npedit.training.out_of_memory import Progress, explain_out_of_memory
from npedit.training.parts import (
    STAGE_SEEDS,
    build_parts,
    build_source,
    check_data_fits,
    check_recipe_fits,
    check_steps,
    load_start_weights,
)
from npedit.training.progress_display import ProgressDisplay, plain_console
from npedit.training.run_folder import list_bad_rows, print_changes, require_shared_files, restore_held_out_rows
from npedit.training.signals import catch_stop_signals, exit_code
from npedit.training.step_state import collect_state, restore_state
from npedit.training.trackers import Trackers, open_trackers

EventFn = Callable[[str, dict[str, Any]], None]


def ignore_event(event: str, facts: dict[str, Any]) -> None:
    """The `on_event` that does nothing."""


def train(
    recipe: Recipe,
    run: Path,
    resume: bool = True,
    on_event: EventFn = ignore_event,
    parts: Callable[[Recipe], Parts] = build_parts,
    source: Callable[[Recipe], Any] = build_source,
) -> Path:
    """Train in the folder `run`, or resume the training there; the same call resumes after any kind of stop. Returns
    `run`.

    `on_event(name, facts)` is called with "update", "sample", "evaluate", "save" and "end", in every process, and
    with "alarm" in the first; facts hold at least "step".

    Raises:
        UserError: see `checkpoint.hold_run`; also a full disk or memory, data that do not fit, gradients or weights
            that are not finite.
        SystemExit: SIGINT, SIGTERM or SIGUSR1 came; everything is saved. The exit codes are in `signals.py`.
    """
    run, progress = Path(run), Progress()
    with (
        distributed.process_group(),
        _hold_run(run, recipe, resume) as lock,
        list_bad_rows(run),
        catch_stop_signals() as caught,
        explain_out_of_memory(recipe, run, progress),
        open_trackers(recipe, run) as trackers,
    ):
        if recipe.start and not checkpoint.complete_checkpoints(run):  # a resumed run does not read it again
            resolve_start(recipe.start)
        data = source(recipe)
        restore_held_out_rows(run, data)
        check_data_fits(recipe, data)
        made = parts(recipe)
        check_recipe_fits(recipe, data, made)
        check_steps(recipe, made)
        fingerprint = data.fingerprint()
        if distributed.is_main_process():
            manifest = checkpoint.make_manifest(recipe, fingerprint, made.device, run)
            inventory = data.inventory() if hasattr(data, "inventory") else None
            print_changes(checkpoint.write_run_metadata(run, recipe, manifest, inventory))
        require_shared_files(run, fingerprint)
        distributed.set_sharding_plan(
            recipe.trainer.shard, made.family.facts.blocks, torch_dtype(recipe.family.dtype), made.device
        )
        TrainingLoop(recipe, run, made, data, on_event, caught, progress, lock, trackers).run_stages()
    return run


def _hold_run(run: Path, recipe: Recipe, resume: bool) -> AbstractContextManager[Any]:
    return checkpoint.hold_run(run, recipe, resume) if distributed.is_main_process() else nullcontext()


class TrainingLoop:
    """One training run: its state, and the loop over its stages."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        parts: Parts,
        data: Any,
        on_event: EventFn,
        caught: list[int],
        progress: Progress,
        lock: Lock | None,
        trackers: Trackers,
    ) -> None:
        self.recipe, self.run, self.parts, self.data = recipe, run, parts, data
        self.on_event, self.caught, self.progress, self.lock = on_event, caught, progress, lock
        self.trackers = trackers
        self.total = recipe.total_updates()
        self.first = distributed.is_main_process()
        self.console = plain_console(is_quiet=not self.first)
        self.saved_at = time.monotonic()
        self.bad_rows = checkpoint.repair_rows(run / checkpoint.BAD_ROWS) if self.first else []
        self.rows_seen = 0
        self.evaluation = Evaluation(recipe, run, parts, data, on_event, lambda: bool(self._agreed_signal()))
        self.reward_hacking = RewardHackingMonitor(recipe.trainer.evaluate_items)
        self.gradient_ratio = GradientRatioCheck()
        self.sampler = FailureSampler(recipe.trainer.by_failure, data)

    def run_stages(self) -> None:
        """Run all stages, from the last checkpoint that is not damaged if there is one."""
        folder, numbers = distributed.broadcast_object(checkpoint.usable_checkpoint(self.run) if self.first else None)
        numbers = numbers or {"stage": 0, "update": 0, "step": -1}
        if self.first:
            checkpoint.drop_metrics_after(self.run, numbers["step"])
            for row in checkpoint.read_rows(self.run / checkpoint.METRICS):
                self.reward_hacking.add(row)
        if folder:
            self.console.print(f"Resuming from {folder}")
        student = self.parts.create_trainable("student", self.recipe.seed)
        if not folder:
            load_start_weights(self.recipe, self.parts, student)
        done = max(0, numbers["step"])
        with ProgressDisplay(self.console, self.recipe.name, self.total, done) as self.display:
            for i in range(numbers["stage"], len(self.recipe.stages)):
                step = self._build_step(i, student)
                start = 0
                if i == numbers["stage"] and folder:
                    restore_state(step, self.sampler, folder)
                    start = numbers["update"]
                    if numbers.get("is_evaluation_due"):
                        self._evaluate_late(step, numbers["step"])
                if i == 0 and start == 0 and not folder:  # after a stop before the first update, this row exists
                    self._evaluate_first(step)
                self._train_stage(i, step, start)
                if i + 1 < len(self.recipe.stages):
                    step.learners["student"].load_ema_weights()
        self._write_editor_and_report(step)
        if number := self._agreed_signal():
            self._exit_with_command(
                number, f"Stopped at the end; all {self.total} updates are done and saved in {self.run}."
            )

    def _build_step(self, i: int, student: nn.Module) -> Step:
        stage = self.recipe.stages[i]
        seed = self.recipe.seed + STAGE_SEEDS * i
        step = find_class("steps", stage.step)(stage.settings, self.parts, student, stage.updates, seed)
        if i + 1 == len(self.recipe.stages):  # no more models are copied from the base
            distributed.shard_frozen(self.parts.family.base)
            if self.parts.lora:
                distributed.shard_frozen(self.parts.family.lora_base())
        return step

    def _train_stage(self, i: int, step: Step, start: int) -> None:
        stage = self.recipe.stages[i]
        count = batches_per_update(stage)
        earlier = self.recipe.stages[:i]
        first_batch, first_step = (
            sum(batches_per_update(s) * s.updates for s in earlier),
            sum(s.updates for s in earlier),
        )
        for update in range(start, stage.updates):
            if number := self._agreed_signal():
                self._save_and_stop(number, i, step, update, first_step + update)
            self.progress.phase = f"update {first_step + update + 1} ({stage.step})"
            began = time.monotonic()
            self.sampler.before_update(first_step + update)
            index = first_batch + update * count
            batches = [self._batch(index + k, stage.batch_size) for k in range(count)]
            loaded = time.monotonic()
            with Timers.around("update"):
                metrics = step.step(batches, update)
            metrics |= {"time/data": loaded - began, "time/update": time.monotonic() - began}
            self.sampler.observe(step)
            n = first_step + update + 1
            metrics = distributed.merge_metrics(
                distributed.all_gather(metrics | {"mem/peak_gb": peak_memory_gb(self.parts.device)})
            )
            metrics |= self._count_skipped_and_bad(step) | self.sampler.metrics()
            evaluation, is_evaluated = self._evaluate(step, n)
            metrics |= evaluation
            row = {"step": n, "stage": i, "stage_name": stage.step, **metrics, "time": time.time()}
            self._log(row)
            self._show_progress(n, stage.step, metrics)
            if not is_evaluated:
                self._save_and_stop(self._agreed_signal(), i, step, update + 1, n, is_evaluated=False)
            due = bool(self.recipe.trainer.save_every) and n % self.recipe.trainer.save_every == 0
            late = distributed.broadcast_object(time.monotonic() - self.saved_at >= self.recipe.trainer.save_seconds)
            if due or late or n == self.total:
                self._save(i, step, update + 1, n)
            self.on_event("update", row)
        if i + 1 < len(self.recipe.stages) and (number := self._agreed_signal()):
            self._save_and_stop(number, i, step, stage.updates, first_step + stage.updates)

    def _agreed_signal(self) -> int:
        """The signal that any process has caught, 0 if none has; the same number in all processes."""
        return max(distributed.all_gather(self.caught[0] if self.caught else 0))

    def _log(self, row: dict[str, Any]) -> None:
        if self.first:
            checkpoint.append_row(self.run / checkpoint.METRICS, row)
            self.trackers.log(row)
            self._report_alarms(row)

    def _batch(self, index: int, size: int) -> Any:
        """This process's share of a batch of `size` items."""
        world = distributed.world_size()
        return self.data.batch(index, size // world, distributed.rank(), world).to(self.parts.device)

    def _count_skipped_and_bad(self, step: Step) -> dict[str, float]:
        rows = self.data.bad_rows
        for row in (row for new in distributed.all_gather(rows[self.rows_seen :]) for row in new):
            if self.first and row not in self.bad_rows:
                checkpoint.append_row(self.run / checkpoint.BAD_ROWS, row)
                self.bad_rows.append(row)
        self.rows_seen = len(rows)
        skipped = sum(learner.skipped for learner in step.learners.values())
        return {"skipped_steps": float(skipped), "data/bad_rows": float(len(self.bad_rows))}

    def _show_progress(self, n: int, name: str, metrics: dict[str, float]) -> None:
        losses = [f"{k.removeprefix('loss/')} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/")]
        figures = "  ".join([*losses, self.evaluation.success])
        self.display.update(n, name, figures)

    def _report_alarms(self, row: dict[str, Any]) -> None:
        """Print the alarms and warnings that a new row of metrics raises."""
        for alarm in self.reward_hacking.add(row):
            self.console.print(f"ALARM {alarm.message()}", style="bold red")
            self.on_event("alarm", {"step": alarm.step, "judge": alarm.judge, "since": alarm.since})
        if message := self.gradient_ratio.add(row):
            self.console.print(f"WARNING {message}", style="yellow")
            self.on_event("gradient_ratio", {"step": row["step"]})

    def _evaluate(self, step: Step, n: int) -> tuple[dict[str, float], bool]:
        """What samples and evaluation give to log after update n, and whether they are complete. An evaluation may take
        minutes: a stop signal ends it between two batches of pictures, and the resumed run repeats it."""
        if self._agreed_signal():
            return {}, False
        self.progress.phase = f"samples and evaluation after update {n}"
        try:
            return self.evaluation.evaluate_if_due(step, n), True
        except EvaluationStopped:
            return {}, False

    def _evaluate_first(self, step: Step) -> None:
        """Log the row of update 0, the evaluation before training."""
        metrics, is_evaluated = self._evaluate(step, 0)
        self._log({"step": 0, **metrics, "time": time.time()})
        if not is_evaluated:
            self._save_and_stop(self._agreed_signal(), 0, step, 0, 0, is_evaluated=False)

    def _evaluate_late(self, step: Step, n: int) -> None:
        """Add the evaluation that a stop left out to the last row of metrics."""
        metrics, is_evaluated = self._evaluate(step, n)
        if not is_evaluated:
            self.display.stop()
            self._exit_with_command(self._agreed_signal(), f"Stopped after update {n}; all is saved in {self.run}.")
        rows = checkpoint.read_rows(self.run / checkpoint.METRICS) if self.first else []
        if rows and metrics:
            rows[-1] |= metrics
            checkpoint.write_rows(self.run / checkpoint.METRICS, rows)
            self.trackers.log({"step": n, **metrics}, is_late=True)
            self._report_alarms({"step": n, **metrics})

    def _save(self, i: int, step: Step, update: int, n: int, is_evaluated: bool = True) -> None:
        self.progress.phase, began = f"the checkpoint after update {n}", time.monotonic()
        require_finite_weights(step, self.run, n)
        if self.lock:
            self.lock.check()
        tensors, learners = collect_state(step, self.sampler)
        numbers = {"format": 1, "stage": i, "update": update, "step": n, "learners": learners}
        numbers |= {} if is_evaluated else {"is_evaluation_due": True}
        checkpoint.save_checkpoint(self.run, n, tensors, numbers, self.recipe.trainer.keep)
        self.saved_at = time.monotonic()
        self.on_event("save", {"step": n, "seconds": self.saved_at - began})

    def _save_and_stop(
        self, number: int, i: int, step: Step, update: int, n: int, is_evaluated: bool = True
    ) -> NoReturn:
        self._save(i, step, update, n, is_evaluated)
        self.display.stop()
        self._exit_with_command(number, f"Stopped after update {n} of {self.total}; all is saved in {self.run}.")

    def _exit_with_command(self, number: int, words: str) -> NoReturn:
        self.console.print(f"{words} To resume, run the same command:")
        command = "torchrun ..." if distributed.is_started_by_torchrun() else resume_command()
        self.console.print(f"  {command}")
        raise SystemExit(exit_code(number))

    def _write_editor_and_report(self, step: Step) -> None:
        self.progress.phase = "the finished editor"
        require_finite_weights(step, self.run, self.total)
        family, steps = self.parts.family, self.recipe.trainer.steps
        shift = family.noise_shift(*self.data.sizes[0])
        times, scheduler = few_step_times(steps, shift).tolist(), family.few_step_scheduler(shift)
        # The EMA weights stay in use until they are written: a model that is not sharded is not copied.
        with step.learners["student"].use_ema_weights() as net:
            full_model = distributed.gather_full_model(net)
            if full_model is not None:
                final = write_final(self.run, self.recipe, full_model, scheduler, times, self.data.sizes)
        if full_model is None:
            self.on_event("end", {"step": self.total})
            return
        report = write_report(self.run)
        places = {
            "editor": final,
            "report": report,
            "log": self.run / checkpoint.METRICS,
            "samples": self.run / "samples",
        }
        for name, place in places.items():
            self.console.print(f"  {name:8} {place}")
        self.on_event("end", {"step": self.total, **places})


def batches_per_update(stage: Any) -> int:
    """Batches that one update of a stage takes."""
    return find_class("steps", stage.step).batches_per_update(stage.settings) * stage.accumulate
