"""The warm-up: only the student moves, towards the reference, at the editor's own times, without the edit's words."""

from __future__ import annotations

import pytest
import torch

from npedit import flow
from npedit.errors import UserError
from npedit.nets.learner import LearnerSettings
from npedit.recipe.config import validate_settings
from npedit.steps.reference_copy import CopySettings, Step
from tests.support.parts import batch, nets, parts, weights


@pytest.fixture
def frozen():
    return parts(critic=False)


def make(frozen, seed: int = 0, updates: int = 10, **settings) -> Step:
    return Step(CopySettings(**settings), frozen, frozen.family.trainable_net(), updates, seed)


def watched(frozen, monkeypatch) -> list[dict]:
    calls, real = [], frozen.family.velocity

    def noted(net, x, t, text, references=()):
        v = real(net, x, t, text, references)
        calls.append({"net": net, "x": x, "t": t, "text": text, "references": references, "v": v})
        return v

    monkeypatch.setattr(frozen.family, "velocity", noted)
    return calls


def test_only_the_student_moves(frozen):
    step = make(frozen)
    fixed, before = {n: weights(net) for n, net in nets(frozen).items()}, weights(step.learners["student"].net)
    metrics = step.step([batch(0, 1, 2)], 0)
    assert set(step.learners) == {"student"} and metrics["grad_norm/student"] > 0
    assert not torch.equal(weights(step.learners["student"].net), before)
    for name, net in nets(frozen).items():
        assert torch.equal(weights(net), fixed[name]) and all(p.grad is None for p in net.parameters()), name


def test_it_needs_neither_critic_nor_captions_of_the_wanted_result():
    assert Step.requirements(CopySettings()) == {"source_caption"}
    assert Step.batches_per_update(CopySettings()) == 1


def test_the_loss_is_flow_matching_towards_the_reference(frozen, monkeypatch):
    """|| v - (eps - reference) ||^2 at x_t = (1 - t) reference + t eps, with the reference's tokens there to be
    read."""
    step, given = make(frozen), batch(0, 1, 2)
    calls = watched(frozen, monkeypatch)
    loss = step.step([given], 0)["loss/copy"]
    (call,) = calls
    latents = frozen.family.encode(given.references)
    assert len(call["references"]) == 1 and torch.equal(call["references"][0], latents)
    t = call["t"].view(-1, 1, 1, 1)
    eps = (call["x"] - (1 - t) * latents) / t
    assert eps.std() == pytest.approx(1, abs=0.2)
    assert loss == pytest.approx(float((call["v"] - (eps - latents)).square().mean().detach()), rel=1e-4)


def test_the_text_is_the_references_caption_and_never_the_instruction(frozen, monkeypatch):
    step, given = make(frozen), batch(0, 1, 2)
    prompts, real = [], frozen.family.encode_text
    monkeypatch.setattr(frozen.family, "encode_text", lambda p: prompts.append(tuple(p)) or real(p))
    step.step([given], 0)
    assert prompts == [given.source_captions]


def test_times_are_those_of_the_few_step_editor(frozen, monkeypatch):
    step, calls = make(frozen), watched(frozen, monkeypatch)
    with torch.no_grad():  # no backward is needed to see the times
        monkeypatch.setattr(step.learners["student"], "update", lambda losses: [loss() for loss in losses] and {})
        for update in range(40):
            step.step([batch(0, 1, 2, 3)], update)
    times = torch.cat([c["t"] for c in calls])
    schedule = flow.few_step_times(4, frozen.family.noise_shift(16, 16))
    assert set(times.tolist()) == set(schedule.tolist())
    shares = [float((times == t).float().mean()) for t in schedule]
    assert shares[0] == pytest.approx(0.5 + 0.125, abs=0.12)
    assert all(s == pytest.approx(0.125, abs=0.08) for s in shares[1:])


def test_it_learns_to_copy_by_reading_the_reference(frozen):
    """The loss falls, and the reference comes to change what the net says; one that ignored it could not copy."""
    given = batch(0, 1, 2, 3)
    step = make(frozen, updates=50, student=LearnerSettings(lr=4e-3))
    net, family = step.learners["student"].net, frozen.family
    latents, text = family.encode(given.references), family.encode_text(given.source_captions)
    x, t = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9)), torch.ones(4)

    def influence() -> float:
        with torch.no_grad():
            right, other = (family.velocity(net, x, t, text, (r,)) for r in (latents, latents.roll(1, 0)))
        return float((right - other).norm())

    before = influence()
    losses = [step.step([given], update)["loss/copy"] for update in range(50)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert influence() > before


def test_equal_seeds_give_equal_weights_bit_for_bit():
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        step = make(parts(critic=False), seed)
        for update in range(2):
            torch.manual_seed(noise)
            step.step([batch(0, 1), batch(2, 3)], update)
        found.append(weights(step.learners["student"].net))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_batches_of_one_update_have_noise_of_their_own(frozen, monkeypatch):
    calls, step = watched(frozen, monkeypatch), make(frozen)
    step.step([batch(0), batch(0)], 0)
    step.step([batch(0)], 1)
    assert not torch.allclose(calls[0]["x"], calls[1]["x"]) and not torch.allclose(calls[0]["x"], calls[2]["x"])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"stepps": 4}, {"student": {"lr": -1}}])
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError):
        validate_settings(CopySettings, wrong, "stages.0.settings")
