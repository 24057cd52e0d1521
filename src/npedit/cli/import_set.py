"""`npedit import`: references, instructions and captions of a public data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.json_output import JsonOption, print_json
from npedit.errors import UserError, train_command

FORMATS = (
    "pico-banana, gpt-image-edit, magicbrush, instructpix2pix, ultraedit, omniedit, merged-list, edit-r1, "
    "flow-factory, pref-grpo, promptrl, diffusers, diffsynth, musubi, caption-files, folder, webdataset, columns"
)


def import_set(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{FORMATS}. docs/import.md describes them.")],
    source: Annotated[Path, typer.Argument(help="The downloaded data set: a folder, or one of its lists.")],
    folder: Annotated[Path, typer.Option("--out", help="A new folder for the data set.")],
    photos: Annotated[
        Path | None, typer.Option(help="The folder of the photos, if they are not where the lists say.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="FIELD=COLUMN",
            help="Which column holds a field: photo, instruction, target_caption, ...",
        ),
    ] = None,
    first: Annotated[int, typer.Option(help="Import so many rows only; 0: all.", min=0)] = 0,
    held_out: Annotated[
        int, typer.Option("--held-out", help="Rows to list in held_out.txt, for data.held_out.", min=0)
    ] = 0,
    licence: Annotated[str, typer.Option(help="The licence to note in every row and on the data card.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Import references, instructions and captions of a public data set of edits. Edited images are never opened.

    npedit import omniedit OmniEdit-Filtered-1.2M/ --out omniedit/
    """
    from npedit.interop.import_set import import_set as run_import
    from npedit.interop.import_set import report_lines

    named = dict(_split_column(text) for text in columns or [])
    report = run_import(form, source, folder, photos, named, first, held_out, licence)
    if as_json:
        print_json({"folder": folder} | vars(report))
        return
    for line in report_lines(report):
        out.print(escape(line))
    out.print(f"Data set: {escape(str(folder))}. Train on it: {escape(train_command(folder))}")


def _split_column(text: str) -> tuple[str, str]:
    field, equals, column = text.partition("=")
    if not equals or not field.strip() or not column.strip():
        raise UserError(f"--column: expected FIELD=COLUMN, such as instruction=prompt; got {text!r}; correct it")
    return field.strip(), column.strip()
