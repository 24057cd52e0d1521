"""A folder of results: what every benchmark of pictures writes, and what `npedit compare` reads.

    rows.jsonl     {"id": str, "task": str, "scores": {name: number or null}, "why": {name: reason where null}} a line
    summary.json   {headline name: {"value", "n", "coverage", "undefined", "ci95"}}
    settings.json  how the pictures were made and measured; results of unlike "protocol" are not compared

A score that is not there is null with a reason and never a number. Two kinds of reason are kept apart: a *failure* (no
picture, no encoder) lowers the coverage; a metric that is *undefined* (its reason begins so) has no value for these
pictures at all, as the PSNR of two equal ones, and does not. Below `MIN_COVERAGE` coverage a headline is null.

A headline is the mean over tasks of each task's mean, as GEdit-Bench takes it; NAME/micro is the mean over items. A
task that has no number is left out of both. A name with a slash (`copy/dino_vits16`) is that of a baseline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from npedit.errors import UserError, explain_write_errors
from npedit.runs.checkpoint import write_text
from npedit.runs.files import read_json_object
from npedit.runs.lock import LOCK_FILES
from npedit.scoring import statistics

ROWS, SUMMARY, SETTINGS = "rows.jsonl", "summary.json", "settings.json"
MIN_COVERAGE = 0.99  # coverage below which there is no headline
UNDEFINED_PREFIX = "undefined: "
LOWER_IS_BETTER = ("l1", "l2", "lpips", "changed_area", "copied")  # of these, less is better
Metrics = Mapping[str, Callable[[], float]]


class MissingScore(Exception):
    """A metric has no score because something failed. The message is the reason."""


class UndefinedMetric(MissingScore):
    """The metric is not defined for these pictures; nothing failed."""

    def __str__(self) -> str:
        return UNDEFINED_PREFIX + super().__str__()


@dataclass(frozen=True)
class Row:
    """One item's scores. `why` has a reason for each score that is None."""

    id: str
    task: str
    scores: dict[str, float | None]
    why: dict[str, str]

    @classmethod
    def from_metrics(cls, id: str, task: str, metrics: Metrics) -> Self:
        """A row with the score of every metric. A metric that raises `MissingScore` or is not finite has no score."""
        scores: dict[str, float | None] = {}
        why: dict[str, str] = {}
        for name, compute in metrics.items():
            try:
                value = float(compute())
                if not math.isfinite(value):
                    raise MissingScore(f"the metric gave {value}")
                scores[name] = value
            except MissingScore as reason:
                scores[name], why[name] = None, str(reason)
        return cls(id, task, scores, why)


@dataclass(frozen=True)
class Results:
    """The content of a folder of results. `settings` is {} if another program wrote the folder without them."""

    name: str
    rows: tuple[Row, ...]
    settings: dict[str, Any]

    def score_names(self) -> list[str]:
        """The names of all scores, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder of results.

        Raises:
            UserError: it has no rows.jsonl, or one that is not of the form above.
        """
        path = folder / ROWS
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: an id may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected a folder of results with {ROWS}; got {folder}: {error}; name another") from None
        rows: dict[str, Row] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _parse_row(line, f"{path}:{number}")
            if row.id in rows:
                raise UserError(f"{path}:{number}: expected each id once; got {row.id!r} again; remove a line")
            rows[row.id] = row
        if not rows:
            raise UserError(f"expected at least one row; got an empty {path}; run the evaluation again")
        settings = folder / SETTINGS
        return cls(folder.resolve().name, tuple(rows.values()), _read_settings(settings) if settings.is_file() else {})


def average_judges(judged: Sequence[Results]) -> Results:
    """One editor's results under several judges as one: a score is the mean of the judges', and missing where one of
    them has none.

    Raises:
        UserError: the results are of different items.
    """
    first, name = judged[0], "+".join(r.name for r in judged)
    by_id = [{row.id: row for row in r.rows} for r in judged]
    for other, found in zip(judged, by_id):
        if set(found) != set(by_id[0]):
            raise UserError(
                f"{name}: expected the same items from every judge; got others in {other.name}; score them again"
            )
    rows = []
    for row in first.rows:
        each = [found[row.id] for found in by_id]
        why = {score: reason for r in reversed(each) for score, reason in r.why.items()}
        scores: dict[str, float | None] = {}
        for score in row.scores:
            values = [v for r in each if (v := r.scores.get(score)) is not None]
            scores[score] = sum(values) / len(values) if len(values) == len(each) else None
        rows.append(Row(row.id, row.task, scores, {k: v for k, v in why.items() if scores.get(k) is None}))
    return Results(name, tuple(rows), {**first.settings, "judge": [r.settings.get("judge") for r in judged]})


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"expected a JSON object in {path}; got: {error}; run the evaluation again") from None


def _parse_row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
        scores, why = found["scores"], found.get("why", {})
        fine = all(isinstance(found[k], str) for k in ("id", "task")) and isinstance(why, dict)
        for value in scores.values():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fine = fine and (value is None or number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: expected id, task, scores and why; got {line[:60]!r} ({error!r}); correct it"
        ) from None
    if not fine:
        raise UserError(
            f"{where}: expected text for id and task, numbers or null for scores; got {line[:60]!r}; correct it"
        )
    return Row(found["id"], found["task"], scores, why)


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{name: {"value", "n", "coverage", "undefined", "ci95"}} of each score, and of its mean over items (NAME/micro).

    `n` counts numbers, `coverage` is the share of rows that did not fail, `ci95` the interval of the task-stratified
    bootstrap. Value and interval are null where coverage is below `MIN_COVERAGE` or there is no number.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.scores):
        there = [row for row in rows if row.scores.get(name) is not None]
        undefined = sum(row.why.get(name, "").startswith(UNDEFINED_PREFIX) for row in rows)
        coverage = (len(there) + undefined) / len(rows)
        values = [v for row in there if (v := row.scores[name]) is not None]
        tasks = [row.task for row in there]
        for key, over_tasks in ((name, True), (f"{name}/micro", False)):
            if "/" in name and not over_tasks:
                continue  # of a baseline the headline is enough
            shown = bool(there) and coverage >= MIN_COVERAGE
            out[key] = {
                "value": statistics.mean_over_tasks(values, tasks, over_tasks) if shown else None,
                "n": len(there),
                "coverage": coverage,
                "undefined": undefined,
                "ci95": statistics.bootstrap_interval(values, tasks, over_tasks=over_tasks) if shown else None,
            }
    return out


def write_results(folder: Path, rows: Sequence[Row], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write rows.jsonl and summary.json, each whole or not at all; returns the summary.

    `extra` are further headlines of the same form.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(rows) | dict(extra or {})
    write_text(folder / ROWS, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def prepare_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings.json into a new folder, or into one whose pictures are of the same "protocol" and "source".

    Raises:
        UserError: the folder holds something else, or pictures of other settings.
    """
    path, wanted = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.is_file():
        found = _read_settings(path)
        other = [k for k in ("protocol", "source") if found.get(k) != wanted.get(k)]
        if other:
            raise UserError(
                f"expected a new folder, or one with the same settings; got {folder}, which has another "
                f"{' and '.join(other)}; choose another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(_is_foreign(p.name) for p in folder.iterdir())):
        raise UserError(f"expected a new folder for results; got {folder}, which holds other files; choose another")
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")


def _is_foreign(name: str) -> bool:
    """Whether a file is from something other than an evaluation that stopped before it wrote settings.json."""
    return not name.endswith(".tmp") and name not in LOCK_FILES


def lower_is_better(name: str) -> bool:
    """Whether lower scores of this metric are better: distances, changed area and copy rate."""
    return any(name == low or name.startswith(f"{low}_") for low in LOWER_IS_BETTER)


def common_scores(results: Sequence[Results], name: str) -> tuple[np.ndarray, list[str], list[str]]:
    """The scores (results, items) of the items that have a number everywhere, with their tasks and ids."""
    tables = [{row.id: row for row in r.rows} for r in results]
    ids = [i for i in tables[0] if all(i in t and t[i].scores.get(name) is not None for t in tables)]
    values = np.array([[t[i].scores[name] for i in ids] for t in tables], dtype=float)
    return values, [tables[0][i].task for i in ids], ids
