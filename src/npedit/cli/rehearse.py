"""`npedit rehearse`: a recipe end to end with random weights at real size, before a real training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.errors import UserError
from npedit.runs.lock import hold

if TYPE_CHECKING:
    from npedit.rehearsal.rehearse import Measured

BEGUN = ".begun"  # a folder in that of a rehearsal that has not ended
INSTRUCTION = "paint the table dark red"


def rehearse(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe in the package.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="At most so many blocks in each model; full depth if not given.", min=1)
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="H W", help="One picture size in pixels instead of the recipe's.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes on this machine; 0: one per visible GPU. They share each batch.", min=0)
    ] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="A new folder; rehearsals/NAME if not given.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep models, photos, run and export afterwards.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe end to end with random weights at the real models' width, and measure time and memory.

    Nothing is downloaded. Every stage makes two updates (the second with two calls of the student); then samples,
    evaluation, save, stop, resume, export and an edit. For several machines: torchrun ... -m npedit rehearse RECIPE,
    see docs/clusters.md.
    """
    with text_on_stderr(as_json):
        code, values = run_rehearse(recipe, overrides or [], layers, size, processes, folder, keep, as_json)
    if as_json and values:
        print_json(values)
    raise typer.Exit(code)


def run_rehearse(
    name: str,
    overrides: Sequence[str],
    layers: int | None,
    size: tuple[int, int] | None,
    processes: int,
    folder: Path | None,
    keep: bool,
    as_json: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Rehearse a recipe in `processes` processes on this machine (0: one per visible GPU).

    Returns the exit code, and what was measured; this is empty if another process measured and printed it.

    Raises:
        UserError: whatever the user can put right.
    """
    from npedit.nets import distributed
    from npedit.recipe.config import load_recipe
    from npedit.rehearsal import rehearse as rehearsal
    from npedit.training import launch, parts

    with distributed.process_group():
        loaded = load_recipe(name, overrides)
        place = folder or Path("rehearsals") / loaded.name
        count = 1 if distributed.is_multi_process() else processes or launch.default_process_count()
        parts.check_processes(loaded, count)
        if distributed.is_main_process():
            _require_place(place)
        if count > 1:
            return launch.start_processes(count, _arguments(name, overrides, layers, size, place, keep, as_json)), {}
        with _begin(place) if distributed.is_main_process() else nullcontext():
            found = rehearsal.rehearse(loaded, place, layers, size)
            return 0, _finish(found, place, keep) if distributed.is_main_process() else {}


def _require_place(folder: Path) -> None:
    if not (folder / BEGUN).is_dir() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"expected a new or empty folder; got {folder}; remove it, or choose another with --out")


@contextmanager
def _begin(folder: Path) -> Iterator[None]:
    """Hold the folder of a rehearsal in a `with` block. What a rehearsal that did not end left there is deleted."""
    with hold(folder / BEGUN, "rehearse"):
        for path in folder.iterdir():
            if path.name != BEGUN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    shutil.rmtree(folder / BEGUN)


def _arguments(
    name: str,
    overrides: Sequence[str],
    layers: int | None,
    size: tuple[int, int] | None,
    place: Path,
    keep: bool,
    as_json: bool,
) -> list[str]:
    options = [] if layers is None else ["--layers", str(layers)]
    options += [] if size is None else ["--size", *map(str, size)]
    return [
        "rehearse",
        name,
        *overrides,
        *options,
        *(["--keep"] if keep else []),
        *(["--json"] if as_json else []),
        "--out",
        str(place),
    ]


def _finish(found: Measured, place: Path, keep: bool) -> dict[str, Any]:
    """Export the editor, edit one photo with the export, print and return what was measured, and tidy up."""
    from npedit.cli.export import run_export
    from npedit.rehearsal.rehearse import UNKNOWN, measured_values, report_lines

    run_export(str(found.run), place / "export")
    _edit_with_export(place, found.run)
    lines = [*report_lines(found), "Saved, stopped by SIGTERM, resumed, exported, and edited one picture.", UNKNOWN]
    (place / "rehearsal.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = measured_values(found)
    (place / "rehearsal.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for line in lines:
        out.print(escape(line))
    if not keep:
        for inner in (path for path in place.iterdir() if path.is_dir() and path.name != BEGUN):
            shutil.rmtree(inner)
    out.print(f"Written: {escape(str(place / 'rehearsal.txt'))}" + ("" if keep else " (all else is removed)"))
    return values | {"folder": str(place)}


def _edit_with_export(place: Path, run: Path) -> None:
    """One edit with the exported editor, of one of the samples' references."""
    from npedit.cli.edit import run_edit

    picture = next((run / "samples").rglob("reference-000.png"))
    for job in run_edit(
        [str(picture), INSTRUCTION], [], str(place / "edited.png"), 0, None, str(place / "export"), out
    ):
        out.print(escape(str(job)))
