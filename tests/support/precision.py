"""One update of every family at tiny size, in all the ways that a recipe can ask for; run in one process or in two."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from npedit.families.base import EncodedText, Family
from npedit.nets import distributed
from npedit.nets.learner import Learner, LearnerSettings
from npedit.recipe.config import LoraChoice, MemorySettings, available_names, find_class, torch_dtype
from npedit.steps.base import Parts

SIDE = 32
PROMPTS = ("paint the circle red", "remove the dog", "add a square", "do nothing")
TIMES = (0.9474, 0.3, 0.8571, 0.6667)  # none is a bfloat16 number


@dataclass(frozen=True)
class Case:
    """One way to train one family. `items` are those of each of two processes."""

    family: str
    lora: bool
    dtype: str
    checkpointing: bool
    items: int

    def __str__(self) -> str:
        way = "lora" if self.lora else "full"
        blocks = "checkpointing" if self.checkpointing else "plain"
        return f"{self.family} {way} {self.dtype} {blocks} {self.items}"


def cases() -> Iterator[Case]:
    """Every family in every way."""
    for family in available_names("families"):
        for lora, dtype, checkpointing, items in itertools.product(
            (False, True), ("float32", "bfloat16"), (False, True), (1, 2)
        ):
            yield Case(family, lora, dtype, checkpointing, items)


@cache
def tiny_family(name: str, dtype: str) -> tuple[Family, EncodedText]:
    """The family's tiny model, loaded in this type, and the encoded prompts. Its denoiser is to be copied, not used."""
    made = find_class("families", name).tiny(0)
    logging.set_verbosity_error()  # diffusers warns of each model that is cast
    for part in made.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch_dtype(dtype))
    return made, made.encode_text(PROMPTS)


def make_parts(case: Case) -> Parts:
    """The frozen parts of a case."""
    lora = LoraChoice(rank=4, alpha=4.0) if case.lora else None
    memory = MemorySettings(gradient_checkpointing=case.checkpointing)
    family, _ = tiny_family(case.family, case.dtype)
    family, base = copy.copy(family), copy.deepcopy(family.base)
    family.pipe = copy.copy(family.pipe)
    family.base = family.pipe.transformer = base
    return Parts(family, None, "short", torch.device("cpu"), lora, memory)


def velocities(case: Case, family: Family, net: nn.Module, reference: bool) -> Tensor:
    """v of this process's items. A single process has the items of both, and calls the net once for each, because a
    kernel may round otherwise in a batch of another size."""
    stride, world, rank = family.facts.stride, distributed.world_size(), distributed.rank()
    shape = (4, family.facts.channels, SIDE // stride, SIDE // stride)
    x, shown = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t, text = torch.tensor(TIMES), tiny_family(case.family, case.dtype)[1]
    found = []
    for process in [rank] if world > 1 else range(2):
        rows = torch.arange(process * case.items, (process + 1) * case.items)
        found.append(family.velocity(net, x[rows], t[rows], text.select(rows), (shown[rows],) if reference else ()))
    return torch.cat(found)


def update(case: Case, shard: str) -> dict[str, Any]:
    """What one update of a student shows: the gradient's norm; without gradient checkpointing also velocities before it
    (student with a reference, fake score and teacher without) and the student's velocities after it."""
    parts = make_parts(case)
    family = parts.family
    plan = family.facts.blocks, torch_dtype(case.dtype), parts.device
    distributed.set_sharding_plan(shard, *plan)
    roles = ("student",) if case.checkpointing else ("student", "fake")
    learners = {r: Learner(parts.create_trainable(r, 0), LearnerSettings(lr=1e-3, ema=0.0), 10) for r in roles}
    if shard != "none":
        for net in (family.base, *([family.lora_base()] if case.lora else [])):
            distributed.shard_frozen(net)
    student, seen = learners["student"].net, {}
    if not case.checkpointing:
        with torch.no_grad():
            seen["before"] = velocities(case, family, student, True)
            seen["fake"] = velocities(case, family, learners["fake"].net, False)
            seen["teacher"] = velocities(case, family, family.base, False)

    def loss() -> Tensor:
        return sum(velocities(case, family, student, True).float().square().mean() for _ in range(2))

    logged = learners["student"].update([loss])
    if not case.checkpointing:
        with torch.no_grad():
            seen["after"] = velocities(case, family, student, True)
    distributed.set_sharding_plan("none", *plan)
    found = {k: torch.cat(distributed.all_gather(v.float())).tolist() for k, v in seen.items()}
    return found | {"grad_norm": logged["grad_norm"], "skipped": logged["skipped"]}


def update_all(chosen: list[Case], shard: str) -> dict[str, Any]:
    """The outcome of each case, or its error as text."""
    found: dict[str, Any] = {}
    with distributed.process_group():
        for case in chosen:
            try:
                found[str(case)] = update(case, shard)
            except Exception as error:  # noqa: BLE001 it is the outcome
                found[str(case)] = f"{type(error).__name__}: {error}"
    return found
