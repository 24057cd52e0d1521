"""`npedit compare A B ...`: paired comparisons of folders of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npedit.errors import UserError, did_you_mean, explain_write_errors

if TYPE_CHECKING:
    from npedit.scoring.results import Results

out = Console(highlight=False, soft_wrap=True)
Interval = tuple[float, float] | None


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B...",
            help="Folders of results; A is the baseline. Join one editor's results under several judges with +: A1+A2.",
        ),
    ],
    wanted: Annotated[list[str] | None, typer.Option("--measure", help="Only this metric; repeatable.")] = None,
    margin: Annotated[float, typer.Option(help="Largest difference of an item's scores that is a tie.", min=0)] = 0.0,
    plot: Annotated[Path, typer.Option("--plot", help="PNG file for a plot of the means.")] = Path("compare.png"),
    people: Annotated[
        Path | None,
        typer.Option(
            help='File of human labels, one JSON object a line: {"result": a folder\'s name, "id": ..., "score": ...}'
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of intervals and tests.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Compare results of different protocols or judges.")] = False,
) -> None:
    """Compare editors item by item: means, paired differences, win rates; of three or more a ranking.

    Intervals are 95 % bootstrap intervals; items are drawn within tasks. P-values are from sign-flip tests, with Holm's
    correction for the number of tests printed.
    """
    results = open_results(folders, force)
    measures, left_out = select_common_metrics(results, wanted or [])
    for note in left_out:
        out.print(f"[yellow]note[/] {escape(note)}")
    if not measures:
        raise UserError("expected a metric that all results have on enough items; got none; the notes above say why")
    if plot.suffix.lower() != ".png":
        raise UserError(f"expected a plot's name to end in .png; got {plot}; change --plot")
    out.print(differences_table(results, measures, margin, seed))
    if len(results) > 2:
        out.print(ranking(results, measures, margin, seed))
    if people:
        out.print(agreement(results, measures, people, seed))
    _write_plot(results, measures, plot, seed)
    out.print(f"Plot: {escape(str(plot))}")


def open_results(folders: Sequence[Path], force: bool) -> list[Results]:
    """Read folders of results. Folders of the same name are named by their paths.

    Raises:
        UserError: fewer than two folders, or different protocols or judges without `force`.
    """
    from dataclasses import replace

    if len(folders) < 2:
        raise UserError(f"expected at least two folders of results; got {len(folders)}; give another")
    found = [_read_results(folder) for folder in folders]
    if len({r.name for r in found}) < len(found):
        found = [replace(r, name=str(folder)) for r, folder in zip(found, folders)]
    if len({r.name for r in found}) < len(found):
        raise UserError("expected different folders; got one of them twice; leave it out")
    for key in ("protocol", "judge", "repeats", "swap"):
        kinds = {json.dumps(_without_judge_names(r.settings.get(key)), sort_keys=True) for r in found}
        if len(kinds) > 1 and not force:
            raise UserError(
                f"expected results of one {key}; got {'; '.join(sorted(kinds))}; "
                "evaluate them in the same way, or compare them nevertheless with --force"
            )
    return found


def _without_judge_names(fact: Any) -> Any:
    """A setting of a result. A judge is identified without its name if other facts identify it: its folder may move."""
    if isinstance(fact, list):
        return [_without_judge_names(f) for f in fact]
    return {k: v for k, v in fact.items() if k != "name"} or fact if isinstance(fact, dict) else fact


def _read_results(folder: Path) -> Results:
    """The results in one folder, or the mean over judges of several folders that are joined by +."""
    from npedit.scoring.results import Results, average_judges

    if folder.exists() or "+" not in str(folder):
        return Results.read(folder)
    judged = [Results.read(Path(part)) for part in str(folder).split("+")]
    if len({json.dumps(r.settings.get("protocol"), sort_keys=True) for r in judged}) > 1:
        raise UserError(f"{folder}: expected results of one protocol; got several protocols; evaluate again with one")
    return average_judges(judged)


def select_common_metrics(results: Sequence[Results], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """(metrics to compare, reasons why others are left out). If none is `wanted`, all except those of baselines.

    Raises:
        UserError: the first result does not have a wanted metric.
    """
    from npedit.scoring.results import MIN_COVERAGE, UNDEFINED_PREFIX, common_scores

    names = results[0].score_names()
    for name in wanted:
        if name not in names:
            raise UserError(f"expected a metric of {results[0].name}; got {name!r}.{did_you_mean(name, names)} "
                            f"It has: {', '.join(names)}")  # fmt: skip
    kept, notes = [], []
    for name in wanted or [n for n in names if "/" not in n]:
        failed = {}
        for r in results:
            bad = sum(
                r_.scores.get(name) is None and not r_.why.get(name, "").startswith(UNDEFINED_PREFIX) for r_ in r.rows
            )
            if bad > (1 - MIN_COVERAGE) * len(r.rows):
                failed[r.name] = f"{bad} of {len(r.rows)} missing in {r.name}"
        if failed:
            notes.append(f"{name} is left out: {', '.join(failed.values())}")
        elif not common_scores(results, name)[0].size:
            notes.append(f"{name} is left out: no item has it in all results")
        else:
            kept.append(name)
    return kept, notes


def differences_table(results: Sequence[Results], measures: Sequence[str], margin: float, seed: int) -> Table:
    """A table with a row for each metric and editor: the mean, and the paired difference from the first editor."""
    from npedit.scoring import statistics
    from npedit.scoring.results import common_scores, lower_is_better

    tests = []
    for name in measures:
        values, tasks, _ = common_scores(results, name)
        for k in range(len(results)):
            low = lower_is_better(name)
            d = statistics.paired_difference(values[0], values[k], tasks, low, margin, seed) if k else None
            better = statistics.compare_with_margin(values[k] - values[0], margin) * (-1 if low else 1)
            mean = statistics.mean_over_tasks(values[k], tasks), statistics.bootstrap_interval(values[k], tasks, seed)
            tests.append((name, k, mean, d, statistics.win_rate_interval(better, tasks, seed)))
    adjusted = iter(statistics.holm_adjusted([d.p for *_, d, _ in tests if d]))
    shown = Table(title=f"Differences from {results[0].name}, on the items that all results have")
    for column in ("metric", "better", "editor", "n", "mean", "difference", "p (Holm)", "win/tie/loss", "win rate"):
        shown.add_column(
            column, justify="left" if column in ("metric", "better", "editor") else "right", overflow="fold"
        )
    for name, k, mean, d, ci in tests:
        if not k:
            shown.add_section()
        head = (name, "lower" if lower_is_better(name) else "higher") if not k else ("", "")
        cells = ["", *["-"] * 4]
        if d:
            difference = _format_interval(d.mean, d.ci95)
            cells = [f"{d.n}", difference, f"{next(adjusted):.4f}", f"{d.wins}/{d.ties}/{d.losses}"]
            cells.append(_format_interval(d.win_rate, ci))
        else:
            cells[0] = str(len(common_scores(results, name)[2]))
        shown.add_row(*head, escape(results[k].name), cells[0], _format_interval(*mean), *cells[1:])
    count = sum(bool(d) for *_, d, _ in tests)
    shown.caption = f"difference = editor - {results[0].name}; p from sign-flip tests, adjusted for {count} tests"
    return shown


def ranking(results: Sequence[Results], measures: Sequence[str], margin: float, seed: int) -> Table:
    """A table of Elo ratings for each metric, by Davidson's model; each pair of editors is compared on each item."""
    from npedit.scoring import statistics
    from npedit.scoring.results import common_scores, lower_is_better

    shown = Table(title="Ranking: Davidson's model of wins and ties")
    for column in ("metric", "editor", "Elo"):
        shown.add_column(column, justify="right" if column == "Elo" else "left", overflow="fold")
    for name in measures:
        values, tasks, _ = common_scores(results, name)
        found, ci = statistics.rank_editors(values, tasks, lower_is_better(name), margin, seed)
        shown.add_section()
        for place, k in enumerate(sorted(range(len(results)), key=lambda k: -found.elo[k])):
            span = None if ci is None else tuple(ci[k])
            shown.add_row("" if place else name, escape(results[k].name), _format_interval(found.elo[k], span, 0))
    shown.caption = "1000 is the mean of these editors; 95 % bootstrap intervals over items"
    return shown


def agreement(results: Sequence[Results], measures: Sequence[str], labels: Path, seed: int) -> Table:
    """A table of how well each metric agrees with human labels."""
    from npedit.scoring import human_agreement as agree
    from npedit.scoring.results import lower_is_better

    given = agree.read_labels(labels, [r.name for r in results])
    shown = Table(title=f"Agreement with {len(given)} human labels")
    for column in ("metric", "n", "Spearman", "Kendall tau-b", "pairwise accuracy", "with calibrated ties"):
        shown.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for name in measures:
        found = agree.agreement_with_people(results, name, given, lower_is_better(name), seed)
        cells = ["-" if value is None else _format_interval(*value) for value in found.estimates]
        shown.add_row(name, str(found.n), *cells)
    shown.caption = (
        "correlations: mean over tasks by Fisher's z; a pair is two editors on one item; the tie margin is chosen on "
        "the same pairs, so the accuracy with calibrated ties is slightly too high"
    )
    return shown


def _write_plot(results: Sequence[Results], measures: Sequence[str], path: Path, seed: int) -> None:
    from npedit.report.plots import plot_comparison
    from npedit.scoring import statistics
    from npedit.scoring.results import common_scores, lower_is_better

    panels = []
    for name in measures:
        values, tasks, _ = common_scores(results, name)
        means = [(statistics.mean_over_tasks(v, tasks), statistics.bootstrap_interval(v, tasks, seed)) for v in values]
        panels.append((f"{name} ({'lower' if lower_is_better(name) else 'higher'} is better)", means))
    with explain_write_errors(path):
        path.write_bytes(plot_comparison([r.name for r in results], panels))


def _format_interval(value: float, ci: Interval, digits: int = 4) -> str:
    words = f"{value:.{digits}f}"
    return escape(f"{words} [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]") if ci else words
