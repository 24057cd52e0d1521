"""`npedit toy`: the toy world's pictures, data, models, and the server that writes training rows for its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from npedit.cli.options import FreshOption, SeedOption
from npedit.cli.train import move_aside
from npedit.errors import UserError

app = typer.Typer(no_args_is_help=True, help="The toy world: pictures, data and models.")
out = Console(highlight=False, soft_wrap=True)

RateOption = Annotated[float, typer.Option(min=0, max=1)]


@app.command("data")
def toy_data(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    items: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    seed: SeedOption = 0,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also write the edited pictures.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Write the pictures alone, without any words.")] = False,
) -> None:
    """Write toy scenes as a data set: images and metadata.jsonl; no edited pictures without --pairs."""
    from npedit.toy.dataset import write_dataset

    folder = write_dataset(folder, items, seed, pairs, bare)
    out.print(f"{items} {'pictures' if bare else 'items'}: {escape(str(folder))}")


@app.command("build")
def toy_build(folder: Annotated[Path, typer.Argument(help="Where to work.")], fresh: FreshOption = False) -> None:
    """Train the toy's VAE, text-to-image model and critic from scratch. The same command resumes after a stop."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder to work in; {folder} is a file; choose another")
    from npedit.toy_models import build as models

    if fresh:
        move_aside(folder)
    models.build_toy_models(folder)


@app.command("sheet")
def toy_sheet(
    picture: Annotated[Path, typer.Argument(help="The picture to write (.png).")],
    seed: SeedOption = 0,
) -> None:
    """Write a picture with one random scene of every edit type, its instruction and the true result."""
    from npedit.cli.pictures import save_picture
    from npedit.report.report import draw_toy_sheet

    save_picture(draw_toy_sheet(seed), picture)
    out.print(f"Sheet: {escape(str(picture))}")
