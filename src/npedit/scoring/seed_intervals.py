"""Intervals of success rates over items and training seeds together.

The outcomes of one row of a study are an array (seeds, items): 1 where the editor of that seed got that item right. All
rows are scored on the same items, in the same order. Items and seeds are two crossed samples, so the variance of a mean
has two parts:

- items: the variance of each item's mean over the seeds, within the edit types, divided by the number of items. For a
  difference of two rows it is the variance of the paired differences.
- seeds: the variance between the seeds of a row, less what different items add to it, divided by the number of seeds.
  Few seeds say little about this variance. So one variance is pooled over all rows that have several seeds, as in an
  analysis of variance with equal variances.

An interval is the mean plus or minus Student's t times the root of the sum. The degrees of freedom are those of
F. E. Satterthwaite (1946) for a sum of variances, so an interval is wide where few seeds were trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from npedit.scoring.statistics import strata_of_tasks


@dataclass(frozen=True)
class SeedSpread:
    """The variance of a row's rate from seed to seed. `variance` is without what different items add; `observed` is
    with it; `freedom` is the number of degrees of freedom, 0 if no row has several seeds."""

    variance: float
    observed: float
    freedom: int


NO_SPREAD = SeedSpread(0.0, 0.0, 0)


def pool_seed_spread(rows: Iterable[np.ndarray], tasks: Sequence[str]) -> SeedSpread:
    """The variance between seeds, pooled over all rows (seeds, items) with several seeds. Rows must not share runs."""
    squares, noise, freedom = 0.0, 0.0, 0
    for outcomes in (row for row in rows if len(row) > 1):
        more = len(outcomes) - 1
        squares += float(outcomes.mean(1).var(ddof=1)) * more
        noise += _interaction_variance(outcomes, tasks) * more
        freedom += more
    if not freedom:
        return NO_SPREAD
    return SeedSpread(max(0.0, squares - noise) / freedom, squares / freedom, freedom)


def mean_interval(outcomes: np.ndarray, tasks: Sequence[str], spread: SeedSpread) -> tuple[float, float, float]:
    """(mean, low, high) of a row's outcomes (seeds, items) with its 95 % interval.

    The interval is that of all shares p whose variance, p (1 - p) / size for the items and the seeds' part as it is,
    leaves the mean within t standard errors of p. Without the seeds' part this is Wilson's interval, which also holds
    near 0 and 1. `size` is the number of independent items that have the variance found here.
    """
    seeds, n = outcomes.shape
    mean, items = float(outcomes.mean()), _item_variance(outcomes.mean(0), tasks)
    _, t = _variance_and_t(items, spread, 1 / seeds, n)
    of_one = mean * (1 - mean)
    size = min(of_one / items, float(seeds * n)) if items and of_one else float(n)
    return mean, *_wilson_interval(mean, size, spread.variance / seeds, t)


def difference_interval(
    a: np.ndarray, b: np.ndarray, tasks: Sequence[str], spread: SeedSpread, paired_seeds: bool = False
) -> tuple[float, float, float]:
    """(difference, low, high) of the means of two rows (seeds, items), a less b, with its 95 % interval.

    With `paired_seeds` the runs of each seed are related: the same run used in two ways, or runs that started from the
    same one. Then the seeds' part is the variance of the differences of the pairs.

    Raises:
        ValueError: other numbers of items.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected rows with the same items; got {a.shape[1]} and {b.shape[1]}")
    paired = a.mean(0) - b.mean(0)
    share = 1 / len(a) if paired_seeds else 1 / len(a) + 1 / len(b)
    spread = pool_seed_spread([a - b], tasks) if paired_seeds else spread
    variance, t = _variance_and_t(_item_variance(paired, tasks), spread, share, len(paired))
    half, mean = t * math.sqrt(variance), float(paired.mean())
    return mean, mean - half, mean + half


def _variance_and_t(items: float, spread: SeedSpread, share: float, n: int) -> tuple[float, float]:
    """The variance of a mean, and the 97.5 % quantile of Student's t for it. `items` is the items' part; `share` is the
    sum of 1 / seeds over the rows.

    A sum of variances has no fewer degrees of freedom than its part with the fewest. Satterthwaite's formula can give
    fewer here, because the pooled noise of other rows was taken off: for example in a row that is always wrong."""
    total = items + share * spread.variance
    doubt = items**2 / max(1, n - 1)
    doubt += (share * spread.observed) ** 2 / spread.freedom if spread.freedom else 0.0
    fewest = min(n - 1, spread.freedom or n - 1)
    return total, float(stats.t.ppf(0.975, max(1, fewest, total**2 / doubt if doubt else 0.0)))


def _item_variance(values: np.ndarray, tasks: Sequence[str]) -> float:
    """The variance of the mean of (items,) values that are drawn within tasks."""
    groups = strata_of_tasks(tasks) or [np.arange(len(values))]
    return sum(float(values[g].var(ddof=1)) * len(g) for g in groups if len(g) > 1) / len(values) ** 2


def _interaction_variance(outcomes: np.ndarray, tasks: Sequence[str]) -> float:
    """What different items add to the variance between the means of the seeds."""
    found = 0.0
    for group in strata_of_tasks(tasks) or [np.arange(outcomes.shape[1])]:
        part = outcomes[:, group]
        rest = part - part.mean(0) - part.mean(1, keepdims=True) + part.mean()
        found += float((rest**2).sum()) / ((len(part) - 1) * max(1, len(group) - 1)) * len(group)
    return found / outcomes.shape[1] ** 2


def _wilson_interval(mean: float, size: float, other: float, t: float) -> tuple[float, float]:
    """Wilson's interval of a share of `size` items, with another variance `other` that does not depend on the share;
    `t` is the quantile."""
    c = t * t / size
    middle, half = mean + c / 2, t * math.sqrt(mean * (1 - mean) / size + c / (4 * size) + (1 + c) * other)
    return min(mean, max(0.0, (middle - half) / (1 + c))), max(mean, min(1.0, (middle + half) / (1 + c)))
