"""One update of NP-Edit: time and memory of each part, what each saving gives, and the share of the machine's speed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import (
    MIB,
    median,
    peak_bytes_by_part,
    profiled_parts,
    storage_bytes,
    table,
    time_interleaved,
    wait_for_device,
)
from npedit.critics.base import Critic
from npedit.data import Batch
from npedit.generator import sample_training_times, seeded_generator
from npedit.nets.device import pick_device
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import LoraChoice, MemorySettings, Recipe, torch_dtype
from npedit.steps import np_edit
from npedit.steps.base import Parts
from npedit.training.parts import build_parts, build_source

PARTS = ("draft", "dmd", "critic", "fake")  # of a step, as its timers name them
LORA = LoraChoice(rank=16, alpha=16)


class UnsharedCritic(Critic):
    """A critic that encodes each picture again for each question about it, as a plain version would."""

    def __init__(self, critic: Critic):
        self.critic, self.model, self.device = critic, critic.model, critic.device
        self.yes, self.no = critic.yes, critic.no

    def encode_images(self, images: Tensor) -> list[Tensor]:
        """The pictures themselves; they are encoded when a question is asked."""
        return list(images)

    def logits(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[Tensor]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """Logits, after encoding each picture as often as it is asked about."""
        tokens = iter(self.critic.encode_images(torch.stack([image for look in visual_tokens for image in look])))
        return self.critic.logits(questions, [[next(tokens) for _ in look] for look in visual_tokens], packed, answers)

    load = tiny = generate_text = answer_id = None  # not used here


@dataclass(frozen=True)
class SeparateBases(Parts):
    """Parts whose adapters each have their own frozen base model."""

    def create_trainable(self, role: str, seed: int) -> nn.Module:
        """As in `Parts`, over a copy."""
        base, chosen = copy.deepcopy(self.family.lora_base()), self.lora
        return LoraAdapter.create(base, role, chosen.rank, chosen.alpha, seed)


def variants(recipe: Recipe) -> dict[str, Parts]:
    """Name -> parts for LoRA training: with nothing shared, with each saving alone, and with all of them. Each version
    has its own parts, since a base model serves one set of adapters."""
    return {
        "plain": _parts(recipe),
        "each picture encoded once": _parts(recipe, seen_once=True),
        "encoded prompts cached": _parts(recipe, kept=True),
        "one frozen base model": _parts(recipe, one_base=True),
        "all three (npedit)": _parts(recipe, seen_once=True, kept=True, one_base=True),
    }


def _parts(recipe: Recipe, seen_once: bool = False, kept: bool = False, one_base: bool = False) -> Parts:
    made = build_parts(recipe)
    critic = made.critic if seen_once else UnsharedCritic(made.critic)
    memory = MemorySettings(cached_prompts=10_000 if kept else 0)
    return (Parts if one_base else SeparateBases)(made.family, critic, made.wording, made.device, LORA, memory)


class Bench:
    """Steps on the same few batches, which repeat as photos do in later epochs."""

    def __init__(self, recipe: Recipe, groups: int = 2):
        self.stage = next(s for s in recipe.stages if s.step == "np_edit")
        self.recipe, self.parts, self.source = recipe, build_parts(recipe), build_source(recipe)
        count = np_edit.Step.batches_per_update(self.stage.settings) * self.stage.accumulate
        self.groups = [[self._batch(g * count + i) for i in range(count)] for g in range(groups)]

    def _batch(self, index: int) -> Batch:
        batch = self.source.batch(index, self.stage.batch_size)
        return replace(batch, references=batch.references.to(self.parts.device))

    def step(self, parts: Parts) -> np_edit.Step:
        """A new step with these parts."""
        return np_edit.Step(self.stage.settings, parts, parts.create_trainable("student", 0), self.stage.updates, 0)

    def two_transitions(self, update: int) -> int:
        """The next update whose unroll makes two transitions, as three in four do."""
        times = torch.ones(self.stage.settings.steps)
        while len(sample_training_times(times, seeded_generator(0, "times", update))) < 2:
            update += 1
        return update

    @property
    def pictures(self) -> int:
        """Edited images an update."""
        return self.stage.batch_size * self.stage.accumulate


def static_bytes(step: np_edit.Step) -> int:
    """Bytes that stay between updates: all models (frozen ones too), EMA weights and optimizer state."""
    modules = [m for name in ("text", "vae", "critic") for m in step.parts.frozen_modules(name)]
    modules += [step.parts.family.base, *(learner.net for learner in step.learners.values())]
    state = [t for learner in step.learners.values() for t in learner.state()[0].values()]
    return storage_bytes([*state, *(t for m in modules for t in (*m.parameters(), *m.buffers()))])


def parts_table(bench: Bench, repeats: int) -> str:
    """The table of one update's parts, in full fine-tuning."""
    step, seconds = bench.step(bench.parts), []
    with profiled_parts():
        for turn in range(2 + repeats):
            logged = step.step(bench.groups[turn % len(bench.groups)], bench.two_transitions(turn))
            seconds.append({k.removeprefix("time/"): v for k, v in logged.items() if k.startswith("time/")})
    times = {part: median(s[part] for s in seconds[2:]) for part in (*PARTS, "student")}
    times["student"] -= sum(times[part] for part in PARTS if part != "fake")  # their times are inside the student's
    most = peak_bytes_by_part(lambda: step.step(bench.groups[0], bench.two_transitions(0)))
    total, static = sum(times.values()), static_bytes(step) / MIB
    names = {"draft": "few-step generation: encode, unroll", "dmd": "DMD: fake score and guided teacher",
             "critic": "critic: decode, encode images, ask; back to x0",
             "student": "student: back through the unroll, and its update",
             "fake": "fake score: its updates"}  # fmt: skip
    rows = [(names[p], f"{1000 * times[p]:.0f}", f"{times[p] / total:.0%}", f"{most[p] / MIB:.0f}") for p in names]
    rows.append(("**update**", f"{1000 * total:.0f}", f"{bench.pictures / total:.1f} pictures/s",
                 f"{max(most.values()) / MIB:.0f} (static memory: {static:.0f})"))  # fmt: skip
    return table(("part", "ms", "share", "peak, MiB"), rows)


def savings_table(bench: Bench, repeats: int) -> tuple[str, float]:
    """The table of LoRA training against a plain version of it, and the largest relative difference of any loss."""
    steps = {name: bench.step(parts) for name, parts in variants(bench.recipe).items()}
    logged: dict[str, list[dict[str, float]]] = {name: [] for name in steps}

    def call(name: str, turn: int) -> None:
        batches, update = bench.groups[turn % len(bench.groups)], bench.two_transitions(turn)
        logged[name].append(steps[name].step(batches, update))

    calls = {name: lambda turn, name=name: call(name, turn) for name in steps}
    seconds = time_interleaved(calls, repeats, warm=len(bench.groups))
    largest = max(largest_difference(logged["plain"], seen) for seen in logged.values())
    most = {n: max(peak_bytes_by_part(lambda n=n: call(n, repeats)).values()) for n in steps}
    sizes = {name: (static_bytes(step), static_bytes(step) + most[name]) for name, step in steps.items()}
    rows = []
    for name, taken in seconds.items():
        ratio = median(a / b for a, b in zip(seconds["plain"], taken))
        rows.append((name, f"{1000 * median(taken):.0f}", f"{ratio:.2f}", f"{sizes[name][0] / MIB:.0f}",
                     f"{sizes[name][1] / MIB:.0f}", f"{sizes[name][1] / sizes['plain'][1]:.2f}"))  # fmt: skip
    return table(
        ("version", "ms an update", "times as fast", "static memory, MiB", "peak, MiB", "peak relative to plain"), rows
    ), largest


def largest_difference(a: Sequence[dict[str, float]], b: Sequence[dict[str, float]]) -> float:
    """The largest relative difference of two runs' losses."""
    pairs = [(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x if k.startswith("loss/")]
    return max(abs(x - y) / max(abs(x), 1e-6) for x, y in pairs)


def memory_settings_table(bench: Bench, repeats: int) -> str:
    """The table of settings that save memory at the cost of time."""
    changes = {
        "full fine-tuning": {},
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "decoder_checkpointing": {"decoder_checkpointing": True},
        "both": {"gradient_checkpointing": True, "decoder_checkpointing": True},
    }
    steps = {n: bench.step(replace(bench.parts, memory=MemorySettings(**m))) for n, m in changes.items()}
    steps["lora, rank 16"] = bench.step(_parts(bench.recipe, seen_once=True, one_base=True))

    def call(name: str, turn: int) -> None:
        steps[name].step(bench.groups[turn % len(bench.groups)], bench.two_transitions(turn))

    seconds = time_interleaved({n: lambda turn, n=n: call(n, turn) for n in steps}, repeats)
    rows = []
    for name, step in steps.items():
        most = peak_bytes_by_part(lambda name=name: call(name, repeats))
        first = median(a / b for a, b in zip(seconds[name], seconds["full fine-tuning"]))
        rows.append((name, f"{first:.2f}", f"{static_bytes(step) / MIB:.0f}", f"{max(most.values()) / MIB:.0f}"))
    return table(("setting", "time relative to full fine-tuning", "static memory, MiB", "activation memory, MiB"), rows)


def arithmetic_table(bench: Bench, repeats: int) -> str:
    """The table of an update's speed, compared with a large matrix product on the same machine."""
    step, update = bench.step(bench.parts), bench.two_transitions(0)
    with FlopCounterMode(display=False) as counter:
        step.step(bench.groups[0], update)
    side, dtype = 2048, torch_dtype(bench.recipe.family.dtype)
    a = torch.randn(side, side, device=pick_device(), dtype=dtype)
    seconds = time_interleaved(
        {"matmul": lambda turn: a @ a, "update": lambda turn: step.step(bench.groups[0], update)}, repeats, warm=2
    )
    wait_for_device()
    peak = 2 * side**3 / min(seconds["matmul"])
    speed = counter.get_total_flops() / median(seconds["update"])
    rows = [
        ("an update computes, GFLOP", f"{counter.get_total_flops() / 1e9:.1f}"),
        ("speed of an update, GFLOP/s", f"{speed / 1e9:.1f}"),
        (f"a product of two {side} x {side} matrices of {str(dtype)[6:]}, GFLOP/s", f"{peak / 1e9:.1f}"),
        ("**share of the matrix product's speed**", f"{speed / peak:.0%}"),
    ]
    return table(("", ""), rows)
