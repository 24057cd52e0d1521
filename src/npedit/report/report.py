"""One HTML file about a run, finished or not: curves, pictures, tables, how it was made. It needs no other file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from npedit.benchmarks.toy import format_rate, results_table
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.report import page_parts as parts
from npedit.report import plots
from npedit.report.page_parts import Html, element
from npedit.runs.checkpoint import FAILURES, METRICS, is_run, read_config, read_manifest, read_rows, write_text
from npedit.runs.files import read_json_object
from npedit.scoring.reward_hacking import RewardHackingAlarm, monitor_rows
from npedit.scoring.tables import TextTable

log = logging.getLogger(__name__)
MAX_ITEMS = 8
NOTHING = Html("")
FAILURE_CAUSES = {
    "right": "right",
    "critic": "critic: accepts the wrong edit",
    "teacher": "teacher: cannot generate the result",
    "student": "student: other failure",
}


def write_report(run: str | Path) -> Path:
    """Write `report.html` in a run's folder from what lies there, and return its path.

    Raises:
        UserError: the folder is not a run, or the file cannot be written.
    """
    path = Path(run) / "report.html"
    write_text(path, make_report(run))
    return path


def make_report(run: str | Path) -> str:
    """The HTML of a run's report, from what lies in its folder.

    Raises:
        UserError: the folder is not a run.
    """
    run = Path(run)
    if not is_run(run):
        raise UserError(f"expected a run to report on; {run} is not one; give a folder that 'npedit train' made")
    rows = [row for row in read_rows(run / METRICS) if isinstance(row.get("step"), int)]
    manifest, config = read_manifest(run), read_config(run)
    items = int(config["trainer"]["evaluate_items"])
    scores = _read_scores(run)
    name = str(manifest.get("recipe", run.name))
    sections = [
        element("h1", f"{name}: an image editor trained {_data_kind(manifest)}"),
        element("p", f"{_summary(rows)} {_pairs_sentence(manifest)}", kind="soft"),
        _alarm_box(rows, items),
        _headline(rows, scores),
        _scores_section(scores),
        _failure_section(run),
        _progress_pictures(run),
        _curves_section(rows, items),
        _benchmark_pictures(run),
        element("h2", "Recipe and manifest"),
        parts.details("Recipe", yaml.safe_dump(config, sort_keys=False)),
        parts.details("Manifest", json.dumps(manifest, indent=2), is_open=True),
    ]
    return parts.document(f"npedit: {name}", sections)


def _data_kind(manifest: dict[str, Any]) -> str:
    return "without edited images" if manifest["no_pairs"] else "with edited images"


def _pairs_sentence(manifest: dict[str, Any]) -> str:
    return (
        "No edited image was used in training."
        if manifest["no_pairs"]
        else "This run, or the run that it starts from, was trained with edited images: a baseline."
    )


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "No update has been made yet."
    seconds = sum(r.get("time/update") or 0.0 for r in rows)
    stages = dict.fromkeys(r["stage_name"] for r in rows if "stage_name" in r)
    names = ", then ".join(s.replace("_", " ") for s in stages)
    return f"{rows[-1]['step']} updates ({names}) in {seconds / 60:.1f} minutes of training."


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file, or a damaged one, which is reported in the log."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        log.warning("%s is left out of the report: %s", path, error)
        return {}


def _read_scores(run: Path) -> dict[str, Any]:
    """The final table {"before", "after"} that `npedit demo` leaves; {} if there is none."""
    return _read_object(run / "evaluation.json")


def _alarm_box(rows: Sequence[dict[str, Any]], evaluate_items: int) -> Html:
    """The reward-hacking alarms; "" for a run without a critic's and a held-out score."""
    monitor = monitor_rows(rows, evaluate_items)
    left_out = f" {monitor.non_finite_message()}" if monitor.non_finite else ""
    if found := sorted(monitor.alarms, key=lambda alarm: alarm.step):
        return _alarms(found, left_out)
    if not monitor.critic_scores():
        return NOTHING
    section = element("i", "Critic and held-out scores")
    return element("p", "No reward hacking found: see ", section, f".{left_out}", kind="soft")


def _alarms(found: Sequence[RewardHackingAlarm], left_out: str) -> Html:
    lines = [element("li", f"{a.message()[0].upper()}{a.message()[1:]}.") for a in found]
    advice = (
        "Check the pictures. Then lower the critic's weight, raise that of distribution matching, or use a stronger "
        f"critic or an ensemble.{left_out}"
    )
    title = element("b", "Alarm: reward hacking", kind="no")
    return element("div", title, element("ul", *lines), element("p", advice), kind="alarm")


def _headline(rows: Sequence[dict[str, Any]], scores: dict[str, Any]) -> Html:
    if scores:
        before, after = (format_rate(scores[k]["both"]) for k in ("before", "after"))
        found = [("success before training", before), ("success after training", after)]
        return parts.key_figures([*found, ("held-out scenes", str(scores["after"]["n"]))])
    evaluated = [r for r in rows if r.get("eval/both") is not None]
    ends = [evaluated[0], evaluated[-1]] if evaluated else []
    return parts.key_figures((f"success at update {r['step']}", f"{100 * r['eval/both']:.1f} %") for r in ends)


def _scores_section(scores: dict[str, Any]) -> Html:
    if not scores:
        return NOTHING
    explanation = element(
        "p",
        "Scored by the toy world's exact oracle, which is not used in training. ",
        element("i", "Both"),
        ": the edit is applied and the rest is preserved. Intervals are 95 % Wilson intervals.",
    )
    table = parts.text_table(results_table(scores["after"], scores["before"]))
    return parts.join([element("h2", "Success on held-out scenes"), explanation, table])


def _failure_section(run: Path) -> Html:
    """A table of the causes of failed edits; "" for a run without this measurement."""
    counts = _read_object(run / FAILURES)
    if not counts:
        return NOTHING
    critic, teacher, student = (element("i", cause) for cause in ("critic", "teacher", "student"))
    explanation = element(
        "p",
        "The edits of the last evaluation. A failed edit is counted under ", critic, " if the critic accepts it; "
        "otherwise under ", teacher, " if the base model generates a wrong picture from the caption of the wanted "
        "result (one try each); otherwise under ", student, ".",
    )  # fmt: skip
    return parts.join([element("h2", "Causes of failed edits"), explanation, parts.text_table(_failure_table(counts))])


def _failure_table(counts: dict[str, dict[str, int]]) -> TextTable:
    table = TextTable("Causes of failed edits", ("edit type", "n", *FAILURE_CAUSES.values()), left=("edit type",))
    total = {key: sum(row[key] for row in counts.values()) for key in next(iter(counts.values()))}
    for kind, row in [*counts.items(), ("all", total)]:
        shares = [f"{row[cause]} ({100 * row[cause] / row['n']:.0f} %)" for cause in FAILURE_CAUSES]
        table.add_row(kind, row["n"], *shares, is_bold=kind == "all", begins_section=kind == "all")
    return table


def _curves_section(rows: Sequence[dict[str, Any]], evaluate_items: int) -> Html:
    blocks = [
        parts.figure(parts.light_and_dark_picture(light, dark, title), caption)
        for title, caption, light, dark in plots.draw_figures(rows, evaluate_items)
    ]
    return parts.join([element("h2", "Curves"), *blocks]) if blocks else NOTHING


# --------------------------------------------------------------------------------------------------------- pictures


def _read_thumbnail(path: Path, alt: str) -> Html:
    """The picture in a file; a sentence for a damaged file."""
    try:
        return parts.thumbnail(read_photo(path), alt)
    except BadImage as error:
        log.warning("%s is left out of the report: %s", path, error)
        return parts.escape(f"{alt}: {error}")


def _read_items(folder: Path) -> list[dict[str, Any]]:
    path = folder / "items.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _progress_pictures(run: Path) -> Html:
    """A table of the same references with the first, a middle and the last samples."""
    folders = sorted(p for p in run.glob("samples/step-*") if _read_items(p))
    if not folders:
        return NOTHING
    chosen = list(dict.fromkeys([folders[0], folders[len(folders) // 2], folders[-1]]))
    heads = ["reference", "instruction", *(f"update {int(p.name.removeprefix('step-'))}" for p in chosen)]
    table = parts.picture_table(heads, _progress_rows(chosen))
    return parts.join([element("h2", "Samples during training"),
                       element("p", "The same references at three updates."), table])  # fmt: skip


def _progress_rows(folders: Sequence[Path]) -> Iterable[list[Html]]:
    """One row for each item: reference, instruction, and the sample in each folder."""
    items = [_read_items(folder)[:MAX_ITEMS] for folder in folders]
    for first, *others in zip(*items):
        files = [folder / item["file"] for folder, item in zip(folders, [first, *others])]
        yield [
            _read_thumbnail(folders[0] / first["reference"], "reference"),
            element("div", first["instruction"], kind="words"),
            *(_read_thumbnail(file, first["instruction"]) for file in files),
        ]


def _benchmark_pictures(run: Path) -> Html:
    """Pictures of the final evaluation with the oracle's verdict, two items of each edit type."""
    items = _read_items(run / "evaluation")
    if not items:
        return NOTHING
    rows = []
    for kind in dict.fromkeys(i["edit_type"] for i in items):
        chosen = [i for i in items if i["edit_type"] == kind][:2]
        rows.append([kind, *(cell for item in chosen for cell in _verdict_cells(run / "evaluation", item))])
    head = ["", *["reference", "instruction, verdict", "edited"] * 2]
    sentence = element("p", "The first two scenes of each edit type, not selected.")
    title = element("h2", "The finished editor on held-out scenes")
    return parts.join([title, sentence, parts.picture_table(head, rows)])


def _verdict_cells(folder: Path, item: dict[str, Any]) -> list[Html]:
    """Reference, instruction with the oracle's verdict, and edited picture of one item."""
    verdict = (_verdict_span(name, item[name]) for name in ("applied", "preserved"))
    words = [item["instruction"], Html("<br>"), next(verdict), ", ", next(verdict)]
    return [
        _read_thumbnail(folder / item["reference"], "reference"),
        element("div", *words, kind="words"),
        _read_thumbnail(folder / item["file"], item["instruction"]),
    ]


def _verdict_span(name: str, fine: bool) -> Html:
    return element("span", f"{'' if fine else 'not '}{name}", kind="yes" if fine else "no")
