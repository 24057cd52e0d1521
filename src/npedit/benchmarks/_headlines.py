"""A benchmark's headlines (mean scores) with their bounds, and the noise of the judge."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npedit.scoring.statistics import bootstrap_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class ScoreScale:
    """The ends of a score's scale, and the coverage, a share in [0, 1], that a headline needs at least."""

    low: float
    high: float
    min_coverage: float


def summarise_score(
    rows: Sequence[Row], name: str, task_sizes: Mapping[str, int], scale: ScoreScale, micro: bool = False
) -> dict[str, Any]:
    """{"value", "n", "coverage", "ci95", "bounds"} of one score: the mean of the tasks' means, or with `micro` the mean
    over items, and its interval over items (task-stratified bootstrap). `task_sizes` is the number of items of each
    task in the benchmark, judged or not."""
    by_task: dict[str, list[float]] = {task: [] for task in task_sizes}
    for row in rows:
        if row["scores"][name] is not None:
            by_task[row["task"]].append(row["scores"][name])
    n, total = sum(map(len, by_task.values())), sum(task_sizes.values())
    coverage = n / total if total else 0.0
    result: dict[str, Any] = {"value": None, "n": n, "coverage": coverage, "ci95": None}
    bounds = []
    for end in (scale.low, scale.high):
        filled = {t: v + [end] * (task_sizes[t] - len(v)) for t, v in by_task.items()}
        bounds.append(_mean_over_tasks(filled, micro))
    if n and all(by_task.values()) and coverage >= scale.min_coverage:
        result["value"] = _mean_over_tasks(by_task, micro)
        tasks = [task for task, values in by_task.items() for _ in values]
        values = [value for values in by_task.values() for value in values]
        result["ci95"] = bootstrap_interval(values, tasks, over_tasks=not micro)
    return {**result, "bounds": bounds}


def _mean_over_tasks(by_task: Mapping[str, Sequence[float]], micro: bool) -> float | None:
    if micro:
        by_task = {"all": [v for values in by_task.values() for v in values]}
    means = [statistics.fmean(v) for v in by_task.values() if v]
    return statistics.fmean(means) if means else None


def measure_judge_noise(
    rows: Sequence[Row], repeats: int, swap: bool, combine: Callable[[Sequence[float]], float]
) -> dict[str, dict[str, float]]:
    """Score -> `repeat_sd`, the standard deviation of single answers around their item's mean, and `order_gap`, the
    mean absolute difference between the two orders of the pictures. Items that were asked once are left out."""
    found: dict[str, dict[str, float]] = {}
    for name in rows[0]["numbers"] if rows else ():
        passes = [[combine(numbers) for numbers in r["numbers"][name]] for r in rows]
        k = repeats
        groups = [p[i : i + k] for p in passes if len(p) in (k, 2 * k) for i in range(0, len(p), k)]
        pairs = [p for p in passes if swap and len(p) == 2 * k]
        if k > 1 and groups:
            found.setdefault(name, {})["repeat_sd"] = statistics.fmean(map(statistics.variance, groups)) ** 0.5
        if pairs:
            gaps = [abs(statistics.fmean(p[:k]) - statistics.fmean(p[k:])) for p in pairs]
            found.setdefault(name, {})["order_gap"] = statistics.fmean(gaps)
    return found
