"""Agreement of a metric with human labels: do both order pictures in the same way?

Labels are lines of JSON, `{"result": a result's name, "id": an item's id, "score": a number}`, higher for better.
Several labels of one picture are averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from npedit.errors import UserError, did_you_mean
from npedit.scoring import rank_agreement, statistics
from npedit.scoring.results import Results

Correlation = Callable[[np.ndarray, np.ndarray], float]
Labels = Mapping[tuple[str, str], float]  # (result, id) -> mean score
MIN_LABELS = 4  # of a task, for a correlation: the variance of Fisher's z is 1 / (n - 3)
Estimate = tuple[float, tuple[float, float] | None] | None  # value and 95 % interval; None where it has no value


@dataclass(frozen=True)
class Agreement:
    """Spearman, Kendall's tau-b, pairwise accuracy with the judge's equal scores as ties, and with the margin of ties
    that fits best, over `n` labelled pictures. The correlations are means over `tasks` tasks; `tasks_left_out` others
    have fewer than `MIN_LABELS` labelled pictures, or scores or labels that are all the same."""

    n: int
    estimates: tuple[Estimate, ...]  # four
    tasks: int = 0
    tasks_left_out: int = 0


def read_labels(path: Path, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Read people's labels of the named results.

    Raises:
        UserError: no such file, a line of another form, or a result that is not among them.
    """
    found: dict[tuple[str, str], list[float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a file of labels; got {path}: {error}; correct --people") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, key, score = str(row["result"]), str(row["id"]), float(row["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: expected result, id and score; got {line[:60]!r} ({error!r}); correct it"
            ) from None
        if name not in names or not math.isfinite(score):
            raise UserError(
                f"{path}:{number}: expected one of {', '.join(names)} and a number; got {name!r}, {score}."
                f"{did_you_mean(name, names)} Correct the line"
            )
        found.setdefault((name, key), []).append(score)
    return {key: sum(scores) / len(scores) for key, scores in found.items()}


def agreement_with_people(
    results: Sequence[Results], metric: str, labels: Labels, lower: bool, seed: int = 0
) -> Agreement:
    """The agreement of a metric with labels. A correlation is the mean over tasks, by Fisher's z, of those over all
    editors' pictures of one task; a task of n pictures has the weight n - 3. A pair is two editors' pictures of one
    item. `lower`: lower scores are better. Intervals are from a bootstrap over items."""
    picked = [
        (score * (-1 if lower else 1), labels[r.name, row.id], row.task, row.id)
        for r in results
        for row in r.rows
        if (r.name, row.id) in labels and (score := row.scores.get(metric)) is not None
    ]
    if not picked:
        return Agreement(0, (None, None, None, None))
    judge, people = (np.array([p[k] for p in picked]) for k in (0, 1))
    tasks, ids = (np.array([p[k] for p in picked]) for k in (2, 3))

    used = [task for task in np.unique(tasks) if _has_correlation(judge[tasks == task], people[tasks == task])]
    kept = np.isin(tasks, used)
    figures = [
        _estimate(partial(_mean_correlation, of, judge[kept], people[kept], tasks[kept]), ids[kept], seed)
        for of in (rank_agreement.spearman, rank_agreement.kendall)
    ]
    try:
        for margin in (0.0, rank_agreement.calibrate_tie_margin(judge, people, ids)):
            right, item = rank_agreement.correct_pairs(judge, people, ids, margin)
            figures.append(_estimate(partial(_mean_at, right), item, seed))
    except ValueError:
        figures += [None] * (4 - len(figures))
    return Agreement(len(picked), tuple(figures), len(used), len(np.unique(tasks)) - len(used))


def _has_correlation(judge: np.ndarray, people: np.ndarray) -> bool:
    """Whether the pictures of a task are enough for a correlation, and the scores not constant."""
    return len(judge) >= MIN_LABELS and bool(np.ptp(judge) > 0 and np.ptp(people) > 0)


def _mean_correlation(
    of: Correlation, judge: np.ndarray, people: np.ndarray, tasks: np.ndarray, at: np.ndarray
) -> float:
    """The mean over tasks of the pictures at the positions `at`, which are those of a bootstrap draw."""
    drawn = [at[tasks[at] == task] for task in np.unique(tasks[at])]
    fit = [k for k in drawn if _has_correlation(judge[k], people[k])]
    return rank_agreement.fisher_z_mean([of(judge[k], people[k]) for k in fit], [len(k) for k in fit])


def _mean_at(values: np.ndarray, at: np.ndarray) -> float:
    return float(values[at].mean())


def _estimate(statistic: Callable[[np.ndarray], float], clusters: np.ndarray, seed: int) -> Estimate:
    try:
        value = statistic(np.arange(len(clusters)))
    except ValueError:
        return None
    return value, statistics.cluster_bootstrap_interval(statistic, clusters, seed)
