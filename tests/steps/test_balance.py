"""`balance`: the critic's gradient is brought to its share of DMD's, by batch or by item."""

from __future__ import annotations

import pytest
import torch

from npedit.generator import seeded_generator
from npedit.steps import _gradient_balance
from npedit.steps._critic_gradient import CriticFeedback
from npedit.steps._gradient_balance import GradientBalance
from npedit.steps.base import Timers
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, parts


@pytest.fixture
def frozen():
    return parts()


def make(frozen, **settings) -> Step:
    chosen = NpEditSettings(**{"critic_weight": 0.5, "fake_updates": 1, "ramp_updates": 0, **settings})
    return Step(chosen, frozen, frozen.family.trainable_net(), updates=10, seed=0)


def shown(step: Step, *batches: tuple[float, float]) -> list[float]:
    """One update whose batches have gradients of these sizes (critic, DMD); the scale that each batch got."""
    found = []

    def update(losses) -> dict[str, float]:
        found.extend(
            step.balance.batch_scale(torch.tensor([step.settings.critic_weight * c]), torch.tensor([d]))
            for c, d in batches
        )
        return {}

    step.learners["student"].update = update
    step._update_student([], 0, Timers())
    return found


def test_balance_brings_the_critic_to_its_share_of_dmd(frozen):
    given = batch(0, 1, 2)
    x0 = frozen.family.encode(given.references) + 0.1
    plain, matched = make(frozen, critic_weight=0.25), make(frozen, critic_weight=0.25, balance="match")
    _, before = plain._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())
    _, after = matched._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())
    assert after["grad_norm/from_dmd"] == before["grad_norm/from_dmd"]
    assert after["grad_norm/from_critic"] == pytest.approx(0.25 * after["grad_norm/from_dmd"], rel=1e-4)
    assert before["grad_norm/from_critic"] != pytest.approx(0.25 * before["grad_norm/from_dmd"], rel=0.1)


def test_balance_runs_over_updates_and_survives_a_bad_one(frozen):
    step = make(frozen, balance="match")
    assert shown(step, (1.0, 2.0)) == [pytest.approx(2.0)]
    assert shown(step, (3.0, 2.0)) == [pytest.approx(2.0 / (1.0 + 0.05 * 2.0))]
    before = step.extra_state()["sizes"].clone()
    shown(step, (float("nan"), 2.0))
    assert torch.equal(step.extra_state()["sizes"], before)


def test_accumulated_batches_move_the_sizes_once(frozen):
    """Two batches an update move them as far as one does, by the batches' mean."""
    one, two = make(frozen, balance="match"), make(frozen, balance="match")
    for step, batches in ((one, [(3.0, 4.0)]), (two, [(2.0, 5.0), (4.0, 3.0)])):
        shown(step, (1.0, 2.0))
        shown(step, *batches)
    torch.testing.assert_close(two.balance.running_norms, torch.tensor([1.1, 2.1]))
    torch.testing.assert_close(two.balance.running_norms, one.balance.running_norms)


def test_a_whole_update_of_two_batches_moves_the_sizes_once(frozen):
    step = make(frozen, balance="match")
    step.step([batch(0, 1)], 0)
    start, seen = step.balance.running_norms.clone(), []
    norms, real = [], step.balance.batch_scale

    def noted(from_critic, from_dmd):
        norms.append(torch.stack([from_critic.norm() / step.settings.critic_weight, from_dmd.norm()]))
        seen.append(step.balance.running_norms.clone())
        return real(from_critic, from_dmd)

    step.balance.batch_scale = noted
    step.step([batch(i, i + 1) for i in range(2)], 1)
    assert len(norms) == 2 and all(torch.equal(s, start) for s in seen)
    torch.testing.assert_close(step.balance.running_norms, torch.lerp(start, torch.stack(norms).mean(0), 0.05))


def test_by_item_every_item_counts_as_much_as_it_is_wrong(frozen):
    """`balance: item`: directions stay, sizes become critic_weight * (1 - p) times DMD's size for one item."""
    given = batch(0, 1, 2)
    x0 = frozen.family.encode(given.references) + 0.1
    plain, by_item = make(frozen), make(frozen, critic_weight=0.25, balance="item")
    before, wrong, _ = plain.critic_gradient(given, x0, 0)
    from_dmd = make(frozen, critic_weight=0.0)._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())[0]
    both, _ = by_item._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())
    after = both - from_dmd
    assert ((wrong > 0) & (wrong < 1)).all()
    sizes = after.flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes, 0.25 * wrong * from_dmd.norm() / 3**0.5, rtol=1e-3, atol=0)
    turned = torch.nn.functional.cosine_similarity(after.flatten(1), before.flatten(1))
    torch.testing.assert_close(turned, torch.ones(3), rtol=1e-3, atol=0)


def test_by_item_two_processes_weigh_as_one(frozen, monkeypatch):
    """And they keep the same sizes, so that a run may go on with another number of processes."""
    one, two = make(frozen, balance="item"), make(frozen, balance="item")
    critic, half = torch.ones(4, 3), torch.randn(2, 3, generator=seeded_generator("d"))
    alone = one.balance.batch_scale(critic, torch.cat([half, half]) / 4)
    monkeypatch.setattr(_gradient_balance, "global_batch_size", lambda size: 2 * size)
    monkeypatch.setattr(
        _gradient_balance, "norm_over_global_batch", lambda gradient: (2 * gradient.square().sum()).sqrt() / 2
    )  # both alike
    each = two.balance.batch_scale(critic[:2], half / 2)
    assert each / 2 == pytest.approx(alone)  # the learner takes the mean of the two gradients
    torch.testing.assert_close(two.balance.updated_norms(), one.balance.updated_norms())


def ratio_to_dmd(balance: GradientBalance, size: int, update: int) -> float:
    """The norm of the critic's gradient by DMD's, in one update of eight items in batches of this size."""
    stream, error = seeded_generator("ratio", update), torch.ones(8)
    critic, dmd = torch.randn(2, 8, 4, 2, 2, generator=stream)
    ours, theirs = [], []
    for k in range(0, 8, size):
        rows = slice(k, k + size)
        theirs.append(dmd[rows] / size)
        ours.append(balance.scaled(CriticFeedback(critic[rows], error[rows], {}), theirs[-1]))
    balance.end_update()
    return float(torch.cat(ours).norm() / torch.cat(theirs).norm())


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 4), (4, 2)])
def test_by_item_a_run_resumed_with_another_batch_size_keeps_the_share_of_dmd(before: int, after: int) -> None:
    old = GradientBalance("item", 3.0, has_dmd=True)
    for update in range(20):
        ratio_to_dmd(old, before, update)
    resumed = GradientBalance("item", 3.0, has_dmd=True)
    resumed.running_norms = old.running_norms.clone()  # what a checkpoint has
    for update in range(20, 24):
        expected = ratio_to_dmd(old, before, update)
        assert ratio_to_dmd(resumed, after, update) == pytest.approx(expected, rel=0.15)


def test_by_item_norms_of_the_same_batch_size_stay_as_they_are() -> None:
    balance = GradientBalance("item", 3.0, has_dmd=True)
    balance.running_norms = torch.tensor([3**0.5, 0.7])  # within rounding of the root of the batch size
    kept = balance.running_norms
    balance._fit_batch_size(float(torch.ones(3).norm()))
    assert balance.running_norms is kept


@pytest.mark.parametrize("size", [1, 2, 8])
def test_by_item_without_dmd_accumulated_batches_count_as_one(size: int) -> None:
    balance = GradientBalance("item", 3.0, has_dmd=False)
    gradient, error = torch.randn(8, 4, 2, 2, generator=seeded_generator("g")), torch.linspace(0.1, 0.8, 8)
    found = [
        balance.scaled(CriticFeedback(g, e, {}), torch.zeros_like(g)) / (8 // size)
        for g, e in zip(gradient.split(size), error.split(size))
    ]
    torch.testing.assert_close(torch.cat(found).flatten(1).norm(dim=1), 3.0 * error / 8)


def test_how_wrong_an_item_is_is_the_mean_over_its_questions(frozen):
    given = batch(0, 1, nothing=(1,))
    x0 = frozen.family.encode(given.references) + 0.1
    _, wrong, metrics = make(frozen).critic_gradient(given, x0, 0)
    p = (metrics["critic/p_edit"], metrics["critic/p_identity"])  # one edit question, two identity questions
    assert float(2 * wrong[0] + wrong[1]) == pytest.approx(3 - p[0] - 2 * p[1], rel=1e-4)
