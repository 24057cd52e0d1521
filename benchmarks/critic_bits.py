"""How much the toy critic's answers and gradients change with weights of 8 or 4 bits, on any device.

    python -m benchmarks.critic_bits [--items 90]

`critic.bits` uses bitsandbytes, which needs CUDA. Here the same layers are rounded in plain torch (nets/quantised.py):
8 bits with one scale per row, 4 bits in NormalFloat with one scale per 64 weights. bitsandbytes also rounds activations
with 8 bits, so its figures will differ. The critic sees held-out toy scenes with their true edits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.measure import median, table
from npedit.benchmarks import toy
from npedit.critics._bits import NOT_QUANTISED
from npedit.critics.base import Critic
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.nets.device import pick_device
from npedit.nets.quantised import quantise_linear_layers
from npedit.questions import questions_for
from npedit.recipe.config import embedded_weights
from npedit.toy.edits import Edit
from npedit.toy.world import render

BITS = (8, 4)


@dataclass(frozen=True)
class Answers:
    """Of each item: the margins (logits) of its questions, and the gradient of their sum at the edited image."""

    margins: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def load_critic(bits: int) -> Critic:
    """The toy's critic with the linear layers of its language model in so many bits; 0: as they are."""
    critic = LlavaOnevision.load(embedded_weights("critic"), torch.float32, pick_device())
    if bits:
        quantise_linear_layers([critic.model], bits, skip=NOT_QUANTISED)
    return critic


def ask(critic: Critic, edits: Sequence[Edit]) -> Answers:
    """The critic's answers about the true edited images."""
    found = [_ask_about(critic, edit) for edit in edits]
    return Answers(*(tuple(values) for values in zip(*found)))


def _ask_about(critic: Critic, edit: Edit) -> tuple[Tensor, Tensor]:
    questions = questions_for(edit.edit_type, edit.instruction, edit.object, "short")
    pictures = render([edit.reference, edit.target]).to(pick_device())
    edited = pictures[1:].requires_grad_()
    tokens = dict(zip(("reference", "edited"), (*critic.encode_images(pictures[:1]), *critic.encode_images(edited))))
    margin = critic.margin([q.text for q in questions], [[tokens[name] for name in q.looks_at] for q in questions])
    (gradient,) = torch.autograd.grad(margin.sum(), edited)
    return margin.detach(), gradient


def bits_table(items: int) -> str:
    """The table: changes against the weights as they are."""
    edits = toy.sample_items(items)
    plain, rows = ask(load_critic(0), edits), []
    for bits in BITS:
        found = ask(load_critic(bits), edits)
        before, after = torch.cat(plain.margins), torch.cat(found.margins)
        changes = (after - before).abs()
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found.gradients, plain.gradients)]
        flipped = int(((after > 0) != (before > 0)).sum())
        cells = (f"{changes.median():.3f}", f"{changes.max():.3f}", f"{flipped} of {len(before)}")
        rows.append((bits, *cells, f"{median(errors):.3f}", f"{max(errors):.3f}"))
    margins = ("change of the margin, median", "largest", "answers that change")
    return table(("bits", *margins, "relative change of the gradient, median", "largest"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=90)
    Console(soft_wrap=True).print(bits_table(parser.parse_args().items), highlight=False, markup=False)


if __name__ == "__main__":
    main()
