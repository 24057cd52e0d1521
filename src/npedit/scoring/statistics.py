"""What can be said of scores: intervals, paired differences, win rates, rankings.

Items are drawn within tasks throughout (a stratified bootstrap), since a benchmark's tasks are fixed and their items a
sample. Of a task with n items n - 1 are drawn, which makes the variance of its mean unbiased (J. N. K. Rao and C. F. J.
Wu, 1988); tasks of a single item are drawn as one stratum together. Random numbers are seeded: the same scores give the
same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax

BOOTSTRAP_DRAWS, SIGN_FLIPS = 2000, 10_000
CHUNK_NUMBERS = 4_000_000  # random numbers held at a time
Numbers = Sequence[float] | np.ndarray
Labels = Sequence[str] | np.ndarray  # of tasks or items


def _weights(tasks: Sequence[str], over_tasks: bool) -> np.ndarray:
    """Each item's weight in the mean: equal for tasks and then for the items of one, or equal for all items."""
    if not over_tasks:
        return np.full(len(tasks), 1 / len(tasks))
    _, place, counts = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
    return 1 / (counts[place] * len(counts))


def mean_over_tasks(values: Numbers, tasks: Sequence[str], over_tasks: bool = True) -> float:
    """The mean over tasks of each task's mean, or without `over_tasks` the mean over items.

    Raises:
        ValueError: no items, or other numbers of values and tasks.
    """
    values = np.asarray(values, dtype=float)
    if len(values) != len(tasks) or not len(values):
        raise ValueError(f"expected as many values as tasks and at least one; got {len(values)}, {len(tasks)}")
    if not over_tasks:
        return float(values.mean())
    _, place, counts = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
    return float((np.bincount(place, values) / counts).mean())


def strata_of_tasks(tasks: Sequence[str]) -> list[np.ndarray]:
    """The items of each task; those of tasks with one item as one stratum. [] if a stratum of one item is left."""
    names, place = np.unique(np.asarray(tasks), return_inverse=True)
    groups = [np.flatnonzero(place == k) for k in range(len(names))]
    singles = [g for g in groups if len(g) == 1]
    if len(singles) == 1:
        return []
    return [g for g in groups if len(g) > 1] + ([np.concatenate(singles)] if singles else [])


def bootstrap_means(values: Numbers, tasks: Sequence[str], over_tasks: bool, seed: int, draws: int) -> np.ndarray:
    """(draws,) means of samples drawn within tasks; (0,) where a task has one item and no other does."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    weights, groups = _weights(tasks, over_tasks), strata_of_tasks(tasks)
    if not groups:
        return np.empty(0)
    total = np.zeros(draws)
    for group in groups:
        for part in _chunks(draws, len(group)):
            picked = group[rng.integers(len(group), size=(part.stop - part.start, len(group) - 1))]
            total[part] += values[picked].mean(1) * weights[group].sum()  # a stratum's items weigh the same
    return total


def _chunks(draws: int, items: int) -> Iterator[slice]:
    """Slices of `draws` random draws of so many items, each of at most `CHUNK_NUMBERS` numbers. The random numbers are
    the same as of one call for all draws."""
    size = max(1, CHUNK_NUMBERS // max(1, items))
    yield from (slice(start, min(start + size, draws)) for start in range(0, draws, size))


def _percentiles(found: Numbers) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % percentile."""
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_interval(
    values: Numbers, tasks: Sequence[str], seed: int = 0, draws: int = BOOTSTRAP_DRAWS, over_tasks: bool = True
) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean. None where the scores cannot tell: a lone item in a task."""
    found = bootstrap_means(values, tasks, over_tasks, seed, draws)
    return _percentiles(found) if len(found) else None


def cluster_bootstrap_interval(
    statistic: Callable[[np.ndarray], float], clusters: Labels, seed: int = 0, draws: int = 200
) -> tuple[float, float] | None:
    """The 95 % interval of `statistic(positions)`, with whole clusters (items) drawn. A draw on which the statistic
    has no value is left out; None if fewer than half have one."""
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    order, sizes = np.argsort(place, kind="stable"), np.bincount(place)
    starts = np.cumsum(sizes) - sizes  # of each cluster in `order`
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        ends = np.cumsum(sizes[drawn])
        within = np.arange(ends[-1]) - np.repeat(ends - sizes[drawn], sizes[drawn])
        picked = order[np.repeat(starts[drawn], sizes[drawn]) + within]
        try:
            found.append(statistic(picked))
        except ValueError:
            continue
    return _percentiles(found) if 2 * len(found) >= draws else None


# ------------------------------------------------------------------------------------------------------ two editors


@dataclass(frozen=True)
class PairedDifference:
    """Editor B less editor A on the items that both have: the mean over tasks, its 95 % interval, and the p-value of no
    difference. A win is an item where B is better by more than the margin."""

    mean: float
    ci95: tuple[float, float] | None
    p: float
    n: int
    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> float:
        """(wins + ties / 2) / n."""
        return (self.wins + self.ties / 2) / self.n


def paired_difference(
    a: Numbers, b: Numbers, tasks: Sequence[str], lower: bool = False, margin: float = 0.0, seed: int = 0
) -> PairedDifference:
    """Compare B with A, item by item. `lower`: less is better. Within `margin` (inclusive) items tie.

    Raises:
        ValueError: no items, or of unlike number.
    """
    d = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    better = compare_with_margin(d, margin) * (-1 if lower else 1)
    wins, losses = int((better > 0).sum()), int((better < 0).sum())
    found = mean_over_tasks(d, tasks)
    return PairedDifference(
        found,
        bootstrap_interval(d, tasks, seed),
        sign_flip_p_value(d, tasks, seed),
        len(d),
        wins,
        len(d) - wins - losses,
        losses,
    )


def compare_with_margin(d: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Differences -> 1, 0 or -1; 0 within the margin."""
    return np.where(np.abs(d) <= margin, 0, np.sign(d)).astype(int)


def sign_flip_p_value(d: Numbers, tasks: Sequence[str], seed: int = 0, flips: int = SIGN_FLIPS) -> float:
    """The two-sided p-value of no mean difference, by flipping the signs of items: (1 + #{|d*| >= |d|}) / (flips + 1).
    It supposes that each item's difference is symmetric about zero if there is none."""
    weighted, rng = np.asarray(d, dtype=float) * _weights(tasks, True), np.random.default_rng(seed)
    observed, reached = abs(weighted.sum()), 0
    least = observed - 1e-12 * np.abs(weighted).sum()  # sums in another order differ by rounding
    for part in _chunks(flips, len(weighted)):
        signs = rng.integers(0, 2, size=(part.stop - part.start, len(weighted))) * 2 - 1
        reached += int((np.abs(signs @ weighted) >= least).sum())
    return (1 + reached) / (flips + 1)


def holm_adjusted(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that with all true nulls at most 5 % of families show one below .05
    (S. Holm, 1979)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def win_rate_interval(better: Numbers, tasks: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of (wins + ties / 2) / n for items that are 1, 0 or -1, drawn within tasks."""
    return bootstrap_interval((np.asarray(better) + 1) / 2, tasks, seed, over_tasks=False)


# ----------------------------------------------------------------------------------------------------- many editors


@dataclass(frozen=True)
class Ranking:
    """Strengths `theta` (editors,) with mean zero, and `nu`, how common ties are: P(tie) / sqrt(P(win) P(loss))."""

    theta: np.ndarray
    nu: float

    @property
    def elo(self) -> np.ndarray:
        """1000 + 400 theta / ln 10."""
        return 1000 + 400 * self.theta / np.log(10)


def fit_davidson(wins: np.ndarray, ties: np.ndarray, l2: float = 1.0) -> Ranking:
    """The Davidson model (R. R. Davidson, 1970), Bradley-Terry with ties, as a penalised maximum of likelihood.

    `wins[i, j]` (k, k) counts how often i beat j; `ties` is symmetric. P(i beats j) is proportional to exp(theta_i),
    P(tie) to nu exp((theta_i + theta_j) / 2). The penalty l2 / 2 sum theta^2 keeps an editor that always wins finite.
    Without ties this is Bradley-Terry.

    Raises:
        ValueError: other shapes, or editors that no chain of comparisons connects.
    """
    k = len(wins)
    if wins.shape != (k, k) or ties.shape != (k, k) or not (ties == ties.T).all() or k < 2:
        raise ValueError(f"expected (k, k) wins and symmetric ties; got {wins.shape}, {ties.shape}")
    parts = _connected_components(wins + wins.T + ties)
    if len(parts) > 1:
        raise ValueError(f"expected editors that comparisons connect; got the separate groups {parts}")
    if not wins.any():
        return Ranking(np.zeros(k), float("inf"))
    features, counts = _davidson_features_and_counts(wins, ties)
    if not ties.any():
        features, counts = features[:, :2], counts[:, :2]
    penalty = np.append(np.full(k, l2), 0.0)
    free = np.append(np.ones(k, dtype=bool), bool(ties.any()))  # without ties there is no nu
    x = np.zeros(k + 1)

    def value(x: np.ndarray) -> float:
        return float((counts * log_softmax(features @ x, axis=1)).sum() - (penalty * x**2).sum() / 2)

    for _ in range(200):  # Newton's method; the function is concave
        p, n = np.exp(log_softmax(features @ x, axis=1)), counts.sum(1)
        expected = np.einsum("po,pof->pf", p, features)
        gradient = np.einsum("po,pof->f", counts - p * n[:, None], features) - penalty * x
        curvature = np.einsum("p,po,pof,pog->fg", n, p, features, features) + np.diag(penalty)
        curvature -= np.einsum("p,pf,pg->fg", n, expected, expected)
        step = np.zeros(k + 1)
        step[free] = np.linalg.pinv(curvature[np.ix_(free, free)]) @ gradient[free]
        before = value(x)
        while value(x + step) < before and np.abs(step).max() > 1e-10:
            step /= 2
        x = x + step
        if np.abs(step).max() < 1e-10:
            break
    return Ranking(x[:k] - x[:k].mean(), float(np.exp(x[k])) if ties.any() else 0.0)


def _davidson_features_and_counts(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, 3, k + 1) what each outcome's log-odds is made of, and (pairs, 3) counts: i wins, j wins, tie."""
    k = len(wins)
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k) if wins[i, j] + wins[j, i] + ties[i, j]]
    features, counts = np.zeros((len(pairs), 3, k + 1)), np.zeros((len(pairs), 3))
    for row, (i, j) in enumerate(pairs):
        features[row, 0, i] = features[row, 1, j] = features[row, 2, k] = 1.0
        features[row, 2, [i, j]] = 0.5
        counts[row] = wins[i, j], wins[j, i], ties[i, j]
    return features, counts


def _connected_components(links: np.ndarray) -> list[list[int]]:
    count, part = connected_components(links, directed=False)
    return [np.flatnonzero(part == k).tolist() for k in range(count)]


def rank_editors(
    scores: np.ndarray, tasks: Sequence[str], lower: bool = False, margin: float = 0.0, seed: int = 0, draws: int = 200
) -> tuple[Ranking, np.ndarray | None]:
    """Rank editors by (editors, items) scores: every pair is compared on every item.

    Returns the ranking and (editors, 2) 95 % intervals of Elo, with items drawn within tasks (an item is a cluster: all
    its comparisons go together); None where the scores cannot tell.
    """
    k = len(scores)
    better = compare_with_margin(scores[:, None] - scores[None], margin) * (-1 if lower else 1)  # (k, k, items)
    items, off = scores.shape[1], ~np.eye(k, dtype=bool)
    wins, ties = ((better > 0).reshape(k * k, items) * 1.0, (better == 0).reshape(k * k, items) * 1.0)

    def rank(weights: np.ndarray) -> Ranking:
        level = (ties @ weights).reshape(k, k) * off
        return fit_davidson((wins @ weights).reshape(k, k), (level + level.T) / 2)  # equal but for rounding

    found, groups, rng = rank(np.ones(items)), strata_of_tasks(tasks), np.random.default_rng(seed)
    if not groups:
        return found, None
    drawn = [rank(_bootstrap_weights(groups, items, rng)).elo for _ in range(draws)]
    return found, np.quantile(np.array(drawn), (0.025, 0.975), axis=0).T


def _bootstrap_weights(groups: Sequence[np.ndarray], items: int, rng: np.random.Generator) -> np.ndarray:
    """(items,) how much each item counts in one draw. A group of n items counts n in all, though n - 1 are drawn: the
    penalty of `fit_davidson` would otherwise weigh more in a draw than in the fit of all items."""
    weights = np.zeros(items)
    for group in groups:
        drawn = group[rng.integers(len(group), size=len(group) - 1)]
        weights += np.bincount(drawn, minlength=items) * len(group) / (len(group) - 1)
    return weights
