"""`fake_samples: replay`: the fake score is trained on what the student made in its last updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.support.side_by_side as two
from npedit.nets import distributed
from npedit.steps import np_edit
from npedit.steps._replay import ReplayBuffer, Samples
from npedit.steps.np_edit import NpEditSettings, Step
from npedit.training.estimate import estimate
from tests.nets.test_distributed import assert_alike, assert_same_bits, weights
from tests.support.parts import batch, parts

CPU = torch.device("cpu")


def make_step(**settings: Any) -> Step:
    made = parts(critic=False)
    chosen = NpEditSettings(
        critic_weight=0, fake_samples="replay", **{"fake_updates": 5, "replay_updates": 3, **settings}
    )
    return Step(chosen, made, made.create_trainable("student", 0), 10, 0)


def test_no_sample_is_made_anew_and_one_batch_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = make_step(), []
    real = np_edit.generate_few_step
    monkeypatch.setattr(np_edit, "generate_few_step", lambda *args: calls.append(1) or real(*args))
    assert step.batches_per_update(step.settings) == 1
    step.step([batch(0, 1)], 0)
    assert len(calls) == 1
    fresh = NpEditSettings(fake_updates=5)
    assert fresh.fake_samples == "fresh" and step.batches_per_update(fresh) == 5


def test_the_turns_go_through_the_last_updates_with_new_noise_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    step, made, trained_on = make_step(), [], []
    real = np_edit.generate_few_step
    monkeypatch.setattr(np_edit, "generate_few_step", lambda *args: made.append(real(*args)) or made[-1])
    loss = np_edit.dmd.fake_score_loss
    monkeypatch.setattr(
        np_edit.dmd, "fake_score_loss", lambda v, x0, eps: trained_on.append((x0, eps)) or loss(v, x0, eps)
    )
    for update in range(4):
        trained_on.clear()
        step.step([batch(update, update + 1)], update)
    wanted = [made[3], made[2], made[1], made[3], made[2]]  # the last three updates, from the newest, again and again
    assert all(torch.equal(x0, x) for (x0, _), x in zip(trained_on, wanted, strict=True))
    assert not torch.equal(trained_on[0][1], trained_on[3][1])
    assert [s.captions for s in step.replay.local_samples(0)] == [batch(3, 4).target_captions]


def test_no_more_updates_are_kept_than_the_turns_go_back() -> None:
    """The third turn uses the samples of two updates ago: older ones would only cost memory."""
    many, three = make_step(fake_updates=3, replay_updates=64), make_step(fake_updates=3, replay_updates=3)
    for update in range(5):
        for step in (many, three):
            step.step([batch(update, update + 1)], update)
    assert len(many.replay.local_captions()) == 3
    assert sorted(many.replay.state()) == sorted(three.replay.state())
    for a, b in zip(many.learners["fake"].net.parameters(), three.learners["fake"].net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_are_kept_apart() -> None:
    step = make_step()
    step.step([batch(0, 1), batch(2, 3)], 0)
    captions = [s.captions for s in step.replay.local_samples(0)]
    assert captions == [batch(0, 1).target_captions, batch(2, 3).target_captions]


def test_samples_that_are_not_finite_are_not_kept() -> None:
    kept = ReplayBuffer(2, CPU)
    assert kept.local_samples(1) == []
    kept.add([Samples(torch.ones(1, 2, 1, 1), ("a",))])
    kept.add([Samples(torch.full((1, 2, 1, 1), torch.nan), ("b",))])
    assert [s.captions for s in kept.local_samples(0)] == [("a",)]


def test_the_state_comes_back() -> None:
    kept, other = ReplayBuffer(2, CPU), ReplayBuffer(2, CPU)
    for i in range(3):
        kept.add([Samples(torch.full((2, 1, 1, 1), float(i + k)), (f"caf\u00e9 {i}", f"{k}")) for k in range(2)])
    other.load_state({**kept.state(), "sizes": torch.ones(2)})
    for age in range(2):
        for a, b in zip(kept.local_samples(age), other.local_samples(age), strict=True):
            assert a.captions == b.captions and torch.equal(a.x0, b.x0)


# ---------------------------------------------------------------------------------------------- several processes


def recipe() -> Any:
    settings = {"student": two.STUDENT, "fake": two.FAKE, "fake_updates": 3, "steps": 2, "critic_weight": 0,
                "fake_samples": "replay"}  # fmt: skip
    stages = [{"step": "np_edit", "updates": 4, "batch_size": 4, "settings": settings}]
    return two.recipe(stages=stages)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("replay") / "run"
    two.train(run, recipe())
    return run


def test_a_stopped_run_repeats_itself(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        two.train(tmp_path / "run", recipe(), (0, 2), "stop")
    two.train(tmp_path / "run", recipe())
    assert any("replay." in name for name in weights(alone, 4))
    assert_same_bits(weights(tmp_path / "run", 4), weights(alone, 4))


@pytest.mark.slow
def test_two_processes_go_on_from_one(alone: Path, tmp_path: Path) -> None:
    """After two updates of one process: the samples of the global batch are shared by two."""
    with pytest.raises(SystemExit):
        two.train(tmp_path / "run", recipe(), (0, 2), "stop")
    ends = two.together(tmp_path / "ends", two.train, tmp_path / "run", recipe())
    assert all("value" in end for end in ends), ends
    assert_alike(tmp_path / "run", alone)


def replayed_rows() -> list[list[str]]:
    with distributed.process_group():
        kept = ReplayBuffer(2, CPU)
        kept.load_state(whole_state())
        return [list(s.captions) for s in kept.local_samples(0)]


def whole_state() -> dict[str, Tensor]:
    kept = ReplayBuffer(2, CPU)
    kept._kept.append(
        [Samples(torch.zeros(4, 1, 1, 1), ("a", "b", "c", "d")), Samples(torch.zeros(3, 1, 1, 1), ("e",) * 3)]
    )
    return kept.state()


def test_each_process_gets_its_rows_of_the_global_batch(tmp_path: Path) -> None:
    """A batch of three cannot be shared by two and is left out."""
    ends = two.together(tmp_path, replayed_rows)
    assert [end["value"] for end in ends] == [[["a", "b"]], [["c", "d"]]]


def test_the_estimate_counts_an_update_with_replay() -> None:
    assert estimate(recipe()).peak.total > 0
