"""`npedit compare A B ...`: paired comparisons of folders of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.local_page import PagePortOption
from npedit.cli.people import AnswersOption, DataOption, rate_results, read_answers
from npedit.errors import UserError, explain_write_errors
from npedit.scoring.tables import TextTable, rich_table

if TYPE_CHECKING:
    from npedit.scoring.results import Results


@dataclass(frozen=True)
class _Request:
    """The options of a comparison; `labels` is a file of human labels, or of people's answers."""

    folders: Sequence[Path]
    wanted: Sequence[str]
    margin: float
    plot: Path
    page: Path | None
    labels: Path | None
    data: Path | None
    seed: int
    force: bool


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B...",
            help="Folders of results; A is the baseline. Join one editor's results under several judges with +: A1+A2.",
        ),
    ],
    wanted: Annotated[list[str] | None, typer.Option("--metric", help="Only this metric; repeatable.")] = None,
    margin: Annotated[float, typer.Option(help="Largest difference of an item's scores that is a tie.", min=0)] = 0.0,
    plot: Annotated[Path, typer.Option("--plot", help="PNG file for a plot of the means.")] = Path("compare.png"),
    page: Annotated[
        Path | None, typer.Option("--page", help="HTML file for the tables, the plot and pictures side by side.")
    ] = None,
    people: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|A",
            help='File of human labels, an object a line ({"result": a folder\'s name, "id": ..., "score": ...}), '
            "or of people's answers. Or, as --people A B: open a page on which people compare A and B blindly.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of intervals and tests.", min=0)] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare results of different protocols, judges or encoders.")
    ] = False,
    answers: AnswersOption = Path("people.jsonl"),
    data: DataOption = None,
    port: PagePortOption = 7862,
    as_json: JsonOption = False,
) -> None:
    """Compare editors item by item: means, paired differences, win rates; of three or more a ranking.

    Intervals are 95 % bootstrap intervals; items are drawn within tasks. P-values are from sign-flip tests, with Holm's
    correction for the number of tests printed.
    """
    from npedit.scoring.comparison import open_results

    _check_name("--plot", plot, ".png")
    _check_name("--page", page, ".html")
    with text_on_stderr(as_json):
        if people and people.is_dir():
            results = open_results([people, *folders], force)
            values = {"people": rate_results([people, *folders], results, data, answers, port, seed)}
        else:
            values = _compare(_Request(folders, wanted or [], margin, plot, page, people, data, seed, force))
    if as_json:
        print_json(values)


def _compare(request: _Request) -> dict[str, Any]:
    """Print the tables, and write the plot and the page; returns the figures in them."""
    from npedit.output_pictures import check_writable
    from npedit.report.comparison import agreement_table, differences_table, ranking_table
    from npedit.scoring.comparison import (
        measure_agreement,
        open_results,
        paired_differences,
        rank_editors,
        select_common_metrics,
        unknown_judge_notes,
    )
    from npedit.serve.people import is_answers

    for place in filter(None, (request.plot, request.page)):
        check_writable(place)
    results = open_results(request.folders, request.force)
    metrics, left_out = select_common_metrics(results, request.wanted, request.force)
    notes = unknown_judge_notes(results) + left_out
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}")
    if not metrics:
        raise UserError("expected a metric that all results have on enough items; got none; the notes above say why")
    values: dict[str, Any] = {"editors": [r.name for r in results], "notes": notes, "ranking": [], "agreement": []}
    values["metrics"] = paired_differences(results, metrics, request.margin, request.seed)
    tables = [differences_table(values["metrics"], results[0].name)]
    if len(results) > 2:
        values["ranking"] = rank_editors(results, metrics, request.margin, request.seed)
        tables.append(ranking_table(values["ranking"]))
    if request.labels and not is_answers(request.labels):
        values["agreement"], labels = measure_agreement(results, metrics, request.labels, request.seed)
        tables.append(agreement_table(values["agreement"], labels))
    for table in tables:
        out.print(rich_table(table))
    if request.labels and is_answers(request.labels):
        values["people"] = read_answers(_judged_first(request), results, request.data, request.labels, request.seed)
    return values | _write_files(request, results, values, tables)


def _write_files(
    request: _Request, results: Sequence[Results], values: Mapping[str, Any], tables: Sequence[TextTable]
) -> dict[str, str]:
    """Write the plot, and the page if one is wanted; returns their paths."""
    from npedit.report.comparison import mean_panels
    from npedit.report.plots import plot_comparison

    with explain_write_errors(request.plot):
        request.plot.write_bytes(plot_comparison(values["editors"], mean_panels(values["metrics"])))
    out.print(f"Plot: {escape(str(request.plot))}")
    if request.page is None:
        return {"plot": str(request.plot)}
    _write_page(request.page, request, results, values, tables)
    out.print(f"Page: {escape(str(request.page.resolve()))}")
    return {"plot": str(request.plot), "page": str(request.page)}


def _write_page(
    page: Path, request: _Request, results: Sequence[Results], values: Mapping[str, Any], tables: Sequence[TextTable]
) -> None:
    from npedit.report.comparison import make_comparison_page, preference_table
    from npedit.report.result_pictures import read_result_pictures
    from npedit.runs.checkpoint import write_text

    folders = _judged_first(request)
    shown = [*tables, preference_table(values["people"])] if values.get("people") else tables
    try:
        pictures = [read_result_pictures(f, r, request.data) for f, r in zip(folders, results, strict=True)]
        note = ""
    except UserError as error:
        pictures, note = [], f"No pictures: {error}"
    write_text(page, make_comparison_page(results, values, shown, pictures, note))


def _judged_first(request: _Request) -> list[Path]:
    """One folder of each editor: all judges have seen the same pictures."""
    from npedit.scoring.comparison import split_folders

    return [split_folders(folder)[0] for folder in request.folders]


def _check_name(option: str, path: Path | None, ending: str) -> None:
    if path is not None and path.suffix.lower() != ending:
        raise UserError(f"{option}: expected a name to end in {ending}; got {path}; give another name")
