"""Intervals over items and seeds: closed forms, and the share of intervals that cover the truth in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from npedit.benchmarks.toy import wilson_interval
from npedit.scoring.seed_intervals import (
    NO_SPREAD,
    SeedSpread,
    difference_interval,
    mean_interval,
    pool_seed_spread,
)

ONE_TASK = ["a"] * 90
TASKS = [f"type {i % 9}" for i in range(90)]


def draw(rng: np.random.Generator, shape: tuple[int, int], seeds: float, items: np.ndarray, both: float) -> np.ndarray:
    """Outcomes with these standard deviations of the seeds' effects and of the effects of seed and item together."""
    noise = rng.normal(size=shape)
    return items + seeds * rng.normal(size=(shape[0], 1)) + both * noise


def test_one_seed_without_spread_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 1, 90)).astype(float)
    wanted = stats.ttest_rel(a[0], b[0]).confidence_interval()
    assert difference_interval(a, b, ONE_TASK, NO_SPREAD) == pytest.approx((a.mean() - b.mean(), *wanted))


def test_one_row_without_spread_has_wilsons_interval():
    outcomes = np.zeros((1, 900))
    outcomes[0, :470] = 1
    wanted = wilson_interval(470, 900)["ci95"]
    assert mean_interval(outcomes, ["a"] * 900, NO_SPREAD)[1:] == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize("right", [0, 1])
def test_a_row_that_is_always_right_or_wrong_has_an_interval(right):
    mean, low, high = mean_interval(np.full((3, 900), float(right)), ["a"] * 900, SeedSpread(1e-4, 1e-4, 2))
    assert mean == right and 0 <= low <= high <= 1 and 0.001 < high - low < 0.05


def test_one_right_outcome_more_hardly_changes_the_interval():
    """A row that is nearly always wrong, in a study whose other rows differ from seed to seed."""
    outcomes, spread = np.zeros((3, 900)), SeedSpread(0.02**2, 0.022**2, 20)
    none = mean_interval(outcomes, TASKS * 10, spread)[2]
    outcomes[0, 0] = 1
    one = mean_interval(outcomes, TASKS * 10, spread)[2]
    half = stats.t.ppf(0.975, 20) * 0.02 / 3**0.5
    assert half < one < none < half + 0.005


def test_a_row_without_variance_has_no_fewer_degrees_of_freedom_than_the_seeds():
    """The pooled seeds vary by what the items of other rows add; nothing is left for a row that is never right."""
    _, low, high = mean_interval(np.zeros((3, 900)), TASKS * 10, SeedSpread(0.0, 1e-4, 20))
    z = stats.t.ppf(0.975, 20) ** 2 / 900
    assert low == 0 and high == pytest.approx(z / (1 + z))


def test_seeds_alone_give_students_t_of_their_number():
    """Items that all agree: two rows of three seeds, d +- t(4) s sqrt(2 / 3)."""
    a, b = (np.repeat(np.array(means)[:, None], 90, 1) for means in ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]))
    spread = pool_seed_spread([a, b], TASKS)
    assert spread.freedom == 4 and spread.variance == pytest.approx(0.01)
    half = stats.t.ppf(0.975, 4) * 0.1 * (2 / 3) ** 0.5
    assert difference_interval(a, b, TASKS, spread) == pytest.approx((0.3, 0.3 - half, 0.3 + half))


def test_what_items_add_is_no_variance_between_seeds():
    """Outcomes drawn anew for every seed and item: the seeds' means differ, and the seeds do not."""
    rng = np.random.default_rng(0)
    spread = pool_seed_spread([(rng.random((3, 900)) < 0.5) * 1.0 for _ in range(200)], ["a"] * 900)
    assert spread.observed == pytest.approx(0.25 / 900, rel=0.15) and spread.variance < 0.15 * spread.observed


def test_the_same_runs_are_paired_by_seed():
    a = np.repeat(np.array([[0.2], [0.8]]), 90, 1)
    assert difference_interval(a, a - 0.1, TASKS, SeedSpread(0.1, 0.1, 1), True) == pytest.approx((0.1, 0.1, 0.1))
    assert difference_interval(a, a - 0.1, TASKS, SeedSpread(0.1, 0.1, 1))[1] < 0


def test_rows_on_other_items_are_refused():
    with pytest.raises(ValueError, match="90 and 80"):
        difference_interval(np.zeros((1, 90)), np.zeros((1, 80)), ONE_TASK, NO_SPREAD)


def coverage(seeds: float, both: float, tasks: list[str], count: int, draws: int = 400) -> tuple[float, float]:
    """The shares of intervals that cover the true difference 0.1, over items and seeds and over items alone. A study of
    eight rows with `count` seeds each; the first two are compared."""
    rng, hits = np.random.default_rng(1), np.zeros(2)
    for _ in range(draws):
        items = rng.normal(size=(1, len(tasks)))
        rows = [draw(rng, (count, len(tasks)), seeds, items, both) for _ in range(8)]
        spread = pool_seed_spread(rows, tasks)
        for k, used in enumerate((spread, NO_SPREAD)):
            _, low, high = difference_interval(rows[0] + 0.1, rows[1], tasks, used)
            hits[k] += low <= 0.1 <= high
    return tuple(hits / draws)


@pytest.mark.parametrize("tasks", [ONE_TASK, TASKS], ids=["one task", "nine tasks"])
def test_intervals_cover_the_truth_and_those_over_items_alone_do_not(tasks):
    covered, items_alone = coverage(0.3, 1.0, tasks, 3)
    assert 0.92 <= covered <= 0.98 and items_alone < 0.75


def test_without_differences_between_seeds_the_intervals_are_hardly_wider():
    covered, items_alone = coverage(0.0, 1.0, ONE_TASK, 3)
    assert 0.93 <= covered <= 0.99 and 0.92 <= items_alone <= 0.98


def test_two_seeds_each_of_two_rows_are_covered_too():
    """The worst case, two degrees of freedom in all: Student's t makes the intervals wide."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        items = rng.normal(size=(1, 90))
        a, b = (draw(rng, (2, 90), 0.3, items, 1.0) for _ in range(2))
        _, low, high = difference_interval(a, b, ONE_TASK, pool_seed_spread([a, b], ONE_TASK))
        hits += low <= 0 <= high
    assert hits / 400 >= 0.93
