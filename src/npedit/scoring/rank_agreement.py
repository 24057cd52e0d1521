"""How well one list of scores orders items as another does, such as a judge's scores and people's: rank correlations,
and the accuracy over pairs. Time grows as n log n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

from npedit.scoring.statistics import Labels, Numbers, compare_with_margin


def spearman(x: Numbers, y: Numbers) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    Raises:
        ValueError: fewer than two items, unlike numbers, or values that are all the same.
    """
    a, b = _check_varied(x, y)
    return float(stats.spearmanr(a, b).statistic)


def kendall(x: Numbers, y: Numbers) -> float:
    """Kendall's tau-b, which accounts for ties. Errors as in `spearman`."""
    a, b = _check_varied(x, y)
    return float(stats.kendalltau(a, b).statistic)


def _check_varied(x: Numbers, y: Numbers) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.shape != b.shape or len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError(f"expected two lists of one length whose values differ; got {a.tolist()}, {b.tolist()}")
    return a, b


def pairs_within_groups(groups: Labels) -> Iterator[tuple[int, int]]:
    """Every pair of positions whose group is the same, each once."""
    places: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    for members in places.values():
        yield from ((i, j) for k, i in enumerate(members) for j in members[k + 1 :])


def correct_pairs(
    judge: Numbers, people: Numbers, groups: Labels, margin: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of every pair within a group (one item, several editors): does the judge order it as people do, and which group
    is it? A tie is right where people tie; `margin` is how near two of the judge's scores are when they tie.

    Raises:
        ValueError: there is no pair.
    """
    i, j = _pair_positions(groups)
    one, two = np.asarray(judge, dtype=float), np.asarray(people, dtype=float)
    return compare_with_margin(one[i] - one[j], margin) == compare_with_margin(two[i] - two[j]), np.asarray(groups)[i]


def _pair_positions(groups: Labels) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(pairs_within_groups(groups))
    if not pairs:
        raise ValueError("expected at least two scores of one item; got none")
    i, j = np.array(pairs).T
    return i, j


def calibrate_tie_margin(judge: Numbers, people: Numbers, groups: Labels) -> float:
    """The margin with the most right pairs (arXiv 2305.14324), which lets a judge of fine scores tie at all. On the
    very pairs that it is chosen on, the accuracy is a little too high. Errors as in `correct_pairs`."""
    i, j = _pair_positions(groups)
    one, two = np.asarray(judge, dtype=float), np.asarray(people, dtype=float)
    gaps, people_tie = np.abs(one[i] - one[j]), two[i] == two[j]
    agree = np.sign(one[i] - one[j]) == np.sign(two[i] - two[j])
    margins, place = np.unique(np.append(gaps, 0.0), return_inverse=True)
    ties_right = np.cumsum(np.bincount(place[:-1], people_tie, len(margins)))
    order_right = np.bincount(place[:-1], agree & ~people_tie, len(margins))
    orders_left = order_right.sum() - np.cumsum(order_right)  # pairs farther apart than the margin
    return float(margins[np.argmax(ties_right + orders_left)])


def fisher_z_mean(correlations: Sequence[float], counts: Sequence[int]) -> float:
    """The mean of rank correlations through Fisher's z; that of n items has the weight n - 3. A perfect one, whose z
    is infinite, counts as halfway to the next lower Spearman correlation that n items can have.

    Raises:
        ValueError: no correlation, or one of fewer than four items.
    """
    r, n = np.asarray(correlations, dtype=float), np.asarray(counts, dtype=float)
    if not len(r) or len(r) != len(n) or n.min() < 4:
        raise ValueError(f"expected correlations of four items or more; got {r.tolist()} of {n.tolist()} items")
    if np.ptp(r) == 0:
        return float(r[0])
    limit = 1 - 6 / (n * (n**2 - 1))
    return float(np.tanh(np.average(np.arctanh(np.clip(r, -limit, limit)), weights=n - 3)))
