"""What `npedit compare` measures: paired differences of editors on the same items, rankings, agreement with people.

Each function returns plain values, ready for JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from npedit.errors import UserError, did_you_mean
from npedit.scoring import human_agreement, statistics
from npedit.scoring.results import (
    MIN_COVERAGE,
    UNDEFINED_PREFIX,
    Results,
    average_judges,
    common_scores,
    lower_is_better,
)

ENCODERS = ("dino", "clip")  # a metric's name begins with that of its encoder
AGREEMENTS = {  # key -> column
    "spearman": "Spearman",
    "kendall_tau_b": "Kendall tau-b",
    "pairwise_accuracy": "pairwise accuracy",
    "pairwise_accuracy_with_ties": "with calibrated ties",
}


def open_results(folders: Sequence[Path], force: bool) -> list[Results]:
    """Read folders of results. Folders of the same name are named by their paths, from the folder that holds them all.

    Raises:
        UserError: fewer than two folders, or different protocols or judges without `force`.
    """
    if len(folders) < 2:
        raise UserError(f"expected at least two folders of results; got {len(folders)}; give another")
    found = [_read_results(folder) for folder in folders]
    if len({r.name for r in found}) < len(found):
        found = [replace(r, name=name) for r, name in zip(found, _names_of(folders))]
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


def _names_of(folders: Sequence[Path]) -> list[str]:
    """The folders as they were given; absolute paths without the part that all have in common."""
    parts = [split_folders(folder) for folder in folders]
    if not any(part.is_absolute() for group in parts for part in group):
        return [str(folder) for folder in folders]
    common = os.path.commonpath([part.resolve().parent for group in parts for part in group])
    return ["+".join(os.path.relpath(part.resolve(), common) for part in group) for group in parts]


def _without_judge_names(fact: Any) -> Any:
    """A setting of a result. A judge is identified without its name if other facts identify it: its folder may move."""
    if isinstance(fact, list):
        return [_without_judge_names(f) for f in fact]
    return {k: v for k, v in fact.items() if k != "name"} or fact if isinstance(fact, dict) else fact


def unknown_judge_notes(results: Sequence[Results]) -> list[str]:
    """A sentence about imported results, whose files do not say who judged; [] if there are none."""
    names = [r.name for r in results if _is_imported(r.settings)]
    if not names:
        return []
    return [f"the judge of {', '.join(names)} is unknown (evaluate --scores): make sure that one judge scored them all"]


def _is_imported(settings: Mapping[str, Any]) -> bool:
    """Whether the results, or those of one of several judges, are from a file of scores."""
    judge = settings.get("judge")
    return "scores" in settings or (isinstance(judge, list) and None in judge)


def split_folders(folder: Path) -> list[Path]:
    """The folders of one editor's results under several judges, which are joined by +; or one folder."""
    if folder.exists() or "+" not in str(folder):
        return [folder]
    return [Path(part) for part in str(folder).split("+")]


def _read_results(folder: Path) -> Results:
    """The results in one folder, or the mean over judges of several folders that are joined by +."""
    judged = [Results.read(part) for part in split_folders(folder)]
    if len(judged) == 1:
        return judged[0]
    if len({json.dumps(r.settings.get("protocol"), sort_keys=True) for r in judged}) > 1:
        raise UserError(f"{folder}: expected results of one protocol; got several protocols; evaluate again with one")
    return average_judges(judged)


def select_common_metrics(
    results: Sequence[Results], wanted: Sequence[str], force: bool = False
) -> tuple[list[str], list[str]]:
    """(metrics to compare, reasons why others are left out). If none is `wanted`, all except those of baselines. A
    metric of different encoders is left out without `force`.

    Raises:
        UserError: the first result does not have a wanted metric.
    """
    names = results[0].score_names()
    for name in wanted:
        if name not in names:
            raise UserError(f"expected a metric of {results[0].name}; got {name!r}.{did_you_mean(name, names)} "
                            f"It has: {', '.join(names)}")  # fmt: skip
    kept, notes = [], []
    for name in wanted or [n for n in names if "/" not in n]:
        encoders = {} if force else _different_encoders(results, name)
        failed = {}
        for r in results:
            bad = sum(
                r_.scores.get(name) is None and not r_.why.get(name, "").startswith(UNDEFINED_PREFIX) for r_ in r.rows
            )
            if bad > (1 - MIN_COVERAGE) * len(r.rows):
                failed[r.name] = f"{bad} of {len(r.rows)} missing in {r.name}"
        if failed:
            notes.append(f"{name} is left out: {', '.join(failed.values())}")
        elif encoders:
            used = ", ".join(f"{editor}: {weights}" for editor, weights in encoders.items())
            notes.append(
                f"{name} is left out: its encoders differ ({used}); evaluate again with one, or compare with --force"
            )
        elif not common_scores(results, name)[0].size:
            notes.append(f"{name} is left out: no item has it in all results")
        else:
            kept.append(name)
    return kept, notes


def _different_encoders(results: Sequence[Results], metric: str) -> dict[str, str]:
    """Each result's weights of the encoder that a metric needs; {} if they are the same or the metric needs none."""
    kind = metric.partition("_")[0]
    if kind not in ENCODERS:
        return {}
    used = {r.name: str((r.settings.get("encoders") or {}).get(kind, "unknown")) for r in results}
    return used if len(set(used.values())) > 1 else {}


def paired_differences(
    results: Sequence[Results], metrics: Sequence[str], margin: float, seed: int
) -> list[dict[str, Any]]:
    """For each metric one entry for each editor: the mean, and the paired difference from the first editor, which is
    None for the first editor. P-values are adjusted for the number of all tests."""
    found: list[dict[str, Any]] = [
        {
            "metric": name,
            "better": "lower" if lower_is_better(name) else "higher",
            "editors": _editor_values(results, name, margin, seed),
        }
        for name in metrics
    ]
    tests = [editor["difference"] for metric in found for editor in metric["editors"][1:]]
    for test, adjusted in zip(tests, statistics.holm_adjusted([test.pop("p") for test in tests]), strict=True):
        test["p_holm"] = float(adjusted)
    return found


def _editor_values(results: Sequence[Results], name: str, margin: float, seed: int) -> list[dict[str, Any]]:
    """The entries of one metric, with unadjusted p-values."""
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


def rank_editors(results: Sequence[Results], metrics: Sequence[str], margin: float, seed: int) -> list[dict[str, Any]]:
    """Elo ratings for each metric, the best first, by Davidson's model: each pair is compared on each item."""
    ranking: list[dict[str, Any]] = []
    for name in metrics:
        values, tasks, _ = common_scores(results, name)
        found, ci = statistics.rank_editors(values, tasks, lower_is_better(name), margin, seed)
        editors: list[dict[str, Any]] = [
            {"editor": r.name, "elo": float(found.elo[k]), "ci95": None if ci is None else tuple(map(float, ci[k]))}
            for k, r in enumerate(results)
        ]
        ranking.append({"metric": name, "editors": sorted(editors, key=lambda editor: -editor["elo"])})
    return ranking


def measure_agreement(
    results: Sequence[Results], metrics: Sequence[str], labels: Path, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """(how well each metric agrees with human labels, number of labels). A figure is None or (value, interval)."""
    given = human_agreement.read_labels(labels, [r.name for r in results])
    found = []
    for name in metrics:
        agreement = human_agreement.agreement_with_people(results, name, given, lower_is_better(name), seed)
        counts = {"n": agreement.n, "tasks": agreement.tasks, "tasks_left_out": agreement.tasks_left_out}
        found.append({"metric": name} | counts | dict(zip(AGREEMENTS, agreement.estimates, strict=True)))
    return found, len(given)
