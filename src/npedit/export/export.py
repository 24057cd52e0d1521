"""`npedit export`: an editor as a folder that it shares with no run, written completely or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export.diffusers_folder import write_pipeline
from npedit.flow import few_step_times
from npedit.runs.editor_weights import read_recipe, require_finite_files
from npedit.runs.final import set_base, write_final
from npedit.runs.resolve import EditorSource, resolve_editor

FORMS = ("diffusers", "comfyui")


def export_editor(name: str, folder: Path, form: str = "", base: str = "", merge: bool = False) -> EditorSource:
    """Write an editor to a new folder; returns where the editor was found. `name` is what `resolve_editor` takes; of a
    checkpoint the EMA weights are written.

    `form` is "" for a copy that npedit opens, or one of `FORMS`: "diffusers" adds a pipeline, and npedit opens the
    folder too. `base` is what the folder will name as the base model, "" for what the editor names now. With `merge` an
    adapter is added to the base's weights, and the folder holds a whole transformer.

    Raises:
        UserError: there is no editor, a weight is NaN or infinite, the form is unknown, or the folder is not new or
            cannot be written.
    """
    if form and form not in FORMS:
        raise UserError(f"expected the form {' or '.join(FORMS)}; got {form!r}")
    source = resolve_editor(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"expected a new or empty folder; got {folder}, which is not; choose another")
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_editor(source, base, aside)
        if form == "diffusers":
            write_pipeline(aside)
        _open_permissions(aside)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"expected a folder to write to; got {folder}: {error}; choose another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return source


def _write_editor(source: EditorSource, base: str, aside: Path) -> None:
    """Write the folder that `Editor.open` opens."""
    if source.is_checkpoint:
        _write_checkpoint(source, base, aside)
    else:
        require_finite_files(source.folder)
        shutil.copytree(source.folder, aside)
    if base:
        set_base(aside, base)


def _write_checkpoint(source: EditorSource, base: str, aside: Path) -> None:
    """Write a checkpoint's editor as training writes `final/`."""
    editor, recipe = Editor.open(source.folder, base=base), read_recipe(source)
    shift = editor.family.noise_shift(*editor.sizes[0])
    times, scheduler = few_step_times(editor.steps, shift).tolist(), editor.family.few_step_scheduler(shift)
    aside.mkdir()
    final = write_final(aside, recipe, editor.net, scheduler, times, editor.sizes)
    for path in list(final.iterdir()):
        path.rename(aside / path.name)
    final.rmdir()


def _open_permissions(folder: Path) -> None:
    """Give files and folders the permissions that new ones get here: safetensors makes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
