"""Out of memory on the device or the host: one message with the phase, the largest part, and settings that save
memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.recipe.config import Recipe
from npedit.steps.base import PART_NOTE
from npedit.training.estimate import GIB, estimate

PARTS_OF_UPDATE = {  # a part's name in `time/*` of metrics.jsonl -> what it computes
    "draft": "the student's few-step edit",
    "critic": "the critic's loss and its gradient",
    "dmd": "distribution matching",
    "student": "the student's backward pass and optimizer step",
    "fake": "the fake score's update",
    "sample": "the sampled edits and their rewards",
}
ALLOCATOR_MESSAGES = ("can't allocate memory", "out of memory", "not enough memory")  # of a plain RuntimeError


class Progress:
    """The phase that training is in, in words for messages."""

    phase = "loading the models"


@contextmanager
def explain_out_of_memory(recipe: Recipe, run: Path, progress: Progress) -> Iterator[None]:
    """Turn an out-of-memory error inside a `with` block into a `UserError`. Other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error).split(". ")[0].split("\n")[0] or "memory exhausted"
        raise UserError(
            f"expected enough memory for {progress.phase}{failed_part(error)}; got: {words}.\n{largest_part(recipe)}\n"
            "Settings that save memory and may be changed in this run (the same command with them resumes it):\n"
            f"{_indented_lines(savings_in_this_run(recipe))}\nSettings for a new run:\n"
            f"{_indented_lines(savings_in_a_new_run(recipe))}\n"
            f"All that was saved in {run} can be used"
        ) from None


def failed_part(error: BaseException) -> str:
    """The innermost part of the update that an exception came from, in words; "" if it came from none."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(PART_NOTE)]
    if not notes:
        return ""
    part = notes[0].removeprefix(PART_NOTE)
    return f", part {part!r}{f' ({PARTS_OF_UPDATE[part]})' if part in PARTS_OF_UPDATE else ''}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the host's memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in ALLOCATOR_MESSAGES)


def largest_part(recipe: Recipe) -> str:
    """The peak and the largest part by `npedit estimate`, in words; how to run it, if it fails here."""
    try:
        peak = estimate(recipe, distributed.world_size()).peak
    except Exception:  # noqa: BLE001 the message must be shown even if the estimate fails
        return 'The parts in memory are listed by "npedit estimate RECIPE".'
    name, size = max(peak.bytes_by_part.items(), key=lambda item: item[1])
    return (
        f"By `npedit estimate` the peak is {peak.total / GIB:.1f} GiB, in {peak.name}; the largest part is {name}, "
        f"{size / GIB:.1f} GiB."
    )


def _indented_lines(settings: list[str]) -> str:
    return "\n".join(f"  {setting}" for setting in settings) or "  none is left"


def savings_in_this_run(recipe: Recipe) -> list[str]:
    """Memory settings that are not in use and may change when a run resumes (`runs/changes.py`)."""
    memory, world = recipe.memory, distributed.world_size()
    found = []
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size % 2 == 0 and stage.batch_size // 2 >= world and (stage.batch_size // 2) % world == 0:
            halved = f"stages.{i}.batch_size={stage.batch_size // 2} stages.{i}.accumulate={stage.accumulate * 2}"
            found.append(f"{halved}  (activations)")
    if not memory.gradient_checkpointing:
        found.append("memory.gradient_checkpointing=true  (activations of the trained models)")
    if not memory.decoder_checkpointing and recipe.critic:
        found.append("memory.decoder_checkpointing=true  (activations of the VAE's decoder)")
    if not memory.critic_checkpointing and recipe.critic:
        found.append("memory.critic_checkpointing=true  (activations of the critic)")
    if not memory.offload:
        found.append("memory.offload=true  (text encoders, VAE and critic)")
    if not memory.decode_tile:
        found.append("memory.decode_tile=512  (activations of the VAE's decoder)")
    if recipe.critic and not recipe.critic.bits:
        found.append("critic.bits=8  (critic)")
    if world > 1 and recipe.trainer.shard == "none":
        found.append("trainer.shard=full  (weights, optimizer and averages)")
    return found


def savings_in_a_new_run(recipe: Recipe) -> list[str]:
    """Memory settings that are not in use and need a new run."""
    found = []
    if recipe.lora is None:
        found.append("'lora={rank: 64, alpha: 64}'  (trained models, optimizer and averages)")
    for i, stage in enumerate(recipe.stages):
        for role in ("student", "fake"):
            if (
                recipe.trainer.shard == "none"
                and getattr(getattr(stage.settings, role, None), "optimizer", "") == "adamw"
            ):
                found.append(f"stages.{i}.settings.{role}.optimizer=adamw8bit  (optimizer)")
    if recipe.family.dtype == "float32":
        found.append("family.dtype=bfloat16  (base model and activations)")
    return found
