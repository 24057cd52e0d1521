"""The tables of `npedit compare`, and its page: tables, plot and pictures as one HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.report import page_parts as parts
from npedit.report import plots
from npedit.report.page_parts import Html, element
from npedit.report.result_pictures import ResultPicture
from npedit.runs.final import public_name
from npedit.scoring.comparison import AGREEMENTS
from npedit.scoring.human_agreement import MIN_LABELS
from npedit.scoring.results import Results
from npedit.scoring.tables import Interval, TextTable, format_estimate

PICTURES_PER_TASK, MOST_PICTURES = 2, 24
LOCAL_PATH = re.compile(r"(?<![\w./~:])(?:~|\.{0,2})/[^\s,;:()'\"]+")  # in a sentence
SHOWN_SCORES = 3  # metrics under a picture
Metrics = Sequence[Mapping[str, Any]]  # as of `scoring.comparison.paired_differences`


# ------------------------------------------------------------------------------------------------------------ tables


def differences_table(metrics: Metrics, baseline: str) -> TextTable:
    """The entries of `paired_differences` as a table; `baseline` is the name of the first editor."""
    words = ("metric", "better", "editor")
    count = sum(len(metric["editors"]) - 1 for metric in metrics)
    table = TextTable(
        f"Differences from {baseline}, on the items that all results have",
        (*words, "n", "mean", "difference", "p (Holm)", "win/tie/loss", "win rate"),
        left=words,
        caption=f"difference = editor - {baseline}; p from sign-flip tests, adjusted for {count} tests",
    )
    for metric in metrics:
        for place, editor in enumerate(metric["editors"]):
            head = ("", "") if place else (metric["metric"], metric["better"])
            table.add_row(*head, editor["editor"], *_difference_cells(editor), begins_section=not place)
    return table


def _difference_cells(editor: Mapping[str, Any]) -> list[str]:
    """n, mean, difference, p, wins, win rate."""
    d, mean = editor["difference"], format_estimate(editor["mean"], editor["ci95"])
    if d is None:
        return [str(editor["n"]), mean, *["-"] * 4]
    cells = [str(d["n"]), mean, format_estimate(d["mean"], d["ci95"]), f"{d['p_holm']:.4f}"]
    return [*cells, f"{d['wins']}/{d['ties']}/{d['losses']}", format_estimate(d["win_rate"], d["win_rate_ci95"])]


def ranking_table(ranking: Sequence[Mapping[str, Any]]) -> TextTable:
    """The Elo ratings as a table."""
    table = TextTable(
        "Ranking: Davidson's model of wins and ties",
        ("metric", "editor", "Elo"),
        left=("metric", "editor"),
        caption="1000 is the mean of these editors; 95 % bootstrap intervals over items",
    )
    for metric in ranking:
        for place, editor in enumerate(metric["editors"]):
            elo = format_estimate(editor["elo"], editor["ci95"], digits=0)
            table.add_row("" if place else metric["metric"], editor["editor"], elo, begins_section=not place)
    return table


def agreement_table(found: Sequence[Mapping[str, Any]], labels: int) -> TextTable:
    """The agreement with human labels as a table; `labels` is their number."""
    table = TextTable(
        f"Agreement with {labels} human labels",
        ("metric", "n", "tasks", *AGREEMENTS.values()),
        left=("metric",),
        caption="correlations: mean over tasks by Fisher's z, weight n - 3; left out are tasks of fewer than "
        f"{MIN_LABELS} labels or of equal scores; a pair is two editors on one item; the tie margin is chosen on the "
        "same pairs, so the accuracy with calibrated ties is slightly too high",
    )
    for metric in found:
        tasks = f"{metric['tasks']} of {metric['tasks'] + metric['tasks_left_out']}"
        cells = ["-" if metric[key] is None else format_estimate(*metric[key]) for key in AGREEMENTS]
        table.add_row(metric["metric"], metric["n"], tasks, *cells)
    return table


def preference_table(found: Mapping[str, Any]) -> TextTable:
    """How well each metric orders two pictures as people do, from the summary of people's answers."""
    table = TextTable(
        "Do metrics order the two pictures as people do?",
        ("metric", "items", "pairwise accuracy", "with calibrated ties"),
        left=("metric",),
    )
    for row in found["agreement"]:
        ties = _format_share(row["with_ties"]) if row["with_ties"] else "-"
        table.add_row(row["metric"], row["n"], _format_share(row["accuracy"]), ties)
    return table


def _format_share(estimate: tuple[float, Interval]) -> str:
    value, interval = estimate
    return format_estimate(value, interval, digits=3)


def preference_sentence(found: Mapping[str, Any]) -> str:
    """One sentence that says whom people prefer."""
    return (
        f"People: {found['editor']} against {found['baseline']}: win rate "
        f"{format_estimate(found['win_rate'], found['ci95'], digits=3)}, p {found['p']:.4f}; "
        f"{found['wins']}/{found['ties']}/{found['losses']} wins/ties/losses in {found['answers']} answers of "
        f"{found['raters']} raters about {found['items']} items"
    )


def mean_panels(metrics: Metrics) -> list[tuple[str, list[plots.Mean]]]:
    """The means of the editors, one panel for each metric, as `plots.plot_comparison` draws them."""
    return [
        (f"{m['metric']} ({m['better']} is better)", [(e["mean"], e["ci95"]) for e in m["editors"]]) for m in metrics
    ]


# -------------------------------------------------------------------------------------------------------------- page


def make_comparison_page(
    results: Sequence[Results],
    values: Mapping[str, Any],
    tables: Sequence[TextTable],
    pictures: Sequence[Mapping[str, ResultPicture]],
    picture_note: str = "",
) -> str:
    """The HTML of a comparison.

    `values` are the figures of `npedit compare --json`. `tables` are the printed tables. `pictures` holds for each of
    `results` its pictures by the item's id; it is empty if there are none, and `picture_note` says why.
    """
    names = [result.name for result in results]
    metrics, title = values["metrics"], f"Comparison of {', '.join(names[:-1])} and {names[-1]}"
    blocks = [
        element("h1", title),
        element("p", f"The baseline is {names[0]}. Intervals are 95 % bootstrap intervals.", kind="soft"),
        *(element("p", f"Note: {_hide_paths(note)}", kind="soft") for note in values["notes"]),
        element("p", preference_sentence(values["people"])) if values.get("people") else Html(""),
        *(block for table in tables for block in (element("h2", table.title), parts.text_table(table))),
        element("h2", "Means"),
        _means_figure(names, metrics),
        element("h2", "Pictures"),
        _pictures_section(results, metrics, pictures)
        if pictures
        else element("p", _hide_paths(picture_note), kind="soft"),
        element("h2", "How the results were made"),
        *(parts.details(r.name, _public_settings(r.settings)) for r in results),
    ]
    return parts.document(f"npedit: {title}", blocks)


def _public_settings(settings: Mapping[str, Any]) -> str:
    """The settings as JSON for a page that others see: of each local path the last part alone."""

    def shortened(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shortened(v) for key, v in value.items()}
        if isinstance(value, list):
            return [shortened(v) for v in value]
        return public_name(value) if isinstance(value, str) else value

    return json.dumps(shortened(settings), indent=2, ensure_ascii=False)


def _hide_paths(sentence: str) -> str:
    """The sentence with the last part alone of each local path in it."""
    return LOCAL_PATH.sub(lambda found: public_name(found[0]), sentence)


def _means_figure(names: Sequence[str], metrics: Metrics) -> Html:
    title, caption, light, dark = plots.draw_comparison(names, mean_panels(metrics))
    return parts.figure(parts.light_and_dark_picture(light, dark, title), caption)


def _pictures_section(
    results: Sequence[Results], metrics: Metrics, pictures: Sequence[Mapping[str, ResultPicture]]
) -> Html:
    shown = [metric["metric"] for metric in metrics][:SHOWN_SCORES]
    rows = [_picture_row(results, key, shown, pictures) for key in _choose_items(results, pictures)]
    head = ["reference", "task, instruction", *(result.name for result in results)]
    sentence = f"The first {PICTURES_PER_TASK} items of each task, at most {MOST_PICTURES}; not selected by score."
    return parts.join([element("p", sentence), parts.picture_table(head, rows)])


def _choose_items(results: Sequence[Results], pictures: Sequence[Mapping[str, ResultPicture]]) -> list[str]:
    """The ids of the first items of each task that all results have a picture of."""
    chosen: dict[str, list[str]] = {}
    for row in results[0].rows:
        there = all(row.id in found and found[row.id].edited.is_file() for found in pictures)
        if there and len(chosen.setdefault(row.task, [])) < PICTURES_PER_TASK:
            chosen[row.task].append(row.id)
    return [key for ids in chosen.values() for key in ids][:MOST_PICTURES]


def _picture_row(
    results: Sequence[Results], key: str, shown: Sequence[str], pictures: Sequence[Mapping[str, ResultPicture]]
) -> list[Html]:
    """Reference, instruction, and each editor's picture with its scores."""
    first = pictures[0][key]
    words = element("div", element("i", first.task), Html("<br>"), first.instruction, kind="words")
    row = [_thumbnail(first.reference, "reference"), words]
    for result, found in zip(results, pictures, strict=True):
        scores = next((r.scores for r in result.rows if r.id == key), {})
        lines = [element("div", f"{name} {_format_score(scores.get(name))}", kind="soft") for name in shown]
        row.append(parts.join([_thumbnail(lambda path=found[key].edited: read_photo(path), result.name), *lines]))
    return row


def _thumbnail(open_picture: Any, alt: str) -> Html:
    """The picture; a sentence for one that cannot be read."""
    try:
        return parts.thumbnail(open_picture(), alt)
    except (BadImage, UserError, OSError) as error:
        return parts.escape(_hide_paths(f"{alt}: {error}"))


def _format_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
