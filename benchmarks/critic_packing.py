"""Settings that change how the critic is asked, on a small Z-Image and a small InternVL with random weights.

    python -m benchmarks.critic_packing [--repeats 3]

`python -m benchmarks` runs it too. Two tables: the critic alone, asked 2, 4 and 10 questions about one pair of
pictures; and one update of NP-Edit with one item and five fake-score updates. Operations are counted by torch, so they
are the same on every machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import MIB, median, peak_bytes_by_part, table, time_interleaved
from benchmarks.small_models import Sizes, batch_of_one, build_internvl, build_parts
from npedit.critics.base import Critic, answer_loss
from npedit.generator import sample_training_times, seeded_generator
from npedit.nets.device import pick_device, profiler_activities
from npedit.questions import questions_for
from npedit.recipe.config import MemorySettings
from npedit.steps import np_edit

FAKE_UPDATES = 5
EXPAND = "TRANSFORMERS_SDPA_FORCE_GQA"  # "1": attention with a mask gets grouped keys and values as they are


@dataclass(frozen=True)
class Way:
    """How the critic is asked."""

    packed: bool = False
    checkpointing: bool = False
    keeps_groups: bool = False


WAYS = {
    "one row a question": Way(),
    "packed": Way(packed=True),
    "packed, keys and values not expanded": Way(packed=True, keeps_groups=True),
    "one row a question, checkpointing": Way(checkpointing=True),
    "packed, checkpointing": Way(packed=True, checkpointing=True),
}

UPDATE_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of `memory`, and of the step
    "as before these settings": ({}, {}),
    "packed_questions": ({"packed_questions": True}, {}),
    "critic_checkpointing": ({"critic_checkpointing": True}, {}),
    "packed_questions, critic_checkpointing": ({"packed_questions": True, "critic_checkpointing": True}, {}),
    "fake_samples: replay": ({}, {"fake_samples": "replay"}),
    "all three": ({"packed_questions": True, "critic_checkpointing": True}, {"fake_samples": "replay"}),
}


def critic_table(repeats: int, sizes: Sizes = Sizes(), counts: Sequence[int] = (2, 4, 10)) -> str:
    """The table of the critic alone: from pictures to the gradient of the answers' loss at the edited picture."""
    critic, rows = build_internvl(sizes), []
    for count in counts:
        calls = {name: _gradient_call(critic, way, count, sizes) for name, way in WAYS.items()}
        seconds = time_interleaved(calls, repeats)
        operations = {name: _operations(lambda call=call: call(0)) for name, call in calls.items()}
        plain = next(iter(WAYS))
        for name, call in calls.items():
            ratio = median(a / b for a, b in zip(seconds[plain], seconds[name]))
            cells = (f"{operations[name] / 1e9:.1f}", f"{operations[plain] / operations[name]:.2f}", f"{ratio:.2f}")
            rows.append((count, name, *cells, f"{_peak_bytes(lambda call=call: call(0)) / MIB:.0f}"))
    head = ("questions", "way", "GFLOP", "times fewer operations", "times as fast", "peak, MiB")
    return table(head, rows)


def _gradient_call(critic: Critic, way: Way, count: int, sizes: Sizes) -> Callable[[int], torch.Tensor]:
    texts = [q.text for q in questions_for("recolour", "paint the wooden fence dark red")]
    asked = [f"{texts[i % 2]} {'it ' * (i // 2)}" for i in range(count)]
    pictures = torch.rand(2, 3, sizes.seen[0], sizes.seen[0], generator=torch.Generator().manual_seed(0))

    def call(turn: int) -> torch.Tensor:
        edited = pictures[1:].clone().requires_grad_()
        with _grouped_keys(way.keeps_groups), critic.gradient_checkpointing(way.checkpointing):
            with torch.no_grad():
                (reference,) = critic.encode_images(pictures[:1])
            seen = [[reference, *critic.encode_images(edited)]]
            margin = critic.margin(asked, seen * count, way.packed)
            loss = answer_loss(margin, torch.ones(count)).sum()
            return torch.autograd.grad(loss, edited)[0]

    return call


@contextmanager
def _grouped_keys(kept: bool) -> Iterator[None]:
    before = os.environ.get(EXPAND)
    os.environ[EXPAND] = "1" if kept else "0"
    try:
        yield
    finally:
        os.environ.pop(EXPAND)
        if before is not None:
            os.environ[EXPAND] = before


def _operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds beside those from before it."""
    device = pick_device()
    with profile(activities=profiler_activities(device), profile_memory=True) as seen:
        call()
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type().name.lower() == device.type:
            held += event.nbytes()
            most = max(most, held)
    return most


def update_table(repeats: int, sizes: Sizes = Sizes(), side: int = 256) -> str:
    """The table of one update with one item and five fake-score updates, LoRA of rank 16."""
    parts = build_parts(sizes)
    steps, logged = {}, {}
    for name, (memory, settings) in UPDATE_SETTINGS.items():
        chosen = np_edit.NpEditSettings(fake_updates=FAKE_UPDATES, **settings)
        these = replace(build_parts(sizes), memory=MemorySettings(**memory)) if steps else parts
        steps[name] = np_edit.Step(chosen, these, these.create_trainable("student", 0), 100, 0)

    def call(name: str, turn: int) -> None:
        step = steps[name]
        count = step.batches_per_update(step.settings)
        batches = [batch_of_one(turn * count + i, side) for i in range(count)]
        logged[name] = step.step(batches, _with_two_transitions(turn, step.settings.steps))

    calls = {name: lambda turn, name=name: call(name, turn) for name in steps}
    seconds = time_interleaved(calls, repeats)
    operations = {name: _operations(lambda name=name: call(name, repeats)) for name in steps}
    plain, rows = next(iter(steps)), []
    for name, taken in seconds.items():
        by_part = peak_bytes_by_part(lambda name=name: call(name, repeats))
        ratio = median(a / b for a, b in zip(seconds[plain], taken))
        rows.append((name, f"{operations[name] / 1e9:.0f}", f"{operations[plain] / operations[name]:.2f}",
                     f"{median(taken):.2f}", f"{ratio:.2f}", f"{by_part['critic'] / MIB:.0f}",
                     f"{max(by_part.values()) / MIB:.0f}"))  # fmt: skip
    head = ("setting", "GFLOP an update", "times fewer operations", "seconds", "times as fast")
    return table((*head, "peak of the critic, MiB", "peak, MiB"), rows)


def _with_two_transitions(update: int, steps: int) -> int:
    """The next update whose unroll makes two transitions, the larger of the two kinds."""
    times = torch.ones(steps)
    while len(sample_training_times(times, seeded_generator(0, "times", update))) < 2:
        update += 1
    return update


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.critic_packing")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is timed; medians are shown")
    chosen = parser.parse_args()
    for maker in (critic_table, update_table):
        Console(soft_wrap=True).print(maker(chosen.repeats) + "\n", markup=False, highlight=False)


if __name__ == "__main__":
    main()
