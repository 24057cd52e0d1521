"""Run a recipe end to end for a few updates, with random weights, and measure what a real training would need.

The rehearsal trains through the ordinary code: `trainer.train`, the ordinary loaders, the ordinary run folder. Only the
recipe differs (`rehearsal_recipe`): its models are folders of random weights, its photos are a random `imagefolder`,
and each stage has two updates. The seed is one with which the second of them calls the student twice, as most updates
do. Training is stopped by SIGTERM before its last update, resumed, and finished.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from npedit.data._settings import PhotoSettings
from npedit.errors import UserError, explain_write_errors
from npedit.nets import distributed
from npedit.nets.device import device_name, is_accelerator, pick_device, synchronize
from npedit.recipe.config import Recipe, make_recipe, torch_dtype
from npedit.rehearsal.phase_memory import PhaseMemory
from npedit.rehearsal.random_models import write_random_models
from npedit.rehearsal.random_photos import types_of_shares, write_random_photos
from npedit.runs.checkpoint import METRICS
from npedit.runs.files import read_rows
from npedit.runs.resolve import complete_checkpoints
from npedit.steps.base import Parts, Timers
from npedit.training.estimate import FROZEN, GIB, Estimate, estimate
from npedit.training.parts import build_parts, build_source
from npedit.training.stages import stage_names, student_calls
from npedit.training.trainer import train

UPDATES = 2  # of each stage; the last one calls the student twice
SEEDS = 10_000  # that are tried for this
EVALUATED = 16  # items of an evaluation, at most
LOADER_SECONDS = 3.0
PARTS = {"time/look": "samples and evaluation", "time/data": "waiting for data"}
PAGE_BYTES = 4096
REDUCED_BYTES = 64 * 2**20  # of the tensor that measures the bandwidth between processes
REDUCE_REPEATS = 5
PRODUCT_SIDE, PRODUCT_REPEATS = 1024, 10  # rows of the square matrices on a CPU; eight times as many on a GPU


@dataclass
class Measured:
    """What a rehearsal measured. Times are seconds by phase, of the second update of each stage; memory is GiB by
    phase, of the process that held most."""

    recipe: Recipe
    run: Path
    expected: Estimate
    seconds: dict[str, float]
    memory: dict[str, float] = field(default_factory=dict)
    baseline: float = 0.0
    checkpoint_bytes: int = 0
    save_seconds: list[float] = field(default_factory=list)
    free_bytes: int = 0
    loader_items_per_second: float = 0.0
    reduce_gb_per_second: float | None = None
    product_flops_per_second: float = 0.0  # of large matrix products in the family's number type
    on_accelerator: bool = False


def rehearsal_recipe(
    recipe: Recipe, models: dict[str, str], photos: Path | None, size: tuple[int, int] | None
) -> Recipe:
    """The recipe as it is rehearsed: see the module's head. `models` is recipe key -> folder, as
    `write_random_models` returns it; `size` is (H, W) in pixels, None for the recipe's own sizes."""
    raw = recipe.as_dict()
    raw |= {"start": "", "stages": [_short_stage(stage) for stage in raw["stages"]]}
    raw["trainer"] |= {"sample_every": 0, "evaluate_every": 0, "save_every": 1}
    raw["trainer"]["evaluate_items"] = min(raw["trainer"]["evaluate_items"], EVALUATED)
    for key, folder in models.items():
        part, name = key.split(".")
        raw[part][name] = folder
    if photos:
        shared = {key: value for key, value in raw["data"].items() if key in PhotoSettings.model_fields}
        own = {"name": "imagefolder", "path": str(photos), "columns": {}, "share": 1.0, "held_out": 0}
        raw["data"] = shared | own
    if size:
        raw["data"]["sizes"] = [list(size)]
    return _with_long_updates(make_recipe(raw))


def _with_long_updates(recipe: Recipe) -> Recipe:
    """The recipe with the first seed, from its own on, with which each stage's last update calls the student twice. An
    editor of one step has no such update, and keeps its seed."""
    seeds = range(recipe.seed, recipe.seed + SEEDS) if recipe.trainer.steps > 1 else ()
    tried = (recipe.model_copy(update={"seed": seed}) for seed in seeds)
    stages = range(len(recipe.stages))
    return next((r for r in tried if all(student_calls(r, i, UPDATES - 1) == 2 for i in stages)), recipe)


def _short_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage with `UPDATES` updates. Its learning rate's warm-up is left as it is."""
    return {**stage, "updates": UPDATES}


def check_rehearsable(recipe: Recipe, size: tuple[int, int] | None) -> None:
    """Refuse what a rehearsal cannot do.

    Raises:
        UserError: a size is given, and the data source has no setting for it.
    """
    if size and not hasattr(recipe.data.settings, "sizes"):
        raise UserError(
            f"--size: expected a recipe whose data has sizes; got data.name {recipe.data.name}; leave --size out"
        )


def rehearse(recipe: Recipe, folder: Path, layers: int | None, size: tuple[int, int] | None) -> Measured:
    """Rehearse a recipe in `folder`, a new one; every process of a group calls this. Models, photos and the run are
    written below `folder`.

    Raises:
        UserError: what `train` raises; models whose configs are not at hand; too little free disk.
    """
    check_rehearsable(recipe, size)
    short = _prepare(recipe, folder, layers, size)
    expected = distributed.broadcast_object(_estimate(short) if distributed.is_main_process() else None)
    memory = PhaseMemory(pick_device())
    watched = _Watch(short, memory)
    run = folder / "run"
    Timers.around = memory.measure
    try:
        watched.train_until_stop(run)
        gc.collect()
        train(short, run, on_event=watched.on_event, parts=build_resident_parts)
    finally:
        Timers.around = nullcontext
    return _collect(short, run, expected, memory, watched)


def _prepare(recipe: Recipe, folder: Path, layers: int | None, size: tuple[int, int] | None) -> Recipe:
    """Write models and photos in the first process; returns the rehearsal's recipe in all."""
    short = None
    if distributed.is_main_process():
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if layers is None:
            _require_free_disk(sum(_estimate(recipe).disk.values()), folder)
        models = write_random_models(recipe, folder, layers)
        photos = None
        settings: Any = recipe.data.settings
        if hasattr(settings, "path"):
            types = types_of_shares(settings.shares)
            has_masks = any(getattr(stage.settings, "keep_weight", 0) for stage in recipe.stages)
            sizes = [size] if size else settings.sizes
            photos = write_random_photos(folder / "photos", sizes, types=types, with_masks=has_masks)
        short = rehearsal_recipe(recipe, models, photos, size)
    return distributed.broadcast_object(short)


def _estimate(recipe: Recipe) -> Estimate:
    """The recipe's estimate, made in a new process: outside the process group, and without use of this one's memory."""
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        count, at_once = distributed.world_size(), is_accelerator(pick_device())
        return pool.submit(estimate, recipe, count, at_once).result()


def _require_free_disk(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"expected {needed / GIB:.1f} GiB of free disk for random models and checkpoints; got {free / GIB:.1f} GiB "
            f"in {folder}; choose another folder with --out, or fewer blocks with --layers"
        )


def build_resident_parts(recipe: Recipe) -> Parts:
    """The recipe's parts with all weights in memory. On a CPU the loaders map files, so that weights which no update
    reads, such as rarely used embeddings, would be missing from the measured memory."""
    made = build_parts(recipe)
    models = [made.family.base, *(m for name in FROZEN for m in made.frozen_modules(name))]
    if not is_accelerator(made.device):
        for tensor in (t for model in models for t in model.parameters()):
            tensor.detach().view(-1).view(torch.uint8)[::PAGE_BYTES].clone()
    return made


class _Watch:
    """Follows a rehearsal's events: names the stage for `PhaseMemory`, times saves, stops before the last update."""

    def __init__(self, recipe: Recipe, memory: PhaseMemory) -> None:
        self.recipe, self.memory = recipe, memory
        named = zip(stage_names(recipe), recipe.stages, strict=True)
        self.stage_of = [name for name, stage in named for _ in range(stage.updates)]
        self.saved: list[float] = []
        self._name_stage(0)

    def train_until_stop(self, run: Path) -> None:
        """Train until a SIGTERM, sent after the last update but one, has ended the training."""
        try:
            train(self.recipe, run, resume=False, on_event=self._stop_before_end, parts=build_resident_parts)
        except SystemExit as stop:
            if stop.code != os.EX_TEMPFAIL:
                raise
        else:
            raise UserError(
                "expected the training to stop on SIGTERM and to exit with 75; got a finished training. This is a "
                "fault of npedit: please report it"
            )

    def _stop_before_end(self, event: str, facts: dict[str, Any]) -> None:
        self.on_event(event, facts)
        if event == "update" and facts["step"] == len(self.stage_of) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_event(self, event: str, facts: dict[str, Any]) -> None:
        """As `trainer.train` calls it."""
        if event == "save" and "seconds" in facts:
            self.saved.append(facts["seconds"])
        if event == "update":
            self._name_stage(facts["step"])

    def _name_stage(self, done: int) -> None:
        self.memory.prefix = f"{self.stage_of[min(done, len(self.stage_of) - 1)]}: "


# -------------------------------------------------------------------------------------------------- what is measured


def _collect(recipe: Recipe, run: Path, expected: Estimate, memory: PhaseMemory, watched: _Watch) -> Measured:
    peaks = distributed.all_gather(memory.peaks if memory.can_measure else {})
    return Measured(
        recipe,
        run,
        expected,
        seconds=_phase_seconds(run, stage_names(recipe)),
        memory={name: max(p[name] for p in peaks) for name in peaks[0]},
        baseline=memory.baseline,
        checkpoint_bytes=_folder_bytes(complete_checkpoints(run)[-1]),
        save_seconds=watched.saved,
        free_bytes=shutil.disk_usage(run).free,
        loader_items_per_second=_loader_speed(recipe),
        reduce_gb_per_second=_reduce_speed(),
        product_flops_per_second=_product_speed(torch_dtype(recipe.family.dtype)),
        on_accelerator=is_accelerator(pick_device()),
    )


def _phase_seconds(run: Path, names: Sequence[str]) -> dict[str, float]:
    """Seconds of each part, in the last update of each stage; "STAGE: update" is the whole update."""
    found: dict[str, float] = {}
    for row in read_rows(run / METRICS):
        for key, value in row.items():
            if key.startswith("time/") and "stage" in row:
                found[f"{names[row['stage']]}: {PARTS.get(key, key.removeprefix('time/'))}"] = value
    return found


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _loader_speed(recipe: Recipe) -> float:
    """Items a second that this process's loader gives, over batches of the last stage."""
    data, stage = build_source(recipe), recipe.stages[-1]
    world, count, index = distributed.world_size(), 0, 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < LOADER_SECONDS or not count:
        count += len(data.batch(index, stage.batch_size // world, distributed.rank(), world))
        index += 1
    return count / passed


def _reduce_speed() -> float | None:
    """GB a second that an all-reduce moves for each process, 2 (n - 1) / n times the tensor's size; None for one
    process."""
    world = distributed.world_size()
    if world == 1:
        return None
    device = pick_device()
    tensor = torch.ones(REDUCED_BYTES // 4, device=device)
    dist.all_reduce(tensor)  # the first opens connections
    distributed.all_gather(0)
    began = time.perf_counter()
    for _ in range(REDUCE_REPEATS):
        dist.all_reduce(tensor)
    float(tensor[0])  # waits for the device
    return REDUCE_REPEATS * REDUCED_BYTES * 2 * (world - 1) / world / (time.perf_counter() - began) / 1e9


def _product_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the fastest of some: what this machine can do."""
    device = pick_device()
    side = PRODUCT_SIDE * (8 if is_accelerator(device) else 1)
    left = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(PRODUCT_REPEATS):
        synchronize(device)
        began = time.perf_counter()
        left @ left
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


# ----------------------------------------------------------------------------------------------------------- report


def report_lines(found: Measured) -> list[str]:
    """The measurements as lines of text."""
    return [
        *_phase_table(found),
        *_update_lines(found),
        *_memory_lines(found),
        *_disk_lines(found),
        *_speed_lines(found),
    ]


def measured_values(found: Measured) -> dict[str, Any]:
    """The measurements for machines to read: seconds, GiB and FLOP by phase, and one entry for each stage's update."""
    phases = {phase.name: {"estimate_gib": phase.total / GIB, "flops": phase.flops} for phase in found.expected.phases}
    return {
        "recipe": found.recipe.name,
        "processes": distributed.world_size(),
        "device": device_name(pick_device()),
        "updates": {stage: _update_values(found, stage) for stage in stage_names(found.recipe)},
        "seconds": found.seconds,
        "peak_gib": found.memory,
        "estimate": phases,
        "checkpoint_bytes": found.checkpoint_bytes,
        "save_seconds": found.save_seconds,
        "loader_items_per_second": found.loader_items_per_second,
        "reduce_gb_per_second": found.reduce_gb_per_second,
        "product_flops_per_second": found.product_flops_per_second,
    }


def _update_values(found: Measured, stage: str) -> dict[str, float]:
    """Of one update of a stage: seconds, operations, and their share of what a matrix product reaches here."""
    seconds = found.seconds[f"{stage}: update"]
    phases = [p for p in found.expected.phases if p.name.startswith(f"{stage}: ") and not p.name.endswith("set-up")]
    flops = sum(phase.flops for phase in phases)
    return {"seconds": seconds, "flops": flops, "share": flops / seconds / found.product_flops_per_second}


def _phase_table(found: Measured) -> list[str]:
    expected = {phase.name: phase.total / GIB for phase in found.expected.phases}
    names = list(dict.fromkeys([*expected, *found.seconds, *found.memory]))
    width = max(map(len, names))
    lines = [f"{'phase':{width}} {'seconds':>9} {'peak GiB':>9} {'estimate':>9}"]
    for name in names:
        cells = (found.seconds.get(name), found.memory.get(name), expected.get(name))
        lines.append(f"{name:{width}} " + " ".join(f"{'-' if c is None else f'{c:.3g}':>9}" for c in cells))
    return lines


def _update_lines(found: Measured) -> list[str]:
    speed, lines = found.product_flops_per_second / 1e12, []
    for stage in stage_names(found.recipe):
        values = _update_values(found, stage)
        lines.append(
            f"{stage}: {values['seconds']:.3g} s an update of {values['flops'] / 1e12:.3g} TFLOP in each process: "
            f"{values['share']:.0%} of a matrix product's speed ({speed:.3g} TFLOP a second)."
        )
    return lines


def _memory_lines(found: Measured) -> list[str]:
    if not found.memory:
        return ["Peak memory: this machine cannot measure it by phase."]
    peak, planned = max(found.memory.values()), found.expected.peak.total / GIB
    where = "of the accelerator" if found.on_accelerator else f"resident, less {found.baseline:.2f} GiB at the start"
    return [f"Peak memory: {peak:.2f} GiB ({where}); estimate {planned:.2f} GiB; ratio {peak / planned:.2f}."]


def _disk_lines(found: Measured) -> list[str]:
    saved = f"{max(found.save_seconds):.1f} s to write" if found.save_seconds else "time to write not measured"
    return [
        f"Checkpoint: {found.checkpoint_bytes / GIB:.2f} GiB, {saved}. Free disk: {found.free_bytes / GIB:.1f} GiB; "
        f"the run keeps {found.recipe.trainer.keep} checkpoints and writes one more."
    ]


def _speed_lines(found: Measured) -> list[str]:
    lines = [f"Loader: {found.loader_items_per_second:.1f} items a second in each process."]
    if found.reduce_gb_per_second is not None:
        lines.append(f"All-reduce between the processes: {found.reduce_gb_per_second:.2f} GB a second.")
    return lines


UNKNOWN = (
    "What a rehearsal cannot know: whether the recipe learns (weights and photos are random); real tokenizers and chat "
    "templates (stand-ins are used, so texts have another number of tokens); whether the published models still have "
    "the configs that the package copied; the time to download them; speed of the photos' own disk."
)
