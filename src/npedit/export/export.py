"""`npedit export`: an editor as a folder that it shares with no run, written completely or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from npedit.editor import Editor
from npedit.errors import UserError, explain_write_errors
from npedit.export.card import CARD, model_card
from npedit.export.comfyui import write_comfyui
from npedit.export.diffusers_folder import PART_FILE, PIPELINE_FILE, write_pipeline
from npedit.export.lora_file import fold_alpha, merged_transformer
from npedit.flow import few_step_times
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import EMBEDDED
from npedit.runs.editor_facts import FACTS_FILE, EditorFacts
from npedit.runs.editor_weights import read_recipe, require_finite_files
from npedit.runs.files import read_json_object, write_text
from npedit.runs.final import drop_source_paths, set_base, write_final
from npedit.runs.resolve import EditorSource, resolve_editor

FORMS = ("diffusers", "comfyui")
NOTHING_TO_MERGE = "Nothing to merge: the editor was fully fine-tuned and has a whole transformer already."


@dataclass(frozen=True)
class Exported:
    """Where an editor was found, the base model that the export names, and lines about what was written."""

    source: EditorSource
    base: str
    notes: tuple[str, ...] = ()


def export_editor(name: str, folder: Path, form: str = "", base: str = "", merge: bool = False) -> Exported:
    """Write an editor to a new folder; returns facts about it. `name` is what `resolve_editor` takes; of a checkpoint
    the EMA weights are written.

    `form` is "" for a copy that npedit opens, or one of `FORMS`. "diffusers" adds a pipeline, and npedit opens the
    folder too; a copy of an editor with a pipeline has one as well. "comfyui" writes ComfyUI's files only. `base` is
    what the folder will name as the base model, a Hub id or a folder; "" for what the editor names now. With `merge` an
    adapter is added to the base's weights, and a whole transformer is written; an editor that was fully fine-tuned is
    one already.

    Raises:
        UserError: there is no editor, a weight is NaN or infinite, the form is unknown, the base model is not found
            where it is needed, or the folder is not new or cannot be written.
    """
    if form and form not in FORMS:
        raise UserError(f"expected the form {' or '.join(FORMS)}; got {form!r}; choose one of them")
    source, folder = resolve_editor(name), Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"expected a new or empty folder; got {folder}, which is not; choose another")
    work = (folder if folder.is_dir() else folder.parent) / f".{folder.name}.tmp-{os.getpid()}"
    try:
        with explain_write_errors(folder):
            work.mkdir(parents=True)
            done = _write_form(source, work / folder.name, form, _absolute(base), merge)
            _open_permissions(work / folder.name)
            _move_into_place(work / folder.name, folder)
    except OSError as error:
        raise UserError(f"expected a folder to write to; got {folder}: {error}; choose another") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done


def _move_into_place(written: Path, folder: Path) -> None:
    """Rename a complete folder to `folder`. An empty folder that is there already stays and gets the content: it may be
    the working folder of a shell."""
    if not folder.is_dir():
        os.replace(written, folder)
        return
    for path in sorted(written.iterdir()):
        os.replace(path, folder / path.name)


def _write_form(source: EditorSource, folder: Path, form: str, base: str, merge: bool) -> Exported:
    """Write the editor to a folder that does not exist yet, in one of the forms."""
    copy = folder.with_name("editor") if form == "comfyui" else folder
    where = _write_editor(source, copy, base)
    facts = read_json_object(copy / FACTS_FILE)
    notes: tuple[str, ...] = ()
    if (copy / LORA_FILE).is_file() and merge:
        _merge(copy, where)
    elif (copy / LORA_FILE).is_file():
        fold_alpha(copy / LORA_FILE, facts)
    elif merge:
        notes = (NOTHING_TO_MERGE,)
    if form == "diffusers" or (not form and (source.folder / PIPELINE_FILE).is_file()):
        write_pipeline(copy, where)
    if form == "comfyui":
        folder.mkdir()
        notes += tuple(write_comfyui(Editor.open(copy, base=where), facts, folder))
    write_text(folder / CARD, model_card(folder, source, facts))
    return Exported(source, facts["base"], notes)


def _write_editor(source: EditorSource, folder: Path, base: str) -> str:
    """Write the folder that `Editor.open` opens; returns where its base model can be read."""
    recipe = read_recipe(source) if source.is_checkpoint else None
    named = EditorFacts.from_recipe(recipe).base if recipe else EditorFacts.read(source.folder).base
    where = _readable_base(named, base)
    if recipe:
        _write_checkpoint(source, where, folder)
    else:
        _copy_editor(source.folder, folder)
    if base:
        set_base(folder, base)
    return where


def _copy_editor(source: Path, folder: Path) -> None:
    """Copy what `Editor.open` reads. A pipeline that the source has is not copied: its files name the base model.

    Raises:
        UserError: there are no weights, or one is NaN or infinite.
    """
    weights = LORA_FILE if (source / LORA_FILE).is_file() else "transformer"  # of a LoRA, transformer/ is the base's
    if not (source / weights).exists():
        raise UserError(f"expected transformer/ or {LORA_FILE} in {source}; got neither; export the run again")
    require_finite_files(source)
    folder.mkdir()
    for name in (FACTS_FILE, "scheduler", weights):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(f"{PART_FILE}.*"))
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _readable_base(named: str, chosen: str) -> str:
    """Where the base model is read: of the place that the editor names and the one that the export will name, the one
    on this computer, else the latter."""
    for place in (named, chosen):
        if place == EMBEDDED or os.path.isdir(place):
            return place
    return chosen or named


def _absolute(base: str) -> str:
    """A folder's path from the root; a Hub id as it is.

    Raises:
        UserError: it is neither.
    """
    if not base or os.path.isdir(base):
        return str(Path(base).resolve()) if base else ""
    try:
        validate_repo_id(base)
    except HFValidationError:
        raise UserError(
            f"--base: expected a Hub id (USER/NAME) or a folder; got {base!r}, which is no folder here and no id; "
            "correct it"
        ) from None
    return base


def _write_checkpoint(source: EditorSource, base: str, folder: Path) -> None:
    """Write a checkpoint's editor as training writes `final/`."""
    editor, recipe = Editor.open(source.folder, base=base), read_recipe(source)
    shift = editor.family.noise_shift(*editor.sizes[0])
    times, scheduler = few_step_times(editor.steps, shift).tolist(), editor.family.few_step_scheduler(shift)
    final = write_final(folder.parent, recipe, editor.net, scheduler, times, editor.sizes, source.run)
    final.rename(folder)


def _merge(folder: Path, base: str) -> None:
    """Replace an adapter by the base model's transformer with the adapter merged into the weights."""
    net = Editor.open(folder, base=base).net
    assert isinstance(net, LoraAdapter), f"expected an adapter in {folder}; got {type(net).__name__}"
    whole: Any = merged_transformer(net)
    whole.save_pretrained(folder / "transformer")
    drop_source_paths(folder)
    (folder / LORA_FILE).unlink()


def _open_permissions(folder: Path) -> None:
    """Give files and folders the permissions that new ones get here: safetensors makes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
