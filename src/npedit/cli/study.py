"""`npedit study`: many runs, their scores, and the claims that they decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.recipe.packaged import recipe_path


def study(
    path: Annotated[str, typer.Argument(metavar="STUDY", help="A study's YAML file, or 'study-toy' in the package.")],
    folder: Annotated[Path | None, typer.Option("--out", help="The study's folder; runs/NAME if not given.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed and a 25th of the updates: a check that every part works.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--publish", help="Copy the page to this .md file.")] = None,
    only: Annotated[
        str,
        typer.Option(help="Train only these variants and searches, as 'A,B', and the variants that they start from."),
    ] = "",
    workers: Annotated[
        int, typer.Option(min=1, help="Runs side by side, each in a process with one thread; 1: all in this process.")
    ] = 1,
    quote: Annotated[
        Path | None, typer.Option("--quote", help="Write the table of claims into this page, between its two marks.")
    ] = None,
) -> None:
    """Train and score the variants of a study, and write results.md. The same command resumes."""
    from npedit.study.claims import CLAIMS_FILE, quote_claims, read_quoting_page
    from npedit.study.file import load_study
    from npedit.study.page import publish_results, require_page_name
    from npedit.study.study import run_study

    if page is not None:
        require_page_name(page)
    if quote is not None:
        read_quoting_page(quote)  # told now, and not when all runs have ended
    loaded = load_study(recipe_path(path))
    folder = folder or Path("runs") / (loaded.name + ("-quick" if quick else ""))
    names = [name.strip() for name in only.split(",") if name.strip()]
    tell = lambda line: out.print(f"[bold]{escape(line)}[/]")  # noqa: E731
    results = run_study(loaded, folder, recipe_path, tell, quick, names, workers)
    if page is not None:
        results = publish_results(results, page)
    if quote is not None:
        quote_claims(quote, folder / CLAIMS_FILE)
    out.print(f"Results: [bold]{escape(str(results.resolve()))}[/]")
