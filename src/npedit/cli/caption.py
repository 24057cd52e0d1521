"""`npedit caption`: the captions that the rows of an existing set lack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import err, out
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.prepare_progress import progress_display
from npedit.cli.writers import (
    EngineOption,
    FolderOption,
    JpegQualityOption,
    MaxCostOption,
    ParametersOption,
    PriceInOption,
    PriceOutOption,
    PromptsOption,
    RayAddressOption,
    SeedOption,
    SideOption,
    VerifierModelOption,
    VerifierOption,
    VerifyOption,
    WorkersOption,
    WriterModelOption,
    WriterOption,
    open_engine,
    open_meter,
    open_models,
    print_usage,
    require_options,
)
from npedit.errors import UserError, train_command


def caption(
    source: Annotated[Path, typer.Argument(metavar="SET", help="A set of photos with instructions.")],
    folder: FolderOption = None,
    writer: WriterOption = None,
    writer_model: WriterModelOption = "",
    verifier: VerifierOption = None,
    verifier_model: VerifierModelOption = "",
    verify: VerifyOption = True,
    parameters: ParametersOption = "",
    workers: WorkersOption = 8,
    side: SideOption = 1024,
    jpeg_quality: JpegQualityOption = 90,
    prompts: PromptsOption = None,
    max_cost: MaxCostOption = 0,
    price_in: PriceInOption = 0,
    price_out: PriceOutOption = 0,
    seed: SeedOption = 0,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write a set anew with the captions that its rows lack. Instructions and all other columns stay as they are.

    npedit caption imported/ --out set/ --writer http://localhost:8000/v1 --writer-model NAME

    The same command resumes.
    """
    target, writers = require_options(folder, writer)
    from npedit.prepare.caption_set import caption_set
    from npedit.prepare.prepare import PrepareSettings
    from npedit.prepare.prompts import load_prompts

    meter = open_meter(price_in, price_out, max_cost)
    settings, loaded = PrepareSettings(shares={}, side=side, seed=seed), load_prompts(prompts)
    served = (writers, writer_model, verifier or [], verifier_model)
    models = open_models(*served, verify, workers, jpeg_quality, parameters)
    workplace = open_engine(engine, ray_address, models)
    with progress_display(bool(price_in or price_out), err) as report:
        facts = caption_set(source, target, settings, loaded, *models, meter, report, workplace)
    show_result(target, facts, as_json)


def show_result(folder: Path, facts: dict[str, Any], as_json: bool) -> None:
    """What was filled; with `as_json` the facts as they are in prepare.json.

    Raises:
        UserError: the run stopped at the cost ceiling, or requests got no answer.
    """
    if as_json:
        print_json({"folder": folder} | facts)
    with text_on_stderr(as_json):
        print_captions(folder, facts)
    if facts["stopped"]:
        raise UserError(
            f"expected to complete all rows; stopped: {facts['stopped']}. The set holds the rows that are complete. To "
            "go on, run the same command: no answered question is asked again"
        )


def print_captions(folder: Path, facts: dict[str, Any]) -> None:
    """How many rows are complete, what was rejected, and what it cost."""
    out.print(
        f"{facts['rows']} of {facts['read']} rows are complete; {facts['complete_before']} were before. "
        f"{facts['rejected']} rows rejected"
    )
    for reason, count in list(facts["reasons"].items())[:5]:
        out.print(escape(f"  {count} {reason}"))
    print_usage(facts)
    out.print(f"Set: [bold]{escape(str(folder))}[/]. Train on it: {escape(train_command(folder))}")
