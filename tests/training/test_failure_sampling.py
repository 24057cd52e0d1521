"""Sampling by failure: weights from the critic's errors, the same in all processes and after a stop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tests.support.side_by_side as two
from npedit.data import Batch, toy
from npedit.errors import UserError
from npedit.nets import distributed
from npedit.questions import EDIT_TYPES, IDENTITY_EDIT
from npedit.recipe.config import FailureSampling, Recipe
from npedit.runs import checkpoint
from npedit.steps.base import ItemErrors
from npedit.steps.np_edit import NpEditSettings, Step
from npedit.training import trainer
from npedit.training.failure_sampling import ErrorRecord, FailureSampler, check_failure_sampling
from npedit.training.parts import build_source
from tests.support.parts import batch, parts

FLOOR = 0.25


def sampler(items: int = 0, **settings) -> FailureSampler:
    return FailureSampler(FailureSampling(floor=FLOOR, **settings), toy.Source(toy.Settings(items=items), 0))


def saw(*items: tuple[str, str, float]) -> SimpleNamespace:
    """A step after an update with these items (id, edit type, error)."""
    ids, types, errors = zip(*items)
    return SimpleNamespace(item_errors=[ItemErrors(ids, types, list(errors))])


# ---------------------------------------------------------------------------------------------------------- weights


def test_weights_are_those_of_known_probabilities():
    """weight = floor + (1 - floor)(1 - p)."""
    made = sampler()
    made.observe(saw(("a", "add", 0.9), ("b", "remove", 0.0), ("c", "move", 1.0)))
    made.before_update(0)
    found = {kind: made.weight("new", kind) for kind in ("add", "remove", "move", "style")}
    assert found == pytest.approx({"add": FLOOR + 0.75 * 0.9, "remove": FLOOR, "move": 1.0, "style": 1.0})


def test_shares_of_the_items_follow_the_errors_and_keep_the_floor():
    """Of three types, the one that always succeeds has floor / (sum of weights) of the items."""
    made = sampler()
    made.data = toy.Source(toy.Settings(edit_types=("add", "remove", "move"), nothing_share=0.0), 0)
    made.observe(saw(("a", "add", 0.5), ("b", "remove", 0.0), ("c", "move", 1.0)))
    made.before_update(0)
    found = Counter(kind for i in range(40) for kind in made.data.batch(i, 24).edit_types)
    weights = {"add": 0.625, "remove": 0.25, "move": 1.0}
    for kind, weight in weights.items():
        share = weight / 1.875
        assert abs(found[kind] - 960 * share) < 4 * (960 * share * (1 - share)) ** 0.5, found


def test_errors_are_running_means():
    record = ErrorRecord()
    for error in (1.0, 0.0):
        record.add("a", "add", error, with_item=True)
    assert record.types["add"] == pytest.approx(0.98) and record.items["a"] == pytest.approx(0.5)


def test_an_item_of_a_finite_set_has_its_own_error():
    finite, endless = sampler(items=5), sampler()
    for made in (finite, endless):
        made.observe(saw(("0/1", "add", 1.0), ("0/2", "add", 0.0)))
        made.before_update(0)
    assert (finite.weight("0/1", "add"), finite.weight("0/2", "add")) == (1.0, FLOOR)
    assert finite.weight("0/3", "add") == endless.weight("0/1", "add") == pytest.approx(FLOOR + 0.75 * 0.98)
    assert not endless.record.items


def test_an_error_that_is_not_a_number_is_left_out():
    made = sampler(items=5)
    made.observe(saw(("a", "add", float("nan"))))
    assert made.record == ErrorRecord()


def test_an_identity_edit_says_nothing_about_the_items_own_edit():
    made = sampler(items=5)
    made.observe(saw(("a", IDENTITY_EDIT, 1.0)))
    assert made.record == ErrorRecord({IDENTITY_EDIT: 1.0})


@pytest.mark.parametrize("kind", EDIT_TYPES)
@pytest.mark.parametrize("items", [0, 5])
def test_what_succeeds_comes_less_often_whatever_its_type(kind, items):
    made = sampler(items=items)
    for _ in range(300):
        made.observe(saw(("0/1", kind, 0.0), ("0/2", kind, 0.0)))
    made.before_update(0)
    assert made.weight("0/1", kind) == pytest.approx(FLOOR, abs=0.01)


def test_weights_change_at_their_updates_only():
    made, calls = sampler(every=3), []
    made.data.reweigh = lambda weight: calls.append(weight("a", "add"))
    for done in range(7):
        made.before_update(done)
        made.observe(saw(("a", "add", 1.0 if done < 3 else 0.0)))
    errors = [1.0, 1.0 * 0.98**3]  # after three errors of 1, and after three more of 0
    assert calls == pytest.approx([FLOOR + 0.75 * error for error in errors])


def test_without_the_setting_nothing_is_observed():
    made = FailureSampler(None, toy.Source(toy.Settings(), 0))
    made.observe(saw(("a", "add", 1.0)))
    made.before_update(0)
    assert made.record == ErrorRecord() and not made.state() and not made.metrics()


def test_the_state_survives_a_checkpoint():
    made, other = sampler(items=9, every=2), sampler(items=9, every=2)
    made.observe(saw(("0/1", "add", 0.7), ("0/2", "move", 0.1)))
    made.before_update(0)
    made.observe(saw(("0/1", "add", 0.3)))
    other.load_state({name: tensor.clone() for name, tensor in made.state().items()})
    assert other.record == made.record and other.in_use == made.in_use != made.record
    assert [other.data.batch(i, 4).ids for i in range(5)] == [made.data.batch(i, 4).ids for i in range(5)]
    fresh = sampler()
    fresh.load_state({})  # a checkpoint of a run before the setting
    assert fresh.record == ErrorRecord()


# ---------------------------------------------------------------------------------------------- what a step reports


def test_np_edit_reports_the_critics_error_of_each_item():
    frozen = parts()
    settings = NpEditSettings(dmd_weight=0.0, ramp_updates=0)
    step = Step(settings, frozen, frozen.family.trainable_net(), 1, 0)
    first, second = batch(0, 1, nothing=(1,)), batch(2, 3)
    said, real = [], step.critic_gradient
    step.critic_gradient = lambda *given: said.append(real(*given)) or said[-1]
    step.step([first, second], 0)
    wanted = [(b.ids, b.edit_types, f.error.tolist()) for b, f in zip((first, second), said, strict=True)]
    assert [tuple(errors) for errors in step.item_errors] == wanted
    assert all(0 < error < 1 for _, _, errors in wanted for error in errors)
    step.step([second], 1)
    assert [e.ids for e in step.item_errors] == [second.ids]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_recipe_without_a_critic_or_with_a_stream_is_refused():
    by_failure = {"save_every": 1, "sample_items": 2, "steps": 2, "by_failure": {}}
    copying = {"step": "reference_copy", "updates": 2, "batch_size": 4, "settings": {"steps": 2}}
    alone = two.recipe(trainer=by_failure, stages=[copying])
    with pytest.raises(UserError, match="trainer.by_failure: expected a stage whose critic"):
        check_failure_sampling(alone, build_source(alone))
    made = two.recipe(trainer=by_failure)
    check_failure_sampling(made, build_source(made))
    with pytest.raises(UserError, match="trainer.by_failure: expected data whose items can be chosen"):
        check_failure_sampling(made, object())
    check_failure_sampling(two.recipe(), object())


# -------------------------------------------------------------------------------------------------------- whole runs


def recipe(**data) -> Recipe:
    editing = {"student": two.STUDENT, "fake": two.FAKE, "fake_updates": 2, "steps": 2, "ramp_updates": 0}
    return two.recipe(
        data={"name": "toy", "items": 12, **data},
        stages=[{"step": "np_edit", "updates": 5, "batch_size": 4, "settings": editing}],
        trainer={"save_every": 1, "keep": 9, "sample_items": 2, "steps": 2, "evaluate_every": 0, "sample_every": 0,
                 "by_failure": {"floor": 0.2, "every": 2}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[str, ...]]]:
    """A run that nothing interrupted, and the ids of its batches by their numbers."""
    ids: dict[int, tuple[str, ...]] = {}

    def source(made: Recipe) -> toy.Source:
        opened = build_source(made)
        real = opened.batch

        def noted(index: int, *rest: int) -> Batch:
            found = real(index, *rest)
            ids[index] = found.ids
            return found

        opened.batch = noted
        return opened

    run = tmp_path_factory.mktemp("by-failure") / "run"
    trainer.train(recipe(), run, parts=two.parts, source=source)
    return run, ids


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / "checkpoint-000005")[0]


@pytest.mark.parametrize("at", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4))])
def test_a_stopped_run_repeats_itself_bit_for_bit(alone, tmp_path: Path, at: int) -> None:
    with pytest.raises(SystemExit):
        two.train(tmp_path / "run", recipe(), (0, at), "stop")
    two.train(tmp_path / "run", recipe())
    found, wanted = tensors(tmp_path / "run"), tensors(alone[0])
    assert found.keys() == wanted.keys() and any(name.startswith("by_failure/") for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_items_come_after_the_first_change_of_the_weights(alone) -> None:
    """Two batches an update, and a change every two updates: at batch 4 and at batch 8."""
    run, ids = alone
    plain = build_source(recipe())
    before = {i: plain.batch(i, 4).ids for i in range(10)}
    assert all(ids[i] == before[i] for i in range(4))
    assert [ids[i] for i in range(4, 10)] != [before[i] for i in range(4, 10)]
    rows = checkpoint.read_rows(run / checkpoint.METRICS)
    logged = [[k for k in row if k.startswith("by_failure/error/")] for row in rows]
    assert not logged[2] and logged[3] and logged[5]


def observed(folder: str) -> list[str]:
    """What two processes have in their records after an update with two batches of a half each."""
    with distributed.process_group():
        made, mine = sampler(items=9), distributed.rank()
        first = ItemErrors((f"0/{mine}",), ("add",), [float(mine)])
        second = ItemErrors((f"0/{2 + mine}",), ("add",), [0.5])
        made.observe(SimpleNamespace(item_errors=[first, second]))
        return [json.dumps(made.record.types), json.dumps(made.record.items)]


def test_two_processes_have_the_record_of_one(tmp_path: Path) -> None:
    one = sampler(items=9)
    one.observe(saw(("0/0", "add", 0.0), ("0/1", "add", 1.0), ("0/2", "add", 0.5), ("0/3", "add", 0.5)))
    ends = two.together(tmp_path, observed, "")
    wanted = [json.dumps(one.record.types), json.dumps(one.record.items)]
    assert [end.get("value") for end in ends] == [wanted, wanted], ends
