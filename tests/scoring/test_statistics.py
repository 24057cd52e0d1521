"""Statistics against hand-computed examples, scipy, known identities and a simulation of known coverage."""

import math

import numpy as np
import pytest

from npedit.scoring import rank_agreement
from npedit.scoring import statistics as st

TASKS = ["a", "a", "a", "b"]


def test_the_mean_over_tasks_is_not_that_over_items():
    assert st.mean_over_tasks([1, 2, 3, 10], TASKS) == 6.0
    assert st.mean_over_tasks([1, 2, 3, 10], TASKS, over_tasks=False) == 4.0
    with pytest.raises(ValueError, match="as many values as tasks"):
        st.mean_over_tasks([1.0], TASKS)


def test_the_bootstraps_spread_is_the_analytic_standard_error():
    """SE = 1/T sqrt(sum s_t^2 / n_t), with s_t the sample's standard deviation (n - 1)."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 5), rng.normal(3, 2, 40), rng.normal(1, 3, 12)])
    tasks = ["a"] * 5 + ["b"] * 40 + ["c"] * 12
    parts = [values[:5], values[5:45], values[45:]]
    expected = math.sqrt(sum(p.var(ddof=1) / len(p) for p in parts)) / 3
    assert st.bootstrap_means(values, tasks, True, 0, 20_000).std() == pytest.approx(expected, rel=0.02)


def test_interval_has_the_stated_coverage():
    """Known truth: 11 tasks of unlike means, scores with ceilings as judges give them; 95 % within 3 sigma."""
    rng, sizes = np.random.default_rng(1), [20, 20, 35, 30, 30, 28, 30, 50, 20, 20, 20]
    tasks = [str(t) for t, n in enumerate(sizes) for _ in range(n)]
    chances = [0.2 + 0.05 * t for t in range(len(sizes))]
    truth, covered = 10 * float(np.mean(chances)), 0
    for run in range(400):
        values = np.concatenate([10.0 * (rng.random(n) < p) for n, p in zip(sizes, chances)])
        low, high = st.bootstrap_interval(values, tasks, seed=run, draws=400)
        covered += low <= truth <= high
    assert covered / 400 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 400))


def test_tasks_of_one_item_do_not_shrink_the_interval():
    values, tasks = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0], list("abcdef")
    low, high = st.bootstrap_interval(values, tasks)
    assert low < 0.25 and high > 0.75
    assert st.bootstrap_interval([1.0, 2.0, 3.0, 9.0], TASKS) is None  # a lone item says nothing of its task's spread
    assert st.bootstrap_interval([3.0, 3.0, 3.0], ["a"] * 3) == (3.0, 3.0)


def test_paired_intervals_are_narrower_where_scores_go_together():
    rng = np.random.default_rng(2)
    a = rng.normal(0, 3, 200)
    b, tasks = a + 0.3 + rng.normal(0, 0.5, 200), ["t"] * 200
    found = st.paired_difference(a, b, tasks)
    one, two = st.bootstrap_interval(a, tasks), st.bootstrap_interval(b, tasks)
    assert found.ci95[1] - found.ci95[0] < 0.3 * (two[1] - two[0])
    assert found.ci95[0] > 0 and found.p < 0.001 and one[1] > two[0]  # the unpaired intervals overlap


def test_a_difference_by_hand():
    found = st.paired_difference([1, 1, 1, 1], [2, 1, 0, 3], TASKS)
    assert (found.wins, found.ties, found.losses, found.n) == (2, 1, 1, 4)
    assert found.win_rate == 0.625 and found.mean == pytest.approx((0 + 2) / 2)
    turned = st.paired_difference([1, 1, 1, 1], [2, 1, 0, 3], TASKS, lower=True)
    assert (turned.wins, turned.losses, turned.mean) == (1, 2, found.mean)
    assert st.paired_difference([1, 1, 1, 1], [2, 1, 0, 3], TASKS, margin=1).ties == 3


def test_sign_flips_against_all_of_them():
    """Five items of one task: 32 sign patterns, of which those as far out as 1+2+3+4-1... are counted by hand."""
    d = np.array([1.0, 2.0, 3.0, 4.0, -1.0])
    patterns = np.array([[1 if k >> i & 1 else -1 for i in range(5)] for k in range(32)])
    exact = (np.abs(patterns @ d) >= abs(d.sum()) - 1e-9).mean()
    assert st.sign_flip_p_value(d, ["t"] * 5, flips=20_000) == pytest.approx(exact, abs=0.012)
    assert st.sign_flip_p_value([0.0] * 4, TASKS) == 1.0
    big = np.ones(40)
    assert st.sign_flip_p_value(big, ["t"] * 40, flips=999) == 1 / 1000


def test_p_values_are_uniform_under_the_null():
    rng, tasks = np.random.default_rng(3), ["a"] * 10 + ["b"] * 20
    found = [st.sign_flip_p_value(rng.normal(size=30), tasks, seed=i, flips=200) for i in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 400))


def test_holm_by_hand():
    assert st.holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm_adjusted([0.5, 0.9]) == [1.0, 1.0] and st.holm_adjusted([]) == []


def test_davidson_of_two_editors_has_a_closed_form():
    """Without penalty theta_1 - theta_2 = ln(W / L) and nu = T / sqrt(W L)."""
    wins, ties = np.array([[0, 12], [3, 0]]), np.array([[0, 5], [5, 0]])
    found = st.fit_davidson(wins, ties, l2=0.0)
    assert found.theta[0] - found.theta[1] == pytest.approx(math.log(4), abs=1e-6)
    assert found.nu == pytest.approx(5 / 6, abs=1e-6)
    assert found.elo.mean() == pytest.approx(1000) and np.ptp(found.elo) == pytest.approx(400 * math.log10(4), abs=1e-3)
    plain = st.fit_davidson(wins, 0 * ties, l2=0.0)  # Bradley-Terry
    assert plain.theta[0] - plain.theta[1] == pytest.approx(math.log(4), abs=1e-6) and plain.nu == 0


def test_davidson_finds_the_strengths_that_made_the_outcomes():
    theta, nu, rng = np.array([0.8, 0.1, -0.2, -0.7]), 0.6, np.random.default_rng(4)
    wins, ties = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(4):
        for j in range(i + 1, 4):
            w = np.array([np.exp(theta[i]), np.exp(theta[j]), nu * np.exp((theta[i] + theta[j]) / 2)])
            wins[i, j], wins[j, i], ties[i, j] = rng.multinomial(20_000, w / w.sum())
            ties[j, i] = ties[i, j]
    found = st.fit_davidson(wins, ties)
    assert found.theta == pytest.approx(theta, abs=0.03) and found.nu == pytest.approx(nu, abs=0.02)


def test_davidson_at_the_edges():
    always = st.fit_davidson(np.array([[0, 9], [0, 0]]), np.zeros((2, 2)))
    assert 0 < always.theta[0] < 5  # finite by the penalty
    assert st.fit_davidson(np.zeros((2, 2)), np.array([[0, 4], [4, 0]])).theta.tolist() == [0, 0]
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[2, 3] = 1
    with pytest.raises(ValueError, match=r"separate groups \[\[0, 1\], \[2, 3\]\]"):
        st.fit_davidson(apart, np.zeros((4, 4)))


def test_ranks_follow_the_scores():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(3, 60)) + np.array([[0.0], [1.0], [0.3]])
    found, ci = st.rank_editors(scores, ["t"] * 60, draws=60)
    assert np.argsort(-found.elo).tolist() == [1, 2, 0]
    assert (ci[:, 0] < found.elo).all() and (found.elo < ci[:, 1]).all()
    turned, _ = st.rank_editors(scores, ["t"] * 60, lower=True, draws=2)
    assert turned.theta == pytest.approx(-found.theta, abs=1e-6)


def test_the_elo_interval_of_an_editor_that_always_wins_is_its_estimate():
    """All draws agree with all items. A draw that counted fewer items would be shrunk more."""
    scores = np.repeat(np.array([[2.0], [1.0], [0.0]]), 9, 1)
    found, ci = st.rank_editors(scores, [*"aabbcccde"], draws=20)
    assert ci == pytest.approx(np.stack([found.elo, found.elo], 1)) and np.ptp(found.elo) > 400


def tau_b(a, b):
    """Kendall's tau-b by its definition, over all pairs."""
    left, right = (np.sign(np.subtract.outer(v, v))[np.triu_indices(len(v), 1)] for v in (a, b))
    return (left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum())


def test_correlations_with_ties_by_their_definitions():
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 6, 80), rng.integers(0, 4, 80)
    b = b + a // 2
    ranks = [[(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v] for v in (a, b)]  # equal values: their mean rank
    assert rank_agreement.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert rank_agreement.kendall(a, b) == pytest.approx(tau_b(a, b), abs=1e-12)
    assert (
        rank_agreement.spearman([1, 2, 3], [1, 4, 9]) == pytest.approx(1)
        and rank_agreement.kendall([1, 2, 3], [3, 2, 1]) == -1
    )
    with pytest.raises(ValueError, match="values differ"):
        rank_agreement.spearman([1, 1], [1, 2])


def test_correlations_are_averaged_by_their_precision():
    mean = rank_agreement.fisher_z_mean
    assert mean([0.5, 0.5], [10, 4]) == pytest.approx(0.5) and mean([0.9, 0.1], [10, 10]) > 0.5
    assert mean([0.9, 0.1], [4, 13]) == pytest.approx(math.tanh((math.atanh(0.9) + 10 * math.atanh(0.1)) / 11))
    assert mean([1.0], [5]) == mean([1.0, 1.0], [5, 9]) == 1 and mean([-1.0], [4]) == -1
    for perfect in (1.0, -1.0):  # four items: 1 and then .8 are the highest correlations
        assert mean([perfect, 0.2], [4, 30]) == mean([perfect * 0.9, 0.2], [4, 30])
    assert mean([1 - 6 * 2 / (30 * 899), 0.2], [30, 30]) == pytest.approx(
        math.tanh((math.atanh(1 - 12 / (30 * 899)) + math.atanh(0.2)) / 2)
    )  # the next to perfect one is as it is
    for correlations, counts in (([], []), ([0.5, 0.2], [9, 3])):
        with pytest.raises(ValueError, match="four items"):
            mean(correlations, counts)


def test_right_pairs_by_hand():
    """Item x: judge 1 < 2 < 2.1, people 1 < 2 = 2; item y: one picture, so no pair."""
    judge, people, items = [1, 2, 2.1, 5], [1, 2, 2, 0], ["x", "x", "x", "y"]
    right, groups = rank_agreement.correct_pairs(judge, people, items)
    assert right.tolist() == [True, True, False] and groups.tolist() == ["x"] * 3
    margin = rank_agreement.calibrate_tie_margin(judge, people, items)
    assert margin == pytest.approx(0.1) and rank_agreement.correct_pairs(judge, people, items, margin)[0].all()
    with pytest.raises(ValueError, match="two scores of one item"):
        rank_agreement.correct_pairs([1, 2], [1, 2], ["x", "y"])


def test_bootstrap_draws_whole_clusters():
    """Ten copies of each of eight values: as independent items the interval would be far too narrow."""
    values, ids = np.repeat(np.arange(8.0), 10), np.repeat([str(k) for k in range(8)], 10)
    low, high = st.cluster_bootstrap_interval(lambda at: float(values[at].mean()), ids, draws=1000)
    assert high - low == pytest.approx(2 * 1.96 * np.arange(8).std() / math.sqrt(8), rel=0.12)
    assert st.cluster_bootstrap_interval(lambda at: rank_agreement.spearman(at * 0, at), ids) is None
