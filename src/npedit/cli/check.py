"""`npedit check`: whether there is anything to learn with a recipe, its data and its models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from npedit.cli.console import err, out
from npedit.cli.json_output import JsonOption, text_on_stderr
from npedit.errors import explain_write_errors

if TYPE_CHECKING:
    from npedit.check.findings import CheckReport, Finding

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "will not learn": "bold red"}


def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe in the package.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="The report's folder; checks/NAME if not given.")] = None,
    samples: Annotated[
        int, typer.Option(help="Examples that are decoded and shown to critic and base model.", min=2)
    ] = 48,
    only: Annotated[str, typer.Option(help="Sections, as 'data,critic'; all if not given.")] = "",
    labelled: Annotated[
        Path | None, typer.Option(help="A folder of edits with known answers, for the critic: see docs/check.md.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe before training: data, critic, gradient, base model, cost. Each finding says what to do.

    Exit code 0; 1 where a finding says that the editor will not learn; 2 for bad input.
    """
    raise typer.Exit(run_check(recipe, overrides or [], folder, samples, only, labelled, as_json))


def run_check(
    name: str,
    overrides: Sequence[str],
    folder: Path | None,
    samples: int,
    only: str,
    labelled: Path | None,
    as_json: bool,
) -> int:
    """Check a recipe, write report.html and check.json, print the findings; returns the exit code.

    Raises:
        UserError: whatever the user can put right.
    """
    from npedit.check.check import check_recipe
    from npedit.check.page import write_page
    from npedit.check.subject import CheckOptions
    from npedit.recipe.config import load_recipe

    loaded = load_recipe(name, overrides)
    place = folder or Path("checks") / loaded.name
    with explain_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    sections = [word.strip() for word in only.split(",") if word.strip()]
    with text_on_stderr(True):  # standard output is for the report alone
        report = check_recipe(
            loaded,
            CheckOptions(samples=samples, labelled=labelled),
            sections,
            lambda line: err.print(f"[dim]{escape(line)} ...[/]"),
        )
    page = write_page(report, place / "report.html")
    text = json.dumps(report.as_dict(), indent=1)
    with explain_write_errors(place):
        (place / "check.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        _print_report(report, page)
    return report.exit_code


def _print_report(report: CheckReport, page: Path) -> None:
    for section in report.sections:
        out.print(f"[bold]{escape(section.title)}[/]")
        for finding in section.findings:
            _print_finding(finding)
    counts = ", ".join(f"{sum(f.severity == s for f in report.findings)} {s}" for s in STYLES)
    out.print(f"[{STYLES[report.verdict]}]{report.verdict}[/]: {counts}. Tables and pictures: {escape(str(page))}")


def _print_finding(finding: Finding) -> None:
    out.print(f"  [{STYLES[finding.severity]}]{finding.severity}[/] {escape(finding.measured)}")
    if finding.severity != "ok":
        for words in (finding.meaning, finding.advice):
            if words:
                out.print(f"      {escape(words)}")
