"""The run directory: write, read, resume, export. safetensors and JSON only.

    config.resolved.yaml  manifest.json  metrics.jsonl  bad_rows.jsonl
    samples/step-000500/*.png            checkpoint-000500/{*.safetensors, state.json, COMPLETE}
    final/{transformer/ or pytorch_lora_weights.safetensors, scheduler/, npedit.json, README.md}

Files are written under a temporary name and renamed. A checkpoint without the file COMPLETE does not count.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from npedit.errors import UserError, explain_write_errors, resume_command
from npedit.nets import distributed, sharded_checkpoint
from npedit.nets.device import device_name
from npedit.recipe.config import EMBEDDED, Recipe, make_recipe
from npedit.runs.changes import Change, data_change, recorded_changes
from npedit.runs.files import append_row as append_row
from npedit.runs.files import fsync_folder, fsync_rows, read_json_object, read_rows, write_rows, write_text
from npedit.runs.files import repair_rows as repair_rows
from npedit.runs.git_revision import git_revision
from npedit.runs.lock import LOCK_FILES, Lock, hold
from npedit.runs.resolve import COMPLETE, resolve_editor
from npedit.runs.resolve import CONFIG as CONFIG
from npedit.runs.resolve import complete_checkpoints as complete_checkpoints
from npedit.runs.resolve import latest_complete_checkpoint as latest_complete_checkpoint
from npedit.runs.start import is_foreign

MANIFEST, METRICS, BAD_ROWS, FAILURES = "manifest.json", "metrics.jsonl", "bad_rows.jsonl", "blame.json"
PHOTOS = "photos.json"  # the training photos, their sizes in bytes, and which rows are held out
# what is left of a run that ended before its first update
FILES_BEFORE_START = LOCK_FILES | {MANIFEST, f"{MANIFEST}.tmp", f"{CONFIG}.tmp", BAD_ROWS, PHOTOS, f"{PHOTOS}.tmp"}
log = logging.getLogger(__name__)
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pydantic")


def is_run(path: str | Path) -> bool:
    """Whether a run was started in this folder. Config and manifest may be lost if a checkpoint holds copies."""
    run = Path(path)
    return ((run / CONFIG).is_file() and (run / MANIFEST).is_file()) or bool(complete_checkpoints(run))


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
    """The lock of a run folder, held inside a `with` block. A run that is resumed must have an allowed recipe.

    Raises:
        UserError: the folder holds something else, cannot be written, is in use, or is a run with another recipe.
    """
    if is_run(run):
        require_allowed_changes(run, recipe, resume)
    with explain_write_errors(run):
        if run.exists() and not is_run(run) and {p.name for p in run.iterdir()} - FILES_BEFORE_START:
            raise UserError(
                f"expected a new or empty folder, or a run; got {run}, which holds other files; choose another"
            )
    with hold(run, "train") as lock:
        yield lock


def require_allowed_changes(run: Path, recipe: Recipe, resume: bool = True) -> list[Change]:
    """The changes since the run was started that have to be recorded; see `runs/changes.py`.

    Raises:
        UserError: the recipe differs in a setting that cannot change, or the run may not be resumed (`resume`).
    """
    if not resume:
        raise UserError(f"expected a new folder; got {run}, which is a run already; choose another, or resume it")
    started = make_recipe(read_config(run)).as_dict()  # with the defaults of keys that are newer than the run
    latest = latest_complete_checkpoint(run)
    return recorded_changes(started, recipe.as_dict(), int(latest.name[11:]) if latest else 0, run)


def write_run_metadata(
    run: Path, recipe: Recipe, manifest: Mapping[str, Any], inventory: Mapping[str, Any] | None = None
) -> list[Change]:
    """Write config, manifest and the list of photos of a run; returns the recorded changes since the run was started,
    which the manifest lists.

    `inventory` is the data source's list of photos, if it has one. It is used to name a lost photo.

    Raises:
        UserError: the data have changed, or settings that cannot change.
    """
    changes: list[Change] = []
    kept = dict(manifest)
    if is_run(run):
        kept, changes = read_manifest(run), require_allowed_changes(run, recipe)
        latest = latest_complete_checkpoint(run)
        done = int(latest.name[11:]) if latest else 0
        if kept["data_fingerprint"] != manifest["data_fingerprint"]:
            changes.append(_data_change(run, inventory, done))
        if kept.get("processes", 1) != manifest["processes"]:
            changes.append(Change("processes", kept.get("processes", 1), manifest["processes"], done))
        kept |= {key: manifest[key] for key in ("data_fingerprint", "processes", "seen_pairs")}
        kept["resumed"] = [*kept.get("resumed", []), *_new_software(kept, manifest, done)]
        kept["changes"] = [*kept.get("changes", []), *(change.as_dict() for change in changes)]
    if inventory is not None:
        write_text(run / PHOTOS, json.dumps(inventory) + "\n")
    write_text(run / MANIFEST, json.dumps(kept, indent=2) + "\n")
    write_text(run / CONFIG, yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    return changes


def _new_software(kept: Mapping[str, Any], now: Mapping[str, Any], update: int) -> list[dict[str, Any]]:
    """The code's revision and the versions with which a run goes on after this update, if they are not those of its
    last part."""
    last = [kept, *kept.get("resumed", [])][-1]
    keys = ("git_revision", "versions")
    return [] if all(last.get(key) == now[key] for key in keys) else [{"update": update} | {k: now[k] for k in keys}]


def read_held_out(run: Path) -> list[int] | None:
    """The numbers of the held-out rows that a run began with; None without a run, or if its list cannot be read."""
    try:
        numbers = read_json_object(run / PHOTOS).get("held_out") if is_run(run) else None
    except ValueError:
        return None
    return numbers if isinstance(numbers, list) and all(isinstance(n, int) for n in numbers) else None


def _data_change(run: Path, inventory: Mapping[str, Any] | None, done: int) -> Change:
    try:
        before = read_json_object(run / PHOTOS)
    except ValueError:
        before = None
    words, allowed = data_change(before, inventory)
    if not allowed:
        raise UserError(
            f"expected the data that {run} was started with; got other data ({words}); restore the data, or choose "
            f"another folder (--out) with start={run}"
        )
    return Change("data", "as recorded before", words, done)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run, as plain values. Errors as in `read_manifest`."""

    def parse(path: Path) -> dict[str, Any]:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(str(error)) from None
        if not isinstance(found, dict) or not isinstance(found.get("trainer"), dict):
            raise ValueError("expected a recipe")
        return found

    return _read_or_recover(run, CONFIG, parse)


def read_manifest(run: Path) -> dict[str, Any]:
    """What a run was made with. A damaged file is replaced by the copy in the latest checkpoint, with a warning.

    Raises:
        UserError: the file is damaged and there is no copy.
    """

    def parse(path: Path) -> dict[str, Any]:
        found = read_json_object(path)
        if "no_pairs" not in found:
            raise ValueError("expected the key no_pairs")
        return found

    return _read_or_recover(run, MANIFEST, parse)


def _read_or_recover(run: Path, name: str, parse: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    errors: list[ValueError] = []
    for place in (run, *reversed(complete_checkpoints(run))):
        try:
            found = parse(place / name)
        except ValueError as error:
            errors.append(error)
            continue
        if errors:
            log.warning("%s is damaged (%s); the copy in %s is used", run / name, errors[0], place)
        return found
    raise UserError(
        f"expected {run / name} to be readable; got a damaged file ({errors[0]}) and no checkpoint with a copy; "
        "restore the file, or start anew with --fresh, which moves this folder aside"
    )


def make_manifest(
    recipe: Recipe, data_fingerprint: str, device: torch.device, run: Path | None = None
) -> dict[str, Any]:
    """Versions, git revision (if any), data, seeds and machine of a run. `run` is the folder of one that is resumed.
    Errors as in `has_seen_pairs`."""
    seen_pairs = has_seen_pairs(recipe, run)
    return {
        "format": 1,
        "recipe": recipe.name,
        "no_pairs": seen_pairs is False,
        "seen_pairs": seen_pairs,
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


def has_seen_pairs(recipe: Recipe, run: Path | None = None) -> bool | None:
    """Whether this training or the one that it starts from used edited images; None where that is not known.

    A training that has begun says so in its folder, `run`: what it started from may be gone.

    Raises:
        UserError: there is no editor at `start`, and no run that says what it was.
    """
    if recipe.is_trained_with_pairs() or not recipe.start or recipe.start == EMBEDDED:
        return recipe.is_trained_with_pairs()
    begun = read_manifest(run) if run is not None and is_run(run) else {}
    if "seen_pairs" in begun:
        return begun["seen_pairs"]
    try:
        return _start_has_seen_pairs(recipe.start)
    except UserError:
        if not begun:
            raise
        return False if begun["no_pairs"] else None  # an older run's manifest has `no_pairs` alone


def _start_has_seen_pairs(start: str) -> bool | None:
    """An exported editor and a model of others do not say whether they were trained with edited images."""
    run = None if is_foreign(start) else resolve_editor(start).run
    manifest = read_manifest(run) if run else {"seen_pairs": None}
    return manifest["seen_pairs"] if "seen_pairs" in manifest else not manifest["no_pairs"]


# ------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoint-STEP` under a temporary name, rename it, then delete all but the newest `keep`. If writing
    fails, the older checkpoints stay. All processes call this function, and each writes its shards of the tensors.

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
                _remove_incomplete_checkpoints(run)
                aside.mkdir()
            distributed.all_gather(None)  # wait until the folder exists
            sharded_checkpoint.write_tensors(aside, tensors)
            if first:
                _write_state(run, aside, numbers)
                os.rename(aside, folder)
                fsync_folder(run)
    except BaseException:
        if first:
            shutil.rmtree(aside, ignore_errors=True)  # frees disk space; the error is raised
        raise
    for old in complete_checkpoints(run)[:-keep] if first else []:
        (old / COMPLETE).unlink()
        shutil.rmtree(old)
    return folder


def _remove_incomplete_checkpoints(run: Path) -> None:
    """Delete checkpoints that a killed process left half-written or half-deleted."""
    for path in run.glob("checkpoint-*"):
        if path.is_dir() and (path.suffix == ".tmp" or not (path / COMPLETE).is_file()):
            shutil.rmtree(path)


def _write_state(run: Path, folder: Path, numbers: Mapping[str, Any]) -> None:
    """Complete a checkpoint: write state.json with the sizes of the tensor files, copies of config and manifest, and
    COMPLETE."""
    for rows in (METRICS, BAD_ROWS):
        fsync_rows(run / rows)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    for name in sizes:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    for name in (CONFIG, MANIFEST):
        if (run / name).is_file():
            write_text(folder / name, (run / name).read_text(encoding="utf-8"))
    write_text(folder / "state.json", json.dumps({**numbers, "files": sizes}, indent=2))
    write_text(folder / COMPLETE, "")


def usable_checkpoint(run: Path) -> tuple[Path | None, dict[str, Any]]:
    """The latest complete checkpoint that is not damaged, and its state; (None, {}) if the run has none at all.

    A damaged one is reported in the log and loses its file COMPLETE, so the next save removes it.

    Raises:
        UserError: all are damaged.
    """
    damaged: list[UserError] = []
    for folder in reversed(complete_checkpoints(run)):
        try:
            state = read_state(folder)
            if any(not isinstance(state.get(key), int) for key in ("stage", "update", "step")):
                raise _damage_error(folder, ValueError("state.json: expected the numbers stage, update and step"))
        except UserError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            log.warning("%s; resuming from %s", reason, folder)
        for later in complete_checkpoints(run):
            if int(later.name[11:]) > int(folder.name[11:]):
                (later / COMPLETE).unlink()
        return folder, state
    if damaged:
        raise UserError(f"{damaged[0]}. There is no other checkpoint; start anew with --fresh, which keeps this folder")
    return None, {}


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and numbers that `save_checkpoint` was given; the tensors in full, on the CPU.

    Raises:
        UserError: the checkpoint is damaged although it has the file COMPLETE.
    """
    numbers = read_state(folder)
    return dict(iterate_tensors(folder, "", lambda name: None)), numbers


def iterate_tensors(folder: Path, prefix: str, like: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint whose names begin with `prefix`, as `sharded_checkpoint.iterate_tensors` gives them.
    The prefix is taken from the names, also from those for `like`. Errors as in `load_checkpoint`."""
    start = len(prefix)
    try:
        for name, tensor in sharded_checkpoint.iterate_tensors(folder, lambda name: like(name[start:]), prefix):
            yield name[start:], tensor
    except (OSError, SafetensorError) as error:
        raise _damage_error(folder, error) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `save_checkpoint` was given, of a checkpoint whose files are all there.

    Raises:
        UserError: a file of the checkpoint is missing, truncated or of another type.
    """
    try:
        state = read_json_object(folder / "state.json")
        sizes = state.pop("files", None) or {sharded_checkpoint.SINGLE_FILE: None}
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if size is not None and found != size:
                raise ValueError(f"{name}: expected {size} bytes; got {found}")
            with safe_open(folder / name, "pt"):
                pass  # the header is read
    except (OSError, ValueError, SafetensorError) as error:
        raise _damage_error(folder, error) from error
    return state


def _damage_error(folder: Path, error: BaseException) -> UserError:
    return UserError(f"expected a complete checkpoint; got a damaged {folder} ({error})")


def drop_metrics_after(run: Path, step: int) -> None:
    """Delete the rows after `step`, all rows if `step` is negative: the resumed run writes them again."""
    rows = [r for r in read_rows(run / METRICS) if isinstance(r.get("step"), int) and r["step"] <= step]
    write_rows(run / METRICS, rows)
