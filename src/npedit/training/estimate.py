"""`npedit estimate`: the memory that training by a recipe needs, by part and phase, without weights and without a GPU.

The recipe's models are built on the meta device from their configs. Then each of its steps makes one update there
(`nets/meta_device.py`). So the estimate counts what the code does: offloading, adapters, gradient checkpointing, the
optimizer's temporaries. Only sharding is calculated: the shards, plus five times the largest block (two gathered
blocks, the gradient of one, and that gradient again in float32).

Not counted: CUDA's context and libraries (usually .5 to 1 GiB), fragmentation of the allocator, and memory inside
kernels. A test compares the estimate with the measurements of torch's profiler on a CPU at tiny size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from npedit.critics._bits import bytes_per_weight, quantisable_weights
from npedit.critics.base import Critic
from npedit.data import PairedBatch
from npedit.families.base import Family
from npedit.generator import edit_images, items_per_pass
from npedit.nets.master_weights import add_master_weights, master_weight
from npedit.nets.meta_device import ACTIVATIONS, META, MemoryCounter, current_part
from npedit.nets.offload import host_bytes
from npedit.questions import SCENE
from npedit.recipe.config import CriticChoice, Recipe, Stage, find_class, find_module, torch_dtype
from npedit.scoring.critic_scores import score_with_critic
from npedit.steps.base import Judge, Parts, Step, family_modules
from npedit.training.models_without_weights import open_critic, open_family
from npedit.training.parts import STAGE_SEEDS, check_processes
from npedit.training.stages import stage_names, student_calls

SAMPLE_RUBRIC = json.dumps([{"question": "Is the fence in the photo dark red?", "answer": "yes"}] * 3)
SAMPLE_PROMPT = "paint the fence dark red"  # used for every prompt; the stand-in tokenizers give it a usual length
FROZEN = {"text": "text", "vae": "VAE", "critic": "critic", "judge": "judge"}  # a name of `Parts.on_device` -> a column
COLUMNS = ("base", *FROZEN.values(), "student", "fake", "averages", "optimizer", "gradients", "gathered", ACTIVATIONS)
OPTIMIZER_TEMPORARIES, EIGHT_BIT = "stepping", "moments of 8 bits"  # counted separately, shown in another column
QUANTISED = {column: f"{column} of few bits" for column in ("critic", "judge")}
COMPUTE_WEIGHTS = {role: f"{role} rounded" for role in ("student", "fake")}  # weights in the compute dtype
SHOWN_AS = {OPTIMIZER_TEMPORARIES: ACTIVATIONS, EIGHT_BIT: "optimizer"} | {
    v: k for k, v in (COMPUTE_WEIGHTS | QUANTISED).items()
}
SHARE_OF_8_BIT = 0.2539  # of float32: one byte per number, and one float32 per 256 numbers
GIB = 2**30


@dataclass(frozen=True)
class Phase:
    """The peak memory of one part of training: bytes by the names in `COLUMNS`. "loading" is the opening of the models.
    The parts of a step are those of `time/*` in metrics.jsonl; "student" is the student's backward pass and update.
    `flops` is the floating-point operations of the part in one update of one process."""

    name: str
    bytes_by_part: dict[str, int]
    flops: float = 0.0

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.bytes_by_part.values())


@dataclass(frozen=True)
class Estimate:
    """The memory of one process by phase; `disk`: bytes of what is written or downloaded; `offloaded`: bytes in the
    CPU's memory that each process keeps frozen models in, with `memory.offload`."""

    phases: tuple[Phase, ...]
    disk: dict[str, int]
    offloaded: int

    @property
    def peak(self) -> Phase:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.total)


def estimate(recipe: Recipe, processes: int = 1, at_once: bool = True) -> Estimate:
    """The memory that each of `processes` processes needs to train by this recipe. With `at_once` the optimizer updates
    all parameters together (foreach, as on CUDA), otherwise one after the other (as on a CPU).

    Raises:
        UserError: the models' configs are missing or belong to another family or critic; batches cannot be shared.
    """
    check_processes(recipe, processes)
    is_sharded = processes > 1 and recipe.trainer.shard != "none"
    counter, checkpoint_size = MemoryCounter(), 0
    with counter, _count_optimizer_steps(counter, at_once):
        parts = _open_parts(recipe, counter, is_sharded)
        phases = _collect_phases("", counter, 0)
        gathered_bytes = _gathered_weights(parts.family) if is_sharded else 0
        if is_sharded:
            _count_shards(recipe, 0, parts, processes)
        student = parts.create_trainable("student", recipe.seed)
        for i, (stage, name) in enumerate(zip(recipe.stages, stage_names(recipe), strict=True)):
            if is_sharded:
                _count_shards(recipe, i, parts, processes)
            step = _build_step(recipe, i, student, parts)
            _run_update(recipe, i, step, processes)
            checkpoint_size = max(checkpoint_size, _checkpoint_size(step))
            phases += _collect_phases(f"{name}: ", counter, gathered_bytes, stage)
        with _counted_part("samples"):
            _run_samples(recipe, parts, step)
        if parts.judge:
            with _counted_part("judge"):
                _ask_judge(recipe, parts, parts.judge)
        phases += _collect_phases("", counter, gathered_bytes)
        disk = _disk_usage(recipe, parts, step, checkpoint_size)
        offloaded = [m for name in FROZEN for m in parts.frozen_modules(name)] if recipe.memory.offload else []
    return Estimate(tuple(phases), disk, host_bytes(offloaded))


# ------------------------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class _MetaParts(Parts):
    """Parts on the meta device. Adapters are made there; offloaded parts are not counted."""

    counter: MemoryCounter = field(default_factory=MemoryCounter)
    is_sharded: bool = False

    def __post_init__(self) -> None:
        """Nothing: `_open_parts` moves each part away when it is opened."""

    def create_trainable(self, role: str, seed: int) -> nn.Module:
        with META:
            net = super().create_trainable(role, seed)
        if self.is_sharded and self.lora is None:  # float32 shards alone are made: count each when it is made
            for param in net.parameters():
                add_master_weights([param])
                self.counter.label(role, [master_weight(param)])
        return net

    def load_modules(self, names: Sequence[str]) -> None:
        for name in names:
            self.counter.add_bytes(FROZEN[name], self._size(name))

    def unload_modules(self, names: Sequence[str]) -> None:
        for name in names:
            self.counter.add_bytes(FROZEN[name], -self._size(name))

    def move_away(self, *names: str) -> None:
        """With `memory.offload`, parts that were just opened leave the device."""
        if self.memory.offload:
            self.unload_modules(names)

    def _size(self, name: str) -> int:
        tensors = (t for module in self.frozen_modules(name) for t in _tensors(module))
        return _bytes(t for t in tensors if t.is_meta)  # other tensors were not counted


def _open_parts(recipe: Recipe, counter: MemoryCounter, is_sharded: bool) -> _MetaParts:
    """The recipe's models, opened and moved away in the order of `build_parts`; counted as the phase "loading"."""
    family, chosen = open_family(recipe), recipe.critic
    counter.label("base", [*_tensors(family.base), *_tensors(family.lora_base() if recipe.lora else family.base)])
    for name in ("text", "vae"):
        counter.label(FROZEN[name], (t for module in family_modules(family, name) for t in _tensors(module)))
    held = [counter.live.copy()]
    wording = chosen.wording if chosen else "plain"
    parts = _MetaParts(family, None, wording, META, recipe.lora, recipe.memory, counter=counter, is_sharded=is_sharded)
    parts.move_away("text", "vae")
    if chosen and any("critic" in find_class("steps", s.step).requirements(s.settings) for s in recipe.stages):
        parts = replace(parts, critic=_open_critic("critic", chosen, counter))
        held.append(counter.live.copy())
        parts.move_away("critic")
    if recipe.judge:
        judge = Judge(_open_critic("judge", recipe.judge, counter), recipe.judge.wording)
        parts = replace(parts, judge=judge)
        held.append(counter.live.copy())
        parts.move_away("judge")
    counter.peaks = {"loading": max(held, key=lambda sizes: sizes.total())}
    return parts


def _open_critic(part: str, chosen: CriticChoice, counter: MemoryCounter) -> Critic:
    """A critic or a judge, counted."""
    critic, column = open_critic(part, chosen), FROZEN[part]
    counter.label(column, _tensors(critic.model))
    if chosen.bits:
        counter.share[QUANTISED[column]] = bytes_per_weight(chosen.bits) / torch_dtype(chosen.dtype).itemsize
        counter.label(QUANTISED[column], quantisable_weights(critic.model))
        critic.model.is_quantized = True  # so it is not moved
    return critic


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the float32 weights."""
    return [w.grad for w in map(master_weight, params) if w.grad is not None]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


# ------------------------------------------------------------------------------------------------------- sharding


def _count_shards(recipe: Recipe, i: int, parts: _MetaParts, processes: int) -> None:
    """From stage `i` on, count the shards of one process: trained models under full fine-tuning, in float32; in the
    last stage the frozen base too."""
    if not recipe.lora:
        is_sharded = ("student", "fake", "averages", "optimizer", "gradients", OPTIMIZER_TEMPORARIES)
        parts.counter.share |= dict.fromkeys(is_sharded, 1 / processes)
        parts.counter.share |= dict.fromkeys(COMPUTE_WEIGHTS.values(), 0)  # gathered block by block: `_gathered_bytes`
        parts.counter.share[EIGHT_BIT] = SHARE_OF_8_BIT / processes
    if i + 1 == len(recipe.stages):
        parts.counter.share["base"] = 1 / processes
        parts.counter.label("base", _tensors(parts.family.base))


def _gathered_weights(family: Family) -> int:
    """Bytes that are gathered while a sharded model computes; see the module's docstring."""
    blocks = [block for name in family.facts.blocks for block in family.base.get_submodule(name).children()]
    sizes = [_bytes(block.parameters()) for block in blocks]
    return _bytes(family.base.parameters()) - sum(sizes) + 5 * max(sizes)


# ---------------------------------------------------------------------------------------------- one update per stage


@contextmanager
def _counted_part(name: str) -> Iterator[None]:
    token = current_part.set(name)
    try:
        yield
    finally:
        current_part.reset(token)


@contextmanager
def _count_optimizer_steps(counter: MemoryCounter, at_once: bool) -> Iterator[None]:
    """Count the temporaries of optimizer steps separately."""

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        counter.working = OPTIMIZER_TEMPORARIES
        for group in optimizer.param_groups:
            group["foreach"] = at_once

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        counter.working = ACTIVATIONS
        part = current_part.get()
        counter.flops_at_optimizer_steps[part].append(counter.flops[part])

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build_step(recipe: Recipe, i: int, student: nn.Module, parts: _MetaParts) -> Step:
    """The stage's step, with the state of its optimizers; all tensors are labelled."""
    stage, counter = recipe.stages[i], parts.counter
    changes: dict[str, Any] = {}
    if hasattr(stage.settings, "fake_updates"):
        changes["fake_updates"] = min(2, stage.settings.fake_updates)
    optimizers = {
        role: getattr(stage.settings, role).optimizer for role in ("student", "fake") if hasattr(stage.settings, role)
    }
    for role in optimizers:  # 8-bit AdamW needs CUDA; its state is counted as a share of float32
        chosen = getattr(stage.settings, role)
        # bitsandbytes always keeps both moments
        moments = {"betas": (0.9, 0.99)} if chosen.optimizer == "adamw8bit" else {}
        changes[role] = chosen.model_copy(update={"optimizer": "adamw", **moments})
    kind, seed = find_class("steps", stage.step), recipe.seed + STAGE_SEEDS * i
    with _counted_part("set-up"):
        step = kind(stage.settings.model_copy(update=changes), parts, student, stage.updates, seed)
    for role, learner in step.learners.items():
        trained = [p for p in learner.net.parameters() if p.requires_grad]
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: counter.label("gradients", _gradients([p])))
        counter.label(COMPUTE_WEIGHTS[role], trained)
        with _counted_part("first moments"):
            learner.update([lambda trained=trained: sum(p.mean() for p in trained)])
        optimizer = "optimizer" if optimizers[role] == "adamw" else EIGHT_BIT
        names = {"net": role, "buffer": role, "ema": "averages", "optimizer": optimizer}
        for key, tensor in learner.state()[0].items():
            counter.label(names[key.split(".")[0]], [tensor])
    counter.peaks.pop("first moments", None)
    return step


def _run_update(recipe: Recipe, i: int, step: Step, processes: int) -> None:
    """One update of a stage, with the largest pictures and two transitions of the few-step generator."""
    stage = recipe.stages[i]
    update = next((u for u in range(100) if student_calls(recipe, i, u) == 2), 0)
    per_update = 2 if hasattr(step.settings, "fake_updates") and step.batches_per_update(step.settings) > 1 else 1
    batch = _largest_batch(recipe, stage.batch_size // processes)
    with _counted_part("update"):
        step.step([batch] * (per_update * min(2, stage.accumulate)), update)


def _largest_batch(recipe: Recipe, size: int) -> PairedBatch:
    height, width = _largest_size(recipe)
    pictures, texts = torch.empty(size, 3, height, width, device=META), (SAMPLE_PROMPT,) * size
    settings: Any = recipe.data.settings
    has_share = getattr(settings, "shares", {}).get(SCENE, 0) > 0
    has_scenes = has_share or SCENE in getattr(settings, "edit_types", ())  # with three questions, and another photo
    kinds = (SCENE if has_scenes else "replace",) * size
    others = pictures if has_scenes and settings.other_photos else None
    own: dict[str, Any] = {"other_photos": others, "questions": (SAMPLE_RUBRIC,) * size}
    return PairedBatch(texts, pictures, texts, kinds, texts, texts, texts, **own, edited=pictures)


def _largest_size(recipe: Recipe) -> tuple[int, int]:
    settings: Any = recipe.data.settings
    has_sizes = hasattr(settings, "sizes")
    sizes = settings.sizes if has_sizes else find_module("data", recipe.data.name).Source(settings, recipe.seed).sizes
    return max(sizes, key=lambda s: s[0] * s[1])


def _run_samples(recipe: Recipe, parts: _MetaParts, step: Step) -> None:
    """The samples of a run, edited as the trainer edits them."""
    height, width = _largest_size(recipe)
    count = items_per_pass(height, width)
    if not (recipe.trainer.benchmark or parts.judge):
        count = min(count, recipe.trainer.sample_items)
    batch = _largest_batch(recipe, count)
    with step.learners["student"].use_ema_weights() as net, parts.on_device("text", "vae"):
        edit_images(parts.family, net, batch.references, batch.instructions, list(range(count)), recipe.trainer.steps,
             recipe.memory.decode_tile)  # fmt: skip


def _ask_judge(recipe: Recipe, parts: _MetaParts, judge: Judge) -> None:
    """The judge's answers about edited pictures, as the trainer asks for them."""
    count = items_per_pass(*_largest_size(recipe))
    batch = _largest_batch(recipe, count)
    with parts.on_device("text", "vae", "judge"):
        score_with_critic(judge.critic, judge.wording, batch, batch.references, count)


def _update_flops(stage: Stage | None, part: str, counter: MemoryCounter) -> float:
    """Operations of a part in an update of the recipe, from those of the one that was counted, which has at most two
    batches and two fake score updates. Fake score updates after the first are all like the second."""
    counted = float(counter.flops[part])
    if stage is None or part == "set-up":
        return counted
    if part == "fake" and len(ends := counter.flops_at_optimizer_steps[part]) == 2:
        settings: Any = stage.settings
        counted = ends[0] + (settings.fake_updates - 1) * (ends[1] - ends[0])
    return counted * stage.accumulate / min(2, stage.accumulate)


def _collect_phases(
    prefix: str, counter: MemoryCounter, gathered_bytes: int, stage: Stage | None = None
) -> list[Phase]:
    """The phases counted since the last call, by part of the step."""
    found = []
    for part, sizes in counter.peaks.items():
        columns: dict[str, int] = {"gathered": gathered_bytes}
        for what, size in sizes.items():
            column = SHOWN_AS.get(what, what)
            columns[column] = columns.get(column, 0) + size
        if part:  # otherwise between two parts
            found.append(Phase(prefix + part, columns, _update_flops(stage, part, counter)))
    counter.peaks.clear()
    counter.flops.clear()
    counter.flops_at_optimizer_steps.clear()
    return found


def _checkpoint_size(step: Step) -> int:
    learners = sum(_bytes(learner.state()[0].values()) for learner in step.learners.values())
    return learners + _bytes(step.extra_state().values())


def _disk_usage(recipe: Recipe, parts: _MetaParts, step: Step, checkpoint_size: int) -> dict[str, int]:
    net = step.learners["student"].net
    final = _bytes(master_weight(p) for p in net.parameters() if p.requires_grad)
    pipe = [m for m in parts.family.pipe.components.values() if isinstance(m, nn.Module)]
    asked = [parts.critic, parts.judge.critic if parts.judge else None]
    models = [*pipe, *(critic.model for critic in asked if critic)]
    keep = recipe.trainer.keep
    return {
        "models to open, in the recipe's types:": sum(_bytes(m.parameters()) for m in models),
        f"checkpoints, {keep} kept and one being written:": (keep + 1) * checkpoint_size,
        "finished editor:": final,
    }
