"""`npedit compare A B ...`: paired comparisons of folders of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.local_page import PagePortOption
from npedit.cli.people import AnswersOption, DataOption, is_answers, rate_results, read_answers
from npedit.errors import UserError, did_you_mean, explain_write_errors

if TYPE_CHECKING:
    from npedit.scoring.results import Results

out = Console(highlight=False, soft_wrap=True)
Interval = tuple[float, float] | None
AGREEMENTS = {  # key -> column
    "spearman": "Spearman",
    "kendall_tau_b": "Kendall tau-b",
    "pairwise_accuracy": "pairwise accuracy",
    "pairwise_accuracy_with_ties": "with calibrated ties",
}


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
            metavar="FILE|A",
            help='File of human labels, an object a line ({"result": a folder\'s name, "id": ..., "score": ...}), '
            "or of people's answers. Or, as --people A B: open a page on which people compare A and B blindly.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of intervals and tests.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Compare results of different protocols or judges.")] = False,
    answers: AnswersOption = Path("people.jsonl"),
    data: DataOption = None,
    port: PagePortOption = 7862,
    as_json: JsonOption = False,
) -> None:
    """Compare editors item by item: means, paired differences, win rates; of three or more a ranking.

    Intervals are 95 % bootstrap intervals; items are drawn within tasks. P-values are from sign-flip tests, with Holm's
    correction for the number of tests printed.
    """
    with text_on_stderr(as_json):
        if people and people.is_dir():
            results = open_results([people, *folders], force)
            values = {"people": rate_results([people, *folders], results, data, answers, port, seed)}
        else:
            values = _compare(folders, wanted or [], margin, plot, people, seed, force)
    if as_json:
        print_json(values)


def _compare(
    folders: Sequence[Path],
    wanted: Sequence[str],
    margin: float,
    plot: Path,
    people: Path | None,
    seed: int,
    force: bool,
) -> dict[str, Any]:
    """Print the tables and write the plot; returns the figures in them."""
    results = open_results(folders, force)
    measures, left_out = select_common_metrics(results, wanted)
    for note in left_out:
        out.print(f"[yellow]note[/] {escape(note)}")
    if not measures:
        raise UserError("expected a metric that all results have on enough items; got none; the notes above say why")
    if plot.suffix.lower() != ".png":
        raise UserError(f"expected a plot's name to end in .png; got {plot}; change --plot")
    values: dict[str, Any] = {"editors": [r.name for r in results], "notes": left_out, "ranking": [], "agreement": []}
    values["metrics"] = paired_differences(results, measures, margin, seed)
    out.print(differences_table(values["metrics"], results[0].name))
    if len(results) > 2:
        values["ranking"] = rank_editors(results, measures, margin, seed)
        out.print(ranking_table(values["ranking"]))
    if people and is_answers(people):
        values["people"] = read_answers(results, people, seed)
    elif people:
        values["agreement"], labels = measure_agreement(results, measures, people, seed)
        out.print(agreement_table(values["agreement"], labels))
    _write_plot(results, measures, plot, seed)
    out.print(f"Plot: {escape(str(plot))}")
    return values | {"plot": str(plot)}


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


def paired_differences(
    results: Sequence[Results], measures: Sequence[str], margin: float, seed: int
) -> list[dict[str, Any]]:
    """For each metric one entry for each editor: the mean, and the paired difference from the first editor, which is
    None for the first editor. P-values are adjusted for the number of all tests."""
    from npedit.scoring import statistics
    from npedit.scoring.results import lower_is_better

    found: list[dict[str, Any]] = [
        {
            "metric": name,
            "better": "lower" if lower_is_better(name) else "higher",
            "editors": _editor_values(results, name, margin, seed),
        }
        for name in measures
    ]
    tests = [editor["difference"] for metric in found for editor in metric["editors"][1:]]
    for test, adjusted in zip(tests, statistics.holm_adjusted([test.pop("p") for test in tests]), strict=True):
        test["p_holm"] = float(adjusted)
    return found


def _editor_values(results: Sequence[Results], name: str, margin: float, seed: int) -> list[dict[str, Any]]:
    """The entries of one metric, with unadjusted p-values."""
    from npedit.scoring import statistics
    from npedit.scoring.results import common_scores, lower_is_better

    values, tasks, ids = common_scores(results, name)
    entries: list[dict[str, Any]] = []
    for k, result in enumerate(results):
        mean, ci95 = statistics.mean_over_tasks(values[k], tasks), statistics.bootstrap_interval(values[k], tasks, seed)
        entry = {"editor": result.name, "n": len(ids), "mean": mean, "ci95": ci95, "difference": None}
        if k:
            sign = -1 if lower_is_better(name) else 1
            d = statistics.paired_difference(values[0], values[k], tasks, sign < 0, margin, seed)
            better = statistics.compare_with_margin(values[k] - values[0], margin) * sign
            ci = statistics.win_rate_interval(better, tasks, seed)
            entry["difference"] = asdict(d) | {"win_rate": d.win_rate, "win_rate_ci95": ci}
        entries.append(entry)
    return entries


def differences_table(metrics: Sequence[dict[str, Any]], baseline: str) -> Table:
    """The entries of `paired_differences` as a table; `baseline` is the name of the first editor."""
    shown = Table(title=f"Differences from {baseline}, on the items that all results have")
    for column in ("metric", "better", "editor", "n", "mean", "difference", "p (Holm)", "win/tie/loss", "win rate"):
        shown.add_column(
            column, justify="left" if column in ("metric", "better", "editor") else "right", overflow="fold"
        )
    for metric in metrics:
        shown.add_section()
        head = metric["metric"], metric["better"]
        for editor in metric["editors"]:
            mean = _format_interval(editor["mean"], editor["ci95"])
            shown.add_row(*head, escape(editor["editor"]), *_difference_cells(editor, mean))
            head = "", ""
    count = sum(len(metric["editors"]) - 1 for metric in metrics)
    shown.caption = f"difference = editor - {baseline}; p from sign-flip tests, adjusted for {count} tests"
    return shown


def _difference_cells(editor: dict[str, Any], mean: str) -> list[str]:
    """n, mean, difference, p, wins, win rate."""
    d = editor["difference"]
    if d is None:
        return [str(editor["n"]), mean, *["-"] * 4]
    cells = [str(d["n"]), mean, _format_interval(d["mean"], d["ci95"]), f"{d['p_holm']:.4f}"]
    return [*cells, f"{d['wins']}/{d['ties']}/{d['losses']}", _format_interval(d["win_rate"], d["win_rate_ci95"])]


def rank_editors(results: Sequence[Results], measures: Sequence[str], margin: float, seed: int) -> list[dict[str, Any]]:
    """Elo ratings for each metric, the best first, by Davidson's model: each pair is compared on each item."""
    from npedit.scoring import statistics
    from npedit.scoring.results import common_scores, lower_is_better

    ranking: list[dict[str, Any]] = []
    for name in measures:
        values, tasks, _ = common_scores(results, name)
        found, ci = statistics.rank_editors(values, tasks, lower_is_better(name), margin, seed)
        editors: list[dict[str, Any]] = [
            {"editor": r.name, "elo": float(found.elo[k]), "ci95": None if ci is None else tuple(map(float, ci[k]))}
            for k, r in enumerate(results)
        ]
        ranking.append({"metric": name, "editors": sorted(editors, key=lambda editor: -editor["elo"])})
    return ranking


def ranking_table(ranking: Sequence[dict[str, Any]]) -> Table:
    """The Elo ratings as a table."""
    shown = Table(title="Ranking: Davidson's model of wins and ties")
    for column in ("metric", "editor", "Elo"):
        shown.add_column(column, justify="right" if column == "Elo" else "left", overflow="fold")
    for metric in ranking:
        shown.add_section()
        for place, editor in enumerate(metric["editors"]):
            elo = _format_interval(editor["elo"], editor["ci95"], 0)
            shown.add_row("" if place else metric["metric"], escape(editor["editor"]), elo)
    shown.caption = "1000 is the mean of these editors; 95 % bootstrap intervals over items"
    return shown


def measure_agreement(
    results: Sequence[Results], measures: Sequence[str], labels: Path, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """(how well each metric agrees with human labels, number of labels). A figure is None or (value, interval)."""
    from npedit.scoring import human_agreement as agree
    from npedit.scoring.results import lower_is_better

    given = agree.read_labels(labels, [r.name for r in results])
    found = []
    for name in measures:
        agreement = agree.agreement_with_people(results, name, given, lower_is_better(name), seed)
        found.append({"metric": name, "n": agreement.n} | dict(zip(AGREEMENTS, agreement.estimates, strict=True)))
    return found, len(given)


def agreement_table(found: Sequence[dict[str, Any]], labels: int) -> Table:
    """The agreement with human labels as a table; `labels` is their number."""
    shown = Table(title=f"Agreement with {labels} human labels")
    for column in ("metric", "n", *AGREEMENTS.values()):
        shown.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for metric in found:
        cells = ["-" if metric[key] is None else _format_interval(*metric[key]) for key in AGREEMENTS]
        shown.add_row(metric["metric"], str(metric["n"]), *cells)
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
