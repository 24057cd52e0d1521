"""`npedit push`: an editor to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.errors import UserError


def push(
    run: Annotated[str, typer.Argument(help="RUN, RUN/checkpoint-N, 'embedded', or what npedit export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    form: Annotated[
        str, typer.Option("--as", help="'diffusers' or 'comfyui': export so first; see npedit export.")
    ] = "",
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA into the base model's transformer.")] = False,
    base: Annotated[str, typer.Option(help="Hub id of the base model, if the editor names a local folder.")] = "",
) -> None:
    """Upload an editor with its model card to the Hugging Face Hub. Log in first: hf auth login."""
    out.print(escape(run_push(run, repository, private, form, merge, base)))


def run_push(
    name: str, repository: str, private: bool = False, form: str = "", merge: bool = False, base: str = ""
) -> str:
    """Export an editor and upload it; returns a line about it. A folder that `npedit export` wrote is uploaded as it
    is, if neither form nor base are asked for.

    Raises:
        UserError: a bad id, no token, no editor, a base model that is named by a local path, or what the Hub answers.
    """
    from npedit.export.hub import hidden_files, push_to_hub, require_pushable
    from npedit.runs.resolve import resolve_editor

    folder = Path(name)
    if not _is_exported(folder):
        resolve_editor(name)
    require_pushable(repository)
    with tempfile.TemporaryDirectory() as place:
        if form or merge or base or not _is_exported(folder):
            folder = _export(name, Path(place) / "editor", form, merge, base)
        _require_public_base(folder)
        address = push_to_hub(folder, repository, private)
        hidden = ", ".join(hidden_files(folder))
    return f"Pushed {name} to {address}" + (f" without its hidden files: {hidden}" if hidden else "")


def _is_exported(folder: Path) -> bool:
    """Whether `npedit export` wrote this folder, in any form: an editor with its card that belongs to no run."""
    from npedit.export.card import CARD
    from npedit.export.comfyui import is_comfyui_folder
    from npedit.runs.editor_facts import FACTS_FILE
    from npedit.runs.resolve import CONFIG

    is_editor = (folder / FACTS_FILE).is_file() or is_comfyui_folder(folder)
    in_run = (folder / CONFIG).exists() or (folder.parent / CONFIG).exists()
    return is_editor and (folder / CARD).is_file() and not in_run


def _export(name: str, folder: Path, form: str, merge: bool, base: str) -> Path:
    from npedit.export.export import export_editor

    export_editor(name, folder, form, base, merge)
    return folder


def _require_public_base(folder: Path) -> None:
    """Refuse an editor whose base model, or a part of it, is named by its place on this computer."""
    for base in _named_bases(folder):
        if os.path.isabs(base) or os.path.isdir(base):
            raise UserError(
                f"expected an editor whose base model has a Hub id; got the folder {base}, which nobody else has; say "
                "which model it is with --base USER/MODEL"
            )


def _named_bases(folder: Path) -> Iterator[str]:
    """What npedit.json and the parts of a pipeline name as the base model.

    Raises:
        UserError: one of the files is damaged.
    """
    from npedit.runs.editor_facts import FACTS_FILE, EditorFacts
    from npedit.runs.files import read_json_object

    if (folder / FACTS_FILE).is_file():
        yield EditorFacts.read(folder).base
    for path in folder.glob("*/base_part.json"):
        try:
            yield str(read_json_object(path).get("base", ""))
        except ValueError as error:
            raise UserError(f"expected a JSON object in {path}; got: {error}; export the editor again") from None
