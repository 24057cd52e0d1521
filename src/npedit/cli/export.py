"""`npedit export`: its options, and the lines that it prints about an exported editor."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.errors import npedit_command

LOAD = "DiffusionPipeline.from_pretrained({0!r}, custom_pipeline={0!r}, trust_remote_code=True, torch_dtype={1})"


def export(
    run: Annotated[str, typer.Argument(help="RUN, RUN/final, RUN/checkpoint-N, or 'embedded'.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    form: Annotated[
        str, typer.Option("--as", help="'diffusers' adds a pipeline for diffusers; 'comfyui' writes ComfyUI's files.")
    ] = "",
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA into the base model's transformer.")] = False,
    base: Annotated[str, typer.Option(help="Base model that OUT names: a Hub id or a folder.")] = "",
) -> None:
    """Write an editor to a new folder: weights, scheduler, model card. Of a checkpoint, the EMA weights."""
    for line in run_export(run, folder, base, form, merge):
        out.print(escape(line))


def run_export(name: str, folder: Path, base: str = "", form: str = "", merge: bool = False) -> list[str]:
    """Lines about the export of an editor to a new folder. Arguments and errors as in `export_editor`."""
    from npedit.export.export import export_editor

    done = export_editor(name, folder, form, base, merge)
    head = f"Exported {done.source} to {folder}. Its base model: {done.base}."
    return [head, *_base_warning(done.base), *(done.notes or _use_lines(folder))]


def _base_warning(base: str) -> Iterator[str]:
    if os.path.isabs(base):
        yield (
            "The base model is named by its place on this computer. For use elsewhere name a Hub id or another folder: "
            f"{npedit_command()} export ... --base ID, or edit ... --base FOLDER."
        )


def _use_lines(folder: Path) -> Iterator[str]:
    from npedit.export.diffusers_folder import PIPELINE_FILE, dtype_source
    from npedit.runs.editor_facts import FACTS_FILE
    from npedit.runs.files import read_json_object

    yield f"Use it: {npedit_command()} edit PICTURE INSTRUCTION --model {shlex.quote(str(folder))}"
    if (folder / PIPELINE_FILE).is_file():
        types = dtype_source(read_json_object(folder / FACTS_FILE))
        yield f"In diffusers: {LOAD.format(str(folder), types)}"
