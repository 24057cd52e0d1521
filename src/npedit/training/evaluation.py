"""Evaluation during training, with the student's EMA weights: samples, a benchmark, a held-out judge.

A stop signal ends an evaluation between two batches of pictures. Nothing of an evaluation that was stopped is logged;
the resumed run repeats it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families._published import sampling_guidance
from npedit.flow import few_step_times
from npedit.generator import edit_images, generate_images, items_per_pass, seeded_generator
from npedit.nets import distributed
from npedit.recipe.config import Recipe, find_module
from npedit.runs.checkpoint import FAILURES, write_text
from npedit.scoring.critic_scores import CriticScores, score_with_critic
from npedit.scoring.reward_hacking import ITEMS_KEY
from npedit.steps.base import Parts, Step
from npedit.training.samples import benchmark_items, evaluation_batches, samples_folder, write_samples

TEACHER_STEPS = 20  # sampling steps of the base model, where a wrong edit is attributed


class EvaluationStopped(Exception):
    """A stop signal came while samples or an evaluation were being made."""


class Evaluation:
    """Samples and evaluations of a step's student.

    `success` is the last benchmark's success rate in words, "" before the first. `should_stop()` is asked between two
    batches of pictures, equally often in every process, and must give the same answer in all.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        parts: Parts,
        data: Any,
        on_event: Callable[[str, dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.recipe, self.run, self.parts, self.on_event = recipe, run, parts, on_event
        self.should_stop = should_stop
        self.stage_ends = {0, *accumulate(stage.updates for stage in recipe.stages)}
        self.success = ""
        self.sample_batches = evaluation_batches(recipe, data, recipe.trainer.sample_items)
        needs_batches = parts.judge or recipe.trainer.benchmark == "toy"
        self.judge_batches = evaluation_batches(recipe, data, recipe.trainer.evaluate_items) if needs_batches else []

    def evaluate_if_due(self, step: Step, n: int) -> dict[str, float]:
        """The values to log after update n: those of an evaluation, if samples or an evaluation are due.

        Raises:
            EvaluationStopped: `should_stop()` was true between two batches.
            UserError: the samples hold NaN or infinity; a full disk.
        """
        trainer = self.recipe.trainer
        is_sample_due = n in (0, max(self.stage_ends)) or (trainer.sample_every and n % trainer.sample_every == 0)
        is_evaluation_due = (trainer.benchmark or self.parts.judge) and (
            n in self.stage_ends or (trainer.evaluate_every and n % trainer.evaluate_every == 0)
        )
        if not (is_sample_due or is_evaluation_due):
            return {}
        began = time.monotonic()
        metrics: dict[str, float] = {}
        with (
            step.learners["student"].use_ema_weights() as net,
            self.parts.on_device("text", "vae"),
            _evaluation_mode(net),
        ):
            if is_sample_due:
                self._make_samples(net, n)
                self.on_event("sample", {"step": n})
            if is_evaluation_due:
                metrics = self._evaluate(net, n)
                self.on_event("evaluate", {"step": n, **metrics})
        return {**metrics, "time/look": time.monotonic() - began}

    def _make_samples(self, net: nn.Module, n: int) -> None:
        edited = [image for images in self._edit_batches(net, self.sample_batches) for image in images]
        if not all(bool(image.isfinite().all()) for image in edited):
            raise UserError(
                f"expected finite pixels in the samples after update {n}; got NaN or infinity: the training has "
                f"diverged, and no editor is written; the last checkpoint in {self.run} is kept; lower lr, raise "
                "warmup_updates, or use float32, in a new folder"
            )
        if distributed.is_main_process():
            references = [image for batch in self.sample_batches for image in batch.references]
            instructions = [text for batch in self.sample_batches for text in batch.instructions]
            write_samples(samples_folder(self.run, n), references, instructions, edited)

    def _edit_batches(self, net: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
        """The edited images of each batch; the items of all batches are numbered on, and item i has the seed i."""
        edited: list[Tensor] = []
        for batch in batches:
            seed = sum(map(len, edited))
            edited.append(self._edit(net, batch.references, batch.instructions, seed, batch.extra_references))
        return edited

    def _edit(
        self,
        net: nn.Module,
        references: Tensor,
        instructions: Sequence[str],
        first_seed: int,
        extra_references: Tensor | None = None,
    ) -> Tensor:
        """Edited images on the CPU. All processes share the work; item i has the seed `first_seed` + i."""
        done: list[Tensor] = []
        count = items_per_pass(*references.shape[-2:])
        for start in range(0, len(references), count * distributed.world_size()):
            self._stop_if_asked()
            mine = start + count * distributed.rank()
            k = mine if mine < len(references) else start  # each process must call a sharded net equally often
            part = references[k : k + count].to(self.parts.device)
            seeds = list(range(first_seed + k, first_seed + k + len(part)))
            texts = list(instructions[k : k + count])
            extra = None if extra_references is None else extra_references[k : k + count].to(self.parts.device)
            steps, tile = self.recipe.trainer.steps, self.parts.memory.decode_tile
            edited = edit_images(
                self.parts.family, net, part, texts, steps=steps, seeds=seeds, tile=tile, extra_references=extra
            )
            done += [e for e in distributed.all_gather(edited.float().cpu() if k == mine else None) if e is not None]
        return torch.cat(done)

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise EvaluationStopped

    def _evaluate(self, net: nn.Module, n: int) -> dict[str, float]:
        edited: list[Tensor] = []

        def edit_fn(references: Tensor, instructions: Sequence[str]) -> Tensor:
            edited.append(self._edit(net, references, instructions, sum(map(len, edited))))
            return edited[-1]

        is_toy = self.recipe.trainer.benchmark == "toy"
        metrics = self._run_benchmark(edit_fn) if self.recipe.trainer.benchmark else {}
        if is_toy:  # the judge is asked about the same items, which are one batch
            edited = [torch.cat(edited)]
        if (judge := self.parts.judge) and self.judge_batches:
            if not is_toy:
                edited = self._edit_batches(net, self.judge_batches)
            with self.parts.on_device("judge"):
                scores = self._score_batches(judge.critic, judge.wording, edited)
            edit_types = [edit_type for batch in self.judge_batches for edit_type in batch.edit_types]
            metrics |= scores.mean_by_kind("judge", edit_types) | {ITEMS_KEY: float(len(edit_types))}
        if n == max(self.stage_ends) and is_toy and self.parts.critic and self.judge_batches:
            self._attribute_failures(self.parts.critic, self.judge_batches[0], edited[0])
        return metrics

    def _run_benchmark(self, edit_fn: Callable[[Tensor, Sequence[str]], Tensor]) -> dict[str, float]:
        module = find_module("benchmarks", self.recipe.trainer.benchmark)
        scores = module.score(edit_fn, benchmark_items(self.recipe, self.recipe.trainer.evaluate_items))
        metrics = {f"eval/{k}": scores[k]["value"] for k in ("both", "applied", "preserved")}
        metrics |= {f"eval/by_type/{k}": v["both"]["value"] for k, v in scores["by_type"].items()}
        metrics |= {f"eval/{k}": scores[k] for k in ("copy_rate", "outside_change") if scores[k] is not None}
        self.success = f"success {metrics['eval/both']:.0%}"
        return metrics

    def _score_batches(self, critic: Critic, wording: str, edited: Sequence[Tensor]) -> CriticScores:
        """What a critic says about the edited images of `judge_batches`, as many at a time as are edited."""
        items: list[int] = []
        kinds: list[str] = []
        chances: list[Tensor] = []
        first = 0  # the number of the batch's first item
        for batch, images in zip(self.judge_batches, edited, strict=True):
            count = items_per_pass(*images.shape[-2:])
            for start in range(0, len(batch), count):
                self._stop_if_asked()
                part = batch.slice(start, start + count)
                scores = score_with_critic(critic, wording, part, images[start : start + count], count)
                items += [first + start + i for i in scores.items]
                kinds += scores.kinds
                chances.append(scores.p)
            first += len(batch)
        return CriticScores(tuple(items), tuple(kinds), torch.cat(chances))

    def _attribute_failures(self, critic: Critic, batch: Batch, edited: Tensor) -> None:
        """Write `blame.json`: the causes of wrong edits; see `benchmarks.toy.attribute_failures`."""
        module, family = find_module("benchmarks", "toy"), self.parts.family
        with self.parts.on_device("critic"):
            is_accepted = self._score_batches(critic, self.parts.wording, [edited]).is_accepted()
        guidance = [s.settings.guidance for s in self.recipe.stages if hasattr(s.settings, "guidance")]
        times = few_step_times(TEACHER_STEPS, family.noise_shift(*edited.shape[-2:])).tolist()
        generated, count, tile = [], items_per_pass(*edited.shape[-2:]), self.parts.memory.decode_tile
        for start in range(0, len(edited), count):
            self._stop_if_asked()
            captions = batch.target_captions[start : start + count]
            size = (len(captions), family.facts.channels, *(s // family.facts.stride for s in edited.shape[-2:]))
            noise = torch.randn(size, generator=seeded_generator("blame", start)).to(self.parts.device)
            scale = (guidance or [sampling_guidance(family)])[-1]
            images = generate_images(family, captions, noise, times, scale, tile)
            generated.append(images.cpu())
        items = benchmark_items(self.recipe, len(edited))
        counts = module.attribute_failures(items, edited, is_accepted, torch.cat(generated))
        if distributed.is_main_process():
            write_text(self.run / FAILURES, json.dumps(counts, indent=1) + "\n")


@contextmanager
def _evaluation_mode(net: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the `with` block, in its earlier mode afterwards."""
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)
