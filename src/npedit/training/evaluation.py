"""How a run is looked at while it trains, with its averaged weights: pictures, a benchmark, a held-out judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.errors import UserError
from npedit.flow import few_step_times
from npedit.generator import edit_images, generate_images, seeded_generator
from npedit.nets import distributed
from npedit.recipe.config import Recipe, find_module
from npedit.runs.checkpoint import FAILURES, write_text
from npedit.scoring.critic_scores import score_with_critic
from npedit.steps.base import Parts, Step
from npedit.training.samples import held_out_examples, write_samples

CHUNK = 16  # pictures edited at a time
DRAWING_STEPS = 20  # of the base model, where it shows what it can draw


class Evaluation:
    """Looks at a step's student when it is due. `success` is the last evaluation's headline, "" before the first."""

    def __init__(
        self, recipe: Recipe, run: Path, parts: Parts, data: Any, on_event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.recipe, self.run, self.parts, self.on_event = recipe, run, parts, on_event
        self.stage_ends = {0, *accumulate(stage.updates for stage in recipe.stages)}
        self.success = ""
        self.shown = held_out_examples(recipe, data, recipe.trainer.sample_items)
        questioned = parts.judge or recipe.trainer.benchmark == "toy"
        self.asked = held_out_examples(recipe, data, recipe.trainer.evaluate_items) if questioned else None

    def evaluate_if_due(self, step: Step, n: int) -> dict[str, float]:
        """Samples and evaluation where they are due after update n, and what to log of them."""
        trainer = self.recipe.trainer
        sample = n in (0, max(self.stage_ends)) or (trainer.sample_every and n % trainer.sample_every == 0)
        evaluate = (trainer.benchmark or self.parts.judge) and (
            n in self.stage_ends or (trainer.evaluate_every and n % trainer.evaluate_every == 0)
        )
        if not (sample or evaluate):
            return {}
        began = time.monotonic()
        found: dict[str, float] = {}
        with step.learners["student"].use_ema_weights() as net, self.parts.on_device("text", "vae"):
            mode = net.training
            net.eval()
            if sample:
                edited = self._edit(net, self.shown.references, self.shown.instructions, 0)
                if not edited.isfinite().all():
                    raise UserError(
                        f"expected finite pixels in the samples after update {n}; got NaN or infinity: the training "
                        f"has diverged, and no editor is written; the last checkpoint in {self.run} is kept; lower "
                        "lr, raise warmup_updates, or use float32, in a new folder"
                    )
                if distributed.is_main_process():
                    folder = self.run / "samples" / f"step-{n:06d}"
                    write_samples(folder, self.shown.references, self.shown.instructions, edited)
                self.on_event("sample", {"step": n})
            if evaluate:
                found = self._evaluate(net, n)
                self.on_event("evaluate", {"step": n, **found})
            net.train(mode)
        return {**found, "time/look": time.monotonic() - began}

    def _edit(self, net: nn.Module, references: Tensor, instructions: Sequence[str], first: int) -> Tensor:
        """Edits on the CPU, made by all processes; item i has the seed `first` + i."""
        done: list[Tensor] = []
        for start in range(0, len(references), CHUNK * distributed.world_size()):
            mine = start + CHUNK * distributed.rank()
            k = mine if mine < len(references) else start  # a sharded net has to be called by all, as often by each
            part = references[k : k + CHUNK].to(self.parts.device)
            seeds = list(range(first + k, first + k + len(part)))
            words = list(instructions[k : k + CHUNK])
            steps, tile = self.recipe.trainer.steps, self.parts.memory.decode_tile
            edited = edit_images(self.parts.family, net, part, words, steps=steps, seeds=seeds, tile=tile)
            done += [e for e in distributed.all_gather(edited.float().cpu() if k == mine else None) if e is not None]
        return torch.cat(done)

    def _evaluate(self, net: nn.Module, n: int) -> dict[str, float]:
        made: list[Tensor] = []

        def edit_fn(references: Tensor, instructions: Sequence[str]) -> Tensor:
            made.append(self._edit(net, references, instructions, sum(map(len, made))))
            return made[-1]

        found: dict[str, float] = {}
        if self.recipe.trainer.benchmark:
            module = find_module("benchmarks", self.recipe.trainer.benchmark)
            scores = module.score(edit_fn, module.sample_items(self.recipe.trainer.evaluate_items, self.recipe.seed))
            found = {f"eval/{k}": scores[k]["value"] for k in ("both", "applied", "preserved")}
            found |= {f"eval/by_type/{k}": v["both"]["value"] for k, v in scores["by_type"].items()}
            found |= {f"eval/{k}": scores[k] for k in ("copy_rate", "outside_change") if scores[k] is not None}
            self.success = f"success {found['eval/both']:.0%}"
        if (judge := self.parts.judge) and self.asked:
            if self.recipe.trainer.benchmark != "toy":  # it has not made the edits that the judge is asked about
                made = [self._edit(net, self.asked.references, self.asked.instructions, 0)]
            with self.parts.on_device("judge"):
                scores = score_with_critic(judge.critic, judge.wording, self.asked, torch.cat(made), CHUNK)
            found |= scores.mean_by_kind("judge", self.asked.edit_types)
        if n == max(self.stage_ends) and self.recipe.trainer.benchmark == "toy" and self.parts.critic and self.asked:
            self._attribute_failures(self.parts.critic, self.asked, torch.cat(made))
        return found

    def _attribute_failures(self, critic: Critic, asked: Batch, edited: Tensor) -> None:
        """Write `blame.json`: whose fault the wrong edits are; see `benchmarks.toy.attribute_failures`."""
        module, family, drawn = find_module("benchmarks", "toy"), self.parts.family, []
        with self.parts.on_device("critic"):
            content = score_with_critic(critic, self.parts.wording, asked, edited, CHUNK).is_accepted()
        chosen = [s.settings.guidance for s in self.recipe.stages if hasattr(s.settings, "guidance")]
        times = few_step_times(DRAWING_STEPS, family.shift(*edited.shape[-2:])).tolist()
        for start in range(0, len(edited), CHUNK):
            captions = asked.target_captions[start : start + CHUNK]
            size = (len(captions), family.facts.channels, *(s // family.facts.stride for s in edited.shape[-2:]))
            noise = torch.randn(size, generator=seeded_generator("blame", start)).to(self.parts.device)
            drawn.append(generate_images(family, captions, noise, times, (chosen or [family.facts.guidance])[-1]).cpu())
        items = module.sample_items(len(edited), self.recipe.seed)
        counts = module.attribute_failures(items, edited, content, torch.cat(drawn))
        if distributed.is_main_process():
            write_text(self.run / FAILURES, json.dumps(counts, indent=1) + "\n")
