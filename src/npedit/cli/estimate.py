"""`npedit estimate`: a recipe's use of memory and disk."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import err, out
from npedit.cli.json_output import JsonOption, print_json


def estimate_memory(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe in the package.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: stages.0.updates=100"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Report whether it fits a GPU of this size, such as 24GB.")] = "",
    processes: Annotated[
        int, typer.Option(help="Processes that share each batch and, with trainer.shard, the weights.", min=1)
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate a recipe's use of memory and disk, without its weights and without a GPU."""
    from npedit.recipe.config import load_recipe
    from npedit.training.checkpoint_warnings import checkpoint_warnings
    from npedit.training.estimate import estimate
    from npedit.training.estimate_table import estimate_table, estimate_values, fit_message, parse_gpu_size

    if gpu:
        parse_gpu_size(gpu)  # a bad size is reported before the work
    chosen = load_recipe(recipe, overrides or [])
    warnings = checkpoint_warnings(chosen)
    for message in warnings:
        err.print(f"[yellow]warning[/] family.weights: {escape(message)}")
    found = estimate(chosen, processes)
    if as_json:
        facts = {"recipe": chosen.name, "processes": processes, "warnings": warnings}
        print_json(facts | estimate_values(found, gpu))
        return
    for line in [*estimate_table(found), *([fit_message(found, gpu)] if gpu else [])]:
        out.print(escape(line))
