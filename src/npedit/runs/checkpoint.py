"""The run directory: write, read, resume, export. safetensors and JSON only.

    config.resolved.yaml  manifest.json  metrics.jsonl  bad_rows.jsonl
    samples/step-000500/*.png            checkpoint-000500/{*.safetensors, state.json, COMPLETE}
    final/{transformer/ or pytorch_lora_weights.safetensors, scheduler/, npedit.json, README.md}

Whatever must be whole is written aside and renamed; a checkpoint without its mark COMPLETE does not count.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from npedit.errors import UserError, explain_write_errors, resume_command
from npedit.nets import distributed, sharded_checkpoint
from npedit.nets.device import device_name
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import Recipe, differences, make_recipe
from npedit.runs.lock import LOCK_FILES, Lock, hold

CONFIG, MANIFEST, METRICS, BAD_ROWS, COMPLETE, FAILURES = (
    "config.resolved.yaml", "manifest.json", "metrics.jsonl", "bad_rows.jsonl", "COMPLETE", "blame.json",
)  # fmt: skip
# what a run leaves that was ended before it began
UNBORN = LOCK_FILES | {MANIFEST, f"{MANIFEST}.tmp", f"{CONFIG}.tmp", BAD_ROWS}
FREE = ("trainer.keep", "trainer.save_every", "trainer.save_seconds", "trainer.shard")  # may differ when a run goes on
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pydantic")


def is_run(path: str | Path) -> bool:
    """Whether a run was begun in this folder."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / MANIFEST).is_file()


def require_run(path: str | Path) -> Path:
    """The folder, if it is a run.

    Raises:
        UserError: it is not.
    """
    if not is_run(path):
        raise UserError(
            f"expected a run (a folder with {CONFIG} and {MANIFEST}); got {path}; give what `npedit train` wrote"
        )
    return Path(path)


@contextmanager
def hold_run(run: Path, recipe: Recipe, resume: bool) -> Iterator[Lock]:
    """Hold a run directory for one process, for the length of a `with` block; an old run must have the same recipe.

    Raises:
        UserError: the folder holds something else, cannot be written, is in use, or is a run with another recipe.
    """
    if is_run(run):
        same_recipe(run, recipe, resume)
    with explain_write_errors(run):
        if run.exists() and not is_run(run) and {p.name for p in run.iterdir()} - UNBORN:
            raise UserError(
                f"expected a new or empty folder, or a run; got {run}, which holds other files; choose another"
            )
    with hold(run, "train") as lock:
        yield lock


def same_recipe(run: Path, recipe: Recipe, resume: bool = True) -> None:
    """Raise a UserError unless the run was begun with this recipe and may go on (`resume`)."""
    if not resume:
        raise UserError(f"expected a new folder; got {run}, which is a run already; choose another, or go on with it")
    begun = make_recipe(read_config(run)).as_dict()  # with the defaults of keys that are newer than the run
    changed = {k: v for k, v in differences(begun, recipe.as_dict()).items() if k not in FREE}
    if changed:
        lines = "\n".join(f"  {k}: {old!r} -> {new!r}" for k, (old, new) in changed.items())
        raise UserError(
            f"expected the recipe that {run} was begun with; got another (old -> new):\n{lines}\n"
            "choose another folder, or undo the changes"
        )


def write_run_metadata(run: Path, recipe: Recipe, manifest: Mapping[str, Any]) -> None:
    """Write what a run is made of; for an old run, make sure that its data are the same.

    Raises:
        UserError: the data are others.
    """
    if is_run(run):
        was, now = read_manifest(run)["data_fingerprint"], manifest["data_fingerprint"]
        if was != now:
            raise UserError(f"expected the data {run} was begun with, {was}; got others, {now}; choose another folder")
    else:
        write_text(run / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    write_text(run / CONFIG, yaml.safe_dump(recipe.as_dict(), sort_keys=False))


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run, as plain values."""
    return yaml.safe_load((run / CONFIG).read_text())


def read_manifest(run: Path) -> dict[str, Any]:
    """What a run was made with."""
    return json.loads((run / MANIFEST).read_text())


def make_manifest(recipe: Recipe, data_fingerprint: str, device: torch.device) -> dict[str, Any]:
    """Versions, git revision (if any), data, seeds and machine of a run."""
    return {
        "format": 1,
        "recipe": recipe.name,
        "no_pairs": is_trained_without_pairs(recipe),
        "data_fingerprint": data_fingerprint,
        "seeds": {"recipe": recipe.seed},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_revision": git_revision(),
        "device": device_name(device),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": resume_command(),
    }


def is_trained_without_pairs(recipe: Recipe) -> bool:
    """Whether neither this training nor the run that it starts from is shown edited images.

    Raises:
        UserError: what it starts from is not a run.
    """
    return not recipe.uses_pairs() and (not recipe.start or read_manifest(require_run(recipe.start))["no_pairs"])


def git_revision() -> str:
    """The commit of this package's source, with "-dirty" for changes; "" if it is not in a git repository."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return ""
    listed = ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]
    if subprocess.run(listed, capture_output=True).returncode:
        return ""
    described = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with explain_write_errors(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            _to_disk(file)
        os.replace(aside, path)


def _to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------- checkpoints


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name[11:].isdecimal() and (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def latest_complete_checkpoint(run: Path) -> Path | None:
    """The checkpoint to go on from; None if there is none yet."""
    found = complete_checkpoints(run)
    return found[-1] if found else None


def save_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoint-STEP` aside, rename it, then drop all but the newest `keep`. If it fails, the older ones stay.
    All processes call it, and each writes its part of the tensors.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder = run / f"checkpoint-{step:06d}"
    aside = folder.with_name(folder.name + ".tmp")
    if distributed.broadcast_object(folder in complete_checkpoints(run)):
        return folder
    first = distributed.is_main_process()
    try:
        with explain_write_errors(folder):
            if first:
                _sweep(run)
                aside.mkdir()
            distributed.all_gather(None)  # until the folder is there
            sharded_checkpoint.write_tensors(aside, tensors)
            if first:
                _write_marks(aside, numbers)
                os.rename(aside, folder)
                _sync_folder(run)
    except BaseException:
        if first:
            shutil.rmtree(aside, ignore_errors=True)  # makes room again; what went wrong is raised
        raise
    for old in complete_checkpoints(run)[:-keep] if first else []:
        (old / COMPLETE).unlink()
        shutil.rmtree(old)
    return folder


def _sweep(run: Path) -> None:
    """Drop checkpoints that a killed process left half-written or half-deleted."""
    for path in run.glob("checkpoint-*"):
        if path.is_dir() and (path.suffix == ".tmp" or not (path / COMPLETE).is_file()):
            shutil.rmtree(path)


def _write_marks(folder: Path, numbers: Mapping[str, Any]) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for name, text in (("state.json", json.dumps(numbers, indent=2)), (COMPLETE, "")):
        with open(folder / name, "w") as file:
            file.write(text)
            _to_disk(file)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(
    folder: Path, like: Callable[[str], Tensor | None] = lambda key: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` was given, the tensors as `sharded_checkpoint.read_tensors` gives them.

    Raises:
        UserError: the checkpoint is damaged in spite of its mark.
    """
    numbers = read_state(folder)
    try:
        return sharded_checkpoint.read_tensors(folder, like), numbers
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `save` was given. Errors as in `load`."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: BaseException) -> UserError:
    return UserError(
        f"expected a whole checkpoint; got {folder} ({error}); delete that folder to go on from the one before"
    )


# --------------------------------------------------------------------------------------------------------- row files


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line. A number that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with explain_write_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a row file; a last line cut off by a kill is left out. [] if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def repair_rows(path: Path) -> list[dict[str, Any]]:
    """Drop a last line that a kill cut off, so that the next row does not run on from it; returns the rows."""
    rows = read_rows(path)
    if path.exists():
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
    return rows


def drop_metrics_after(run: Path, step: int) -> None:
    """Drop the rows after `step` (all of them, if it is negative): they are about to be made again."""
    rows = [r for r in read_rows(run / METRICS) if r["step"] <= step]
    write_text(run / METRICS, "".join(json.dumps(r) + "\n" for r in rows))


# ------------------------------------------------------------------------------------------------------------- final


def write_final(
    run: Path,
    recipe: Recipe,
    net: torch.nn.Module,
    scheduler: Any,
    times: Sequence[float],
    sizes: Sequence[tuple[int, int]],
) -> Path:
    """Write `final/`: the editor as diffusers opens it, and `npedit.json` for `Editor.open`.

    `net` is a diffusers model or a `LoraAdapter` of one, `scheduler` a diffusers object; `times` are the few-step
    times for the first of `sizes` (H, W, pixels).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder, aside, base = run / "final", run / "final.tmp", Path(recipe.family.weights)
    facts = {
        "format": 1,
        "family": recipe.family.name,
        "base": str(base.resolve()) if base.is_dir() else recipe.family.weights,
        "dtype": recipe.family.dtype,
        "steps": len(times),
        "tile": recipe.memory.decode_tile,
        "times": [round(float(t), 6) for t in times],
        "sizes": [list(s) for s in sizes],
        "recipe": recipe.name,
    }
    shutil.rmtree(aside, ignore_errors=True)
    with explain_write_errors(folder):
        aside.mkdir()
        if isinstance(net, LoraAdapter):
            net.save(aside)
        else:
            diffusers_net: Any = net
            diffusers_net.save_pretrained(aside / "transformer")
        scheduler.save_pretrained(aside / "scheduler")
        write_text(aside / "npedit.json", json.dumps(facts, indent=2) + "\n")
        write_text(aside / "README.md", model_card(recipe, facts))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(aside, folder)
    return folder


def model_card(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """A short card: what the editor is, how it was made, how to use it."""
    stages = "\n".join(f"- `{s.step}`: {s.updates} updates of {s.batch_size * s.accumulate}" for s in recipe.stages)
    sizes = ", ".join(f"{w}x{h}" for h, w in facts["sizes"])
    how = "No edited image was used, and no critic."
    if recipe.critic:
        how = (
            f"No edited image was used: a vision-language model (`{recipe.critic.name}`, `{recipe.critic.weights}`) "
            "judged the edits, and\ndistribution matching kept them on the base model's image manifold. The method is "
            "that of NP-Edit (arXiv 2510.14978)."
        )
    unpaired = is_trained_without_pairs(recipe)
    if not unpaired and not recipe.uses_pairs():
        how = f"It starts from the run `{recipe.start}`, which was shown edited images; it was shown none itself."
    if recipe.uses_pairs():
        how = "It was shown edited images in training: a supervised baseline, not NP-Edit."
    weights = f"`{LORA_FILE}` (for `load_lora_weights` of the base's pipeline)" if recipe.lora else "`transformer/`"
    return f"""---
library_name: npedit
tags: [image-editing{", no-pairs" if unpaired else ""}]
---
# {recipe.name}: an image editor trained {"without" if unpaired else "on"} pairs

A {facts["steps"]}-step editor of the family `{facts["family"]}`, started from `{facts["base"]}`.
{how}

Training data: `{recipe.data.name}`. Sizes (width x height): {sizes}. Seed: {recipe.seed}.

{stages}

## Use

    npedit edit --run PATH_OF_THIS_RUN picture.png "paint the circle red" -o out.png

{weights} and `scheduler/` are as diffusers wants them (the averaged weights; the scheduler re-noises with fresh noise,
as in training). The times of the steps, 1 being noise: {", ".join(f"{t:.4f}" for t in facts["times"])}.
"""
