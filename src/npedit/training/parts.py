"""Open the family, the critic and the data of a recipe, and check that they fit together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from npedit.critics._bits import quantisation_arguments
from npedit.critics.base import Critic
from npedit.errors import UserError
from npedit.families._prompts import truncation_message
from npedit.hub_access import is_local_only
from npedit.nets import distributed
from npedit.nets.device import allow_tf32, device_name, pick_device, supports_dtype
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter
from npedit.nets.offload import OffloadedModule
from npedit.recipe.config import EMBEDDED, CriticChoice, Recipe, find_class, find_module, torch_dtype
from npedit.runs.checkpoint import read_config
from npedit.runs.editor_facts import EditorFacts
from npedit.runs.editor_weights import load_ema_weights, require_finite_weights
from npedit.runs.resolve import EditorSource
from npedit.runs.start import DiffusersStart, resolve_start
from npedit.steps.base import Judge, Parts, critic_modules, family_modules, offload_modules
from npedit.training.checkpoint_warnings import checkpoint_warnings
from npedit.training.diffusers_start import load_diffusers_start, load_whole_net
from npedit.training.failure_sampling import check_failure_sampling
from npedit.training.progress_display import plain_console

log = logging.getLogger(__name__)

STAGE_SEEDS = 1_000_003  # difference between the seeds of two stages
CAPTION_COMMAND = "npedit caption SET --out NEW --writer URL --writer-model NAME"


def build_parts(recipe: Recipe) -> Parts:
    """Load the family, and the critic if a stage needs it, as the recipe says.

    Raises:
        UserError: weights are missing or are those of another model, or the device lacks their type of number.
    """
    device = pick_device()
    for dtype in dict.fromkeys(recipe.family.dtypes().values()):
        check_dtype("family", dtype, device)
    if recipe.family.dtype != "float32":
        allow_tf32(device)  # also for what stays in float32: the recipe has chosen speed
    wanted = frozenset().union(*(find_class("steps", s.step).requirements(s.settings) for s in recipe.stages))
    for part, one in (("critic", recipe.critic if "critic" in wanted else None), ("judge", recipe.judge)):
        try:
            quantisation_arguments(one.bits if one else 0, torch.float32, device)
        except ValueError as error:
            raise UserError(f"{part}.bits: {error}") from None
    chosen = recipe.family
    _require_folder("family.weights", chosen.weights)
    with explain_loading_errors("family.weights", chosen.weights):
        family = find_class("families", chosen.name).load(chosen.folder(), chosen.dtypes(), device)
    if chosen.isolated_references:
        family.isolate_references()
    if distributed.is_main_process():
        for message in checkpoint_warnings(recipe, family):
            log.warning("family.weights: %s", message)
    offloaded: dict[str, list[OffloadedModule]] = {}  # each model is moved away before the next one is opened
    if recipe.memory.offload:
        offloaded |= {name: offload_modules(family_modules(family, name), device) for name in ("text", "vae")}
    critic = _open_critic("critic", recipe.critic, device) if "critic" in wanted and recipe.critic else None
    if recipe.memory.offload:
        offloaded["critic"] = offload_modules(critic_modules(critic), device)
    wording = recipe.critic.wording if recipe.critic else "plain"
    judge = Judge(_open_critic("judge", recipe.judge, device), recipe.judge.wording) if recipe.judge else None
    if recipe.memory.offload:
        offloaded["judge"] = offload_modules(critic_modules(judge.critic if judge else None), device)
    return Parts(family, critic, wording, device, recipe.lora, recipe.memory, judge=judge, offloaded=offloaded)


def _open_critic(part: str, chosen: CriticChoice, device: torch.device) -> Critic:
    check_dtype(part, torch_dtype(chosen.dtype), device)
    _require_folder(f"{part}.weights", chosen.weights)
    with explain_loading_errors(f"{part}.weights", chosen.weights):
        kind = find_class("critics", chosen.name)
        return kind.load(chosen.folder(), torch_dtype(chosen.dtype), device, chosen.resolution, chosen.bits)


def _require_folder(key: str, weights: str) -> None:
    """Refuse the name of a folder that does not exist. A Hub id has one slash, and no folder here is its owner."""
    folder = Path(weights)
    is_hub_id = "/" not in weights or (weights.count("/") == 1 and not folder.parent.is_dir())
    if not folder.exists() and not is_hub_id:
        raise UserError(
            f"{key}: expected a folder with a model; got {weights!r}, which does not exist; make it first, as the head "
            "of the recipe may say, or correct the recipe"
        )


def load_start_weights(recipe: Recipe, parts: Parts, student: nn.Module) -> None:
    """Load the weights that the recipe starts from, if it names any, into a new student: those of an editor, or of a
    LoRA or transformer of diffusers.

    Raises:
        UserError: there is nothing to start from, or it is of another family or has other adapters.
    """
    if not recipe.start:
        return
    source = resolve_start(recipe.start)
    if isinstance(source, DiffusersStart):
        with explain_loading_errors("start", recipe.start):
            load_diffusers_start(source, parts.family, student)
    else:
        _load_editor(source, recipe, parts, student)
    require_finite_weights(student, source)
    if distributed.is_main_process():
        plain_console().print(f"Starting from {source}")


def _load_editor(source: EditorSource, recipe: Recipe, parts: Parts, student: nn.Module) -> None:
    """Load the weights of an editor of npedit.

    Raises:
        UserError: it is of another kind than the recipe's, or damaged.
    """
    found, expected = _editor_kind(source, recipe), {"family": recipe.family.name, "lora": recipe.as_dict().get("lora")}
    if found != expected:
        raise UserError(
            f"start: expected an editor of the same kind as this recipe's, {expected}; got {found} in {recipe.start}; "
            "change the recipe to fit, or start from another run"
        )
    with explain_loading_errors("start", recipe.start):
        if source.is_checkpoint:
            load_ema_weights(source.folder, student)
        elif isinstance(student, LoraAdapter):
            student.load_weights(source.folder)
        else:
            load_whole_net(source.folder / "transformer", parts.family, student)


def _editor_kind(source: EditorSource, recipe: Recipe) -> dict[str, Any]:
    """The family and the LoRA settings of an editor. For an editor without a run, the rank is unknown."""
    if source.run is not None:
        recipe_of_run = read_config(source.run)
        return {"family": recipe_of_run["family"]["name"], "lora": recipe_of_run.get("lora")}
    has_adapter, mine = (source.folder / LORA_FILE).is_file(), recipe.as_dict().get("lora")
    return {
        "family": EditorFacts.read(source.folder).family,
        "lora": mine if has_adapter == bool(mine) else "adapters" if has_adapter else None,
    }


def check_dtype(part: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a type of number that the device cannot compute with, or only by emulation.

    Raises:
        UserError: it cannot.
    """
    if not supports_dtype(device, dtype):
        raise UserError(
            f"{part}.dtype: expected a type that this device ({device_name(device)}) computes with; got "
            f"{str(dtype)[6:]}, which it lacks; use float32"
        )


@contextmanager
def explain_loading_errors(key: str, weights: str) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        SafetensorError,
    ) as error:  # also truncated files
        if weights != EMBEDDED and isinstance(error, OSError) and is_local_only(weights):
            raise UserError(
                f"{key}: expected a model that opens; got {weights!r}: the Hugging Face Hub does not answer, and the "
                "model is not complete on this computer; check the network and HF_HUB_OFFLINE, or give a folder"
            ) from error
        raise UserError(f"{key}: expected a model that opens; got {weights!r} ({error}); correct the recipe") from error


def build_source(recipe: Recipe) -> Any:
    """The source of training data that the recipe names."""
    return find_module("data", recipe.data.name).Source(recipe.data.settings, recipe.seed)


def check_data_fits(recipe: Recipe, data: Any) -> None:
    """Refuse data that the stages cannot use. It needs no models, so it is done before they are downloaded.

    Raises:
        UserError: names what is missing.
    """
    check_processes(recipe, distributed.world_size())
    if distributed.world_size() > 1 and distributed.world_size() > len(data):
        raise UserError(
            f"data: expected at least one item per process; got {len(data)} items and {distributed.world_size()} "
            "processes; start fewer, or add data"
        )
    for i, stage in enumerate(recipe.stages):
        needs = find_class("steps", stage.step).requirements(stage.settings)
        if "target_caption" in needs and not data.has_target_captions:
            raise UserError(
                f"stages.{i}: expected data with target_caption, which {stage.step} needs here; got "
                f"{_rows_without(data, 'target_caption')}; write them, or let a model do it: {CAPTION_COMMAND}"
            )
        if "source_caption" in needs and not data.has_source_captions:
            raise UserError(
                f"stages.{i}: expected data with source_caption, which {stage.step} needs as its text, in every row; "
                f"got {_rows_without(data, 'source_caption')}; write what each photo shows, or let a model "
                f"do it: {CAPTION_COMMAND}"
            )
        if "edited" in needs and not getattr(data, "has_pairs", False):
            raise UserError(f"stages.{i}: {stage.step} expected pairs; got data.name {recipe.data.name}; use toy_pairs")
        if "keep_mask" in needs and not getattr(data, "has_keep_masks", False):
            raise UserError(
                f"stages.{i}.settings.keep_weight: expected data with masks of what must stay; got {recipe.data.name} "
                "without any; add a column mask_file_name, or set keep_weight to 0"
            )
        _check_references_of_step(i, stage.step, getattr(data, "most_references", 1))
    check_failure_sampling(recipe, data)
    if getattr(data, "has_pairs", False) and not recipe.is_trained_with_pairs():
        raise UserError(f"data.name: every stage trains without pairs; got {recipe.data.name}, which has them; use toy")


def _check_references_of_step(number: int, name: str, most: int) -> None:
    """Refuse rows with up to `most` references if the step of a stage takes fewer."""
    limit = find_class("steps", name).most_references
    if limit is not None and most > limit:
        raise UserError(
            f"stages.{number}: expected rows whose number of references, the photo included, is at most {limit}, as "
            f"{name} takes no more; got {most}; shorten or remove reference_file_names, or leave this stage out"
        )


def check_recipe_fits(recipe: Recipe, data: Any, parts: Parts) -> None:
    """Refuse data that the stages, the family or the benchmark cannot use; report texts that are too long.

    Raises:
        UserError: names what is missing or of the wrong size.
    """
    check_data_fits(recipe, data)
    most, limit = getattr(data, "most_references", 1), parts.family.most_references
    if most > limit:
        raise UserError(
            f"data: expected rows with at most {limit} references, the photo included, as {recipe.family.name} takes "
            f"no more; got {most}; shorten reference_file_names"
        )
    multiple = parts.family.facts.multiple
    for height, width in data.sizes:
        if height % multiple or width % multiple:
            raise UserError(
                f"data: expected sizes that are multiples of {multiple}; got {width}x{height}; change the data's size"
            )
    if recipe.trainer.benchmark:
        _check_benchmark(recipe.trainer.benchmark, data.sizes, multiple)
    if distributed.is_main_process() and (message := truncation_message(parts.family, data.texts())):
        log.warning("data: %s", message)


def check_steps(recipe: Recipe, parts: Parts) -> None:
    """Refuse frozen models that one of the stages cannot work with.

    Raises:
        UserError: names the stage and the setting.
    """
    for i, stage in enumerate(recipe.stages):
        try:
            find_class("steps", stage.step).check_parts(stage.settings, parts)
        except UserError as error:
            raise UserError(f"stages.{i}.settings.{error}") from None


def _rows_without(data: Any, caption: str) -> str:
    """Which rows lack a caption, in words; by file and line if the data source knows them."""
    return data.rows_without(caption) if hasattr(data, "rows_without") else "data without"


def check_processes(recipe: Recipe, count: int) -> None:
    """Refuse a number of processes that cannot share each batch equally.

    Raises:
        UserError: names the stage.
    """
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size % count:
            raise UserError(
                f"stages.{i}.batch_size: expected a multiple of the {count} processes, which share each batch; got "
                f"{stage.batch_size}; change it, or start a number of processes that divides it"
            )


def _check_benchmark(name: str, sizes: Sequence[tuple[int, int]], multiple: int) -> None:
    side = getattr(find_module("benchmarks", name), "SIDE", 0)
    if not side:
        raise UserError(
            f"trainer.benchmark: expected one that needs no judge and no data of its own (toy); got {name}; leave it "
            f'out and run "npedit evaluate {name}" on the finished run'
        )
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
