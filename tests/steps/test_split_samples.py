"""Flow-GRPO with `split_samples`: each policy update has its own samples, the same with any number of processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from npedit.nets.distributed import merge_metrics
from npedit.steps.base import Parts
from npedit.steps.flow_grpo import Trajectories
from tests.steps.test_flow_grpo import gradient, make, sampled
from tests.support.parts import nudge, parts


@pytest.fixture
def frozen() -> Parts:
    return parts()


def test_split_samples_are_used_once_each(frozen: Parts) -> None:
    step = make(frozen, policy_updates=2, split_samples=True, group=4)
    found, _ = sampled(step)
    parts_used = [used[0] for used in step._samples_of_updates([found], 0)]
    rows = torch.cat([p.states[0] for p in parts_used])
    assert [len(p.advantages) for p in parts_used] == [4, 4]
    assert sorted(rows.sum((1, 2, 3)).tolist()) == sorted(found.states[0].sum((1, 2, 3)).tolist())
    whole = [used[0] for used in make(frozen)._samples_of_updates([found], 0)]
    assert len(whole) == 2 and all(used is found for used in whole)


@pytest.mark.parametrize(("group", "items", "updates"), [(3, 4, 3), (2, 2, 2)])
def test_two_processes_split_the_samples_of_the_global_batch_as_one_does(
    frozen: Parts, monkeypatch: pytest.MonkeyPatch, group: int, items: int, updates: int
) -> None:
    """The same samples in the same policy update, the same gradient and the same figures, also where a process has
    unequal numbers of samples in the policy updates, or none."""
    step = make(frozen, kl_weight=0.5, policy_updates=updates, split_samples=True, group=group)
    found, _ = sampled(step, tuple(range(items)))
    nudge(step.learners["student"].net)  # ratios and the KL are not trivial
    columns = torch.arange(group * items).view(group, items).chunk(2, 1)
    halves = [found.select(rows.flatten()) for rows in columns]

    def parts_of(samples: Trajectories, update: int) -> list[tuple]:
        """Of each policy update: the samples with weight, the gradient, the figures."""
        out = []
        for (used,) in step._samples_of_updates([samples], update):
            figures: list[dict] = []
            slope = gradient(step, [partial(step._loss, used, k, figures) for k in range(2)])
            seen = used.states[1].sum((1, 2, 3)).tolist() if used.weight else []
            out.append((seen, slope, {k: sum(f[k] for f in figures) / 2 for k in figures[0]}))
        return out

    numbers = set()
    for update in range(3):
        whole, shares = parts_of(found, update), []
        with monkeypatch.context() as two:
            two.setattr("npedit.nets.distributed.world_size", lambda: 2)
            for number, half in enumerate(halves):
                two.setattr("npedit.steps.flow_grpo.rank", lambda number=number: number)
                shares.append(parts_of(half, update))
        for one, first, second in zip(whole, *shares, strict=True):
            assert sorted(first[0] + second[0]) == sorted(one[0])
            numbers |= {len(first[0]), len(second[0])}
            torch.testing.assert_close((first[1] + second[1]) / 2, one[1], rtol=1e-3, atol=1e-4 * float(one[1].norm()))
            assert merge_metrics([first[2], second[2]]) == pytest.approx(one[2], rel=1e-3, abs=1e-5)
    assert len(numbers) > 1 and (0 in numbers or items > 2)
