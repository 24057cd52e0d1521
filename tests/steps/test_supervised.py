"""The supervised bound: its loss written out, what it moves, and that pairs go to it and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from npedit import flow
from npedit.data import PairedBatch
from npedit.errors import UserError
from npedit.generator import sample_noise, sample_training_times, seeded_generator
from npedit.recipe.config import Recipe, make_recipe, validate_settings
from npedit.runs import checkpoint
from npedit.steps.supervised import Step, SupervisedSettings
from npedit.training import trainer
from tests.support.parts import batch, nets, parts, weights


@pytest.fixture
def frozen():
    return parts(critic=False)


def make(frozen, **settings) -> Step:
    return Step(SupervisedSettings(**settings), frozen, frozen.family.trainable_net(), 10, 7)


def paired(*numbers: int) -> PairedBatch:
    given = batch(*numbers)
    return PairedBatch(**vars(given), edited=1 - given.references)


def recipe(step: str, data: str) -> Recipe:
    settings = {"steps": 1} | ({"fake_updates": 1} if step == "np_edit" else {})
    stage = {"step": step, "updates": 1, "batch_size": 2, "settings": settings}
    return make_recipe(
        {"name": "small", "family": {"name": "flux"}, "critic": {"name": "llava_onevision"}, "data": {"name": data},
         "stages": [stage], "trainer": {"steps": 1, "sample_items": 1}}
    )  # fmt: skip


@pytest.mark.parametrize("update", [0, 1, 2, 3, 4])
def test_the_loss_is_the_written_out_one(frozen, update: int) -> None:
    step, given, family = make(frozen), paired(0, 1, 2), frozen.family
    schedule = flow.few_step_times(4, family.noise_shift(16, 16))
    times = sample_training_times(schedule, seeded_generator(7, "times", update))
    references, wanted = family.encode(given.references), family.encode(given.edited)
    noise = sample_noise(references, len(times), seeded_generator(7, "supervised", update, 0))
    text, net = family.encode_text(given.instructions), step.learners["student"].net
    with torch.no_grad():
        x0 = noise[0] - family.velocity(net, noise[0], torch.ones(3), text, (references,))
        if len(times) == 2:
            t = times[1]
            x = (1 - t) * x0 + t * noise[1]
            x0 = x - t * family.velocity(net, x, torch.full((3,), t), text, (references,))
    loss = step.step([given], update)["loss/supervised"]
    assert loss == pytest.approx(float((x0 - wanted).square().mean()), rel=1e-4)


def test_flow_matching_is_the_written_out_one(frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """|| v - (eps - edited) ||^2 at a time moved by the base's shift, with the reference there to be read."""
    step, given, family, calls = make(frozen, loss="flow"), paired(0, 1, 2), frozen.family, []
    real = family.velocity

    def noted(net, x, t, text, references=()):
        calls.append((x, t, references, real(net, x, t, text, references)))
        return calls[-1][-1]

    monkeypatch.setattr(family, "velocity", noted)
    loss = step.step([given], 0)["loss/supervised"]
    ((x, t, (latents,), v),) = calls
    even = torch.rand(3, generator=seeded_generator(7, "supervised", 0, 0))
    torch.testing.assert_close(t, flow.shift_times(even, family.noise_shift(16, 16)))
    assert torch.equal(latents, family.encode(given.references))
    wanted, s = family.encode(given.edited), t.view(-1, 1, 1, 1)
    eps = (x - (1 - s) * wanted) / s
    assert eps.std() == pytest.approx(1, abs=0.2)
    assert loss == pytest.approx(float((v - (eps - wanted)).square().mean().detach()), rel=1e-4)


def test_both_unrollings_are_met_above(frozen) -> None:
    schedule = flow.few_step_times(4, frozen.family.noise_shift(16, 16))
    assert {len(sample_training_times(schedule, seeded_generator(7, "times", u))) for u in range(5)} == {1, 2}


@pytest.mark.parametrize("loss", ["unrolled", "flow"])
def test_only_the_student_moves_and_the_loss_falls(frozen, loss: str) -> None:
    step = make(frozen, student={"lr": 4e-3}, steps=1, loss=loss)
    fixed = {n: weights(net) for n, net in nets(frozen).items()}
    losses = [step.step([paired(0, 1)], update)["loss/supervised"] for update in range(30)]
    assert set(step.learners) == {"student"} and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, net in nets(frozen).items():
        assert torch.equal(weights(net), fixed[name]), name


def test_it_follows_the_edited_image(frozen) -> None:
    """Fault it guards against: a bound that is regressed on the reference."""
    given, found = paired(0, 1), []
    for edited in (given.edited, given.references):
        step = make(frozen)
        found.append(step.step([PairedBatch(**vars(batch(0, 1)), edited=edited)], 0)["loss/supervised"])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_a_batch_without_pairs_is_refused(frozen) -> None:
    with pytest.raises(TypeError, match="toy_pairs"):
        make(frozen).step([batch(0, 1)], 0)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"stepps": 4}, {"student": {"lr": -1}}, {"loss": "l1"}])
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(UserError):
        validate_settings(SupervisedSettings, wrong, "stages.0.settings")


@pytest.mark.parametrize(
    ("step", "data", "said"),
    [
        ("np_edit", "toy_pairs", "every stage trains without pairs; got toy_pairs, which has them; use toy"),
        ("reference_copy", "toy_pairs", "every stage trains without pairs"),
        ("supervised", "toy", "stages.0: supervised expected pairs; got data.name toy; use toy_pairs"),
    ],
)
def test_pairs_go_to_the_baseline_and_nowhere_else(tmp_path: Path, step: str, data: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer.train(recipe(step, data), tmp_path / "run", parts=lambda r: parts())
    assert not checkpoint.is_run(tmp_path / "run")


@pytest.mark.parametrize(("step", "data", "no_pairs"), [("supervised", "toy_pairs", False), ("np_edit", "toy", True)])
def test_the_manifest_says_whether_pairs_were_used(tmp_path: Path, step: str, data: str, no_pairs: bool) -> None:
    run = trainer.train(recipe(step, data), tmp_path / "run", parts=lambda r: parts())
    assert checkpoint.read_manifest(run)["no_pairs"] is no_pairs
    card = (run / "final" / "README.md").read_text()
    assert ("a supervised baseline, not NP-Edit" in card) is not no_pairs and ("no-pairs" in card) is no_pairs
