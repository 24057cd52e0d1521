"""Flow-GRPO's step: its gradient written out, the reward, the frozen start, and that it repeats itself after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from npedit import flow, grpo
from npedit.data import PairedBatch
from npedit.errors import UserError
from npedit.families.base import ReferenceKVCache
from npedit.recipe.config import Recipe, make_recipe, validate_settings
from npedit.runs import checkpoint
from npedit.scoring.critic_scores import CriticScores, score_with_critic
from npedit.steps.base import Parts
from npedit.steps.flow_grpo import FlowGrpoSettings, Step, Trajectories
from npedit.training import trainer
from tests.support.parts import batch, nets, nudge, parts, trained, weights

SMALL = {"sampling_steps": 3, "group": 3}


@pytest.fixture
def frozen() -> Parts:
    return parts()


def make(frozen: Parts, seed: int = 0, **settings) -> Step:
    return Step(FlowGrpoSettings(**(SMALL | settings)), frozen, frozen.create_trainable("student", 0), 10, seed)


def sampled(step: Step, numbers: tuple[int, ...] = (0, 1), update: int = 0) -> tuple[Trajectories, list[dict]]:
    metrics: list[dict] = []
    (found,) = step._with_advantages([step._sample(batch(*numbers), update, 0, metrics)])
    return found, metrics


def gradient(step: Step, losses: list) -> torch.Tensor:
    """The gradient of the losses' mean at the student."""
    net = step.learners["student"].net
    found = torch.autograd.grad(sum(loss() for loss in losses) / len(losses), trained(net), allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, trained(net))])


def test_only_the_student_moves(frozen: Parts) -> None:
    step = make(frozen)
    fixed, before = {n: weights(net) for n, net in nets(frozen).items()}, weights(step.learners["student"].net)
    metrics = step.step([batch(0, 1)], 0)
    assert set(step.learners) == {"student"} and step.learners["student"].updates == 2
    assert not torch.equal(weights(step.learners["student"].net), before)
    for name, net in nets(frozen).items():
        assert torch.equal(weights(net), fixed[name]) and all(p.grad is None for p in net.parameters()), name
    assert {"reward/mean", "reward/group_std", "critic/p_edit", "critic/p_identity", "critic/p_yes/recolour",
            "loss/policy", "loss/kl", "policy/outside_clip", "grad_norm/student"} <= set(metrics)  # fmt: skip


def test_trajectories_are_the_sdes_with_the_editors_own_reading_of_references(frozen: Parts) -> None:
    """Each state follows from the one before it; groups share an item, not noise."""
    step = make(frozen)
    found, _ = sampled(step)
    family, given, net = frozen.family, batch(0, 1), step.learners["student"].net
    schedule = flow.few_step_times(3, family.noise_shift(16, 16)).tolist()
    assert found.times == pytest.approx(schedule) and len(found.states) == 3 and len(found.before) == 2
    latents, text = family.encode(given.references), family.encode_text(given.instructions)
    for k in range(2):
        for sample in range(3):
            rows = slice(2 * sample, 2 * sample + 2)
            x, t, after = found.states[k][rows], found.times[k], found.times[k + 1]
            with torch.no_grad():
                v = family.velocity(net, x, torch.full((2,), t), text, (latents,))
            mean, std = grpo.sde_step(x, v, t, after, 0.7)
            noise = (found.states[k + 1][rows] - mean) / std
            assert noise.std() == pytest.approx(1, abs=0.2)
            wanted = Normal(mean, std).log_prob(found.states[k + 1][rows]).mean((1, 2, 3))
            torch.testing.assert_close(found.before[k][rows], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found.states[0][:2], found.states[0][2:4])


def test_isolated_references_are_read_once_for_all_steps_of_a_trajectory(
    frozen: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen.family.isolate_references()
    step, given = make(frozen), []
    nudge(step.learners["student"].net)
    velocity = frozen.family.velocity

    def note(net: Any, x: Any, t: Any, text: Any, references: Any) -> torch.Tensor:
        given.append(references)
        return velocity(net, x, t, text, references)

    monkeypatch.setattr(frozen.family, "velocity", note)
    samples, _ = sampled(step)
    caches = [found for found in given if isinstance(found, ReferenceKVCache)]
    assert len(caches) == SMALL["sampling_steps"] and all(cache is caches[0] for cache in caches)
    monkeypatch.setattr(frozen.family, "velocity", velocity)
    mean, std = step._policy_step(samples, 0)  # reads the references again, with gradient
    again = grpo.log_prob(samples.states[samples.trained[0] + 1], mean.detach(), std)
    torch.testing.assert_close(again, samples.before[0], rtol=1e-3, atol=1e-3)


def test_the_reward_is_the_product_of_the_critics_answers_on_what_the_last_step_draws(
    frozen: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make(frozen)
    seen: list[torch.Tensor] = []
    real = frozen.family.decode
    monkeypatch.setattr(frozen.family, "decode", lambda x: seen.append(x) or real(x))
    found, (rewards, scores) = sampled(step)
    given, (x0,) = batch(0, 1), seen
    family, x, t = frozen.family, found.states[-1], found.times[-1]
    with torch.no_grad():
        v = family.velocity(step.learners["student"].net, x, torch.full((6,), t), found.text, (found.references,))
    torch.testing.assert_close(x0, x - t * v, atol=1e-5, rtol=1e-5)
    wanted = [
        score_with_critic(frozen.critic, "short", given, real(x0[i : i + 2])).joint_probability() for i in (0, 2, 4)
    ]
    assert rewards["reward/mean"] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
    torch.testing.assert_close(found.advantages.view(3, 2), grpo.advantages(torch.stack(wanted)), atol=0.02, rtol=0.02)
    assert set(scores) == {"critic/p_edit", "critic/p_identity", "critic/p_yes/recolour", "critic/p_yes/remove"}


def test_the_gradient_is_the_written_out_one(frozen: Parts) -> None:
    """At the weights that sampled, ratios are 1: -mean advantage * grad log p; away from the start, the KL's too."""
    step = make(frozen, kl_weight=0.5, policy_updates=1)
    nudge(step.learners["student"].net)  # the start stays where it was
    found, _ = sampled(step)
    losses = [lambda k=k: step._loss(found, k, []) for k in range(2)]
    family, net, start = frozen.family, step.learners["student"].net, frozen.family.base

    def written(k: int) -> torch.Tensor:
        x, t = found.states[k], torch.full((6,), found.times[k])
        step_to = (found.times[k], found.times[k + 1], 0.7)
        mean, std = grpo.sde_step(x, family.velocity(net, x, t, found.text, (found.references,)), *step_to)
        with torch.no_grad():
            other = grpo.sde_step(x, family.velocity(start, x, t, found.text, (found.references,)), *step_to)[0]
        now = Normal(mean, std).log_prob(found.states[k + 1]).mean((1, 2, 3))
        kl = torch.distributions.kl_divergence(Normal(mean, std), Normal(other, std)).mean()
        return -(found.advantages * now).mean() + 0.5 * kl

    wanted = gradient(step, [lambda k=k: written(k) for k in range(2)])
    got = gradient(step, losses)
    assert wanted.norm() > 0
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


def test_the_reference_policy_is_the_start_and_stays_it(frozen: Parts) -> None:
    step = make(frozen)
    first, _ = sampled(step)
    for mean, (state, t, after) in zip(first.reference, zip(first.states, first.times, first.times[1:])):
        with torch.no_grad():
            v = step._velocity(state, t, first.text, (first.references,))
        torch.testing.assert_close(mean, grpo.sde_step(state, v, t, after, 0.7)[0], atol=1e-6, rtol=1e-6)
    before = weights(step.learners["student"].net)
    nudge(step.learners["student"].net)
    away = weights(step.learners["student"].net)
    second, _ = sampled(step)
    assert torch.equal(weights(step.learners["student"].net), away)  # put back after the look
    metrics: list[dict] = []
    assert float(step._loss(second, 0, metrics).detach()) != 0 and metrics[0]["loss/kl"] > 0
    kept = torch.cat([p.double().flatten() for p in step.start.values()])
    assert torch.equal(kept, torch.cat([p.double().flatten() for p in trained(frozen.family.trainable_net())]))
    assert not torch.equal(before, away)


def test_equal_rewards_move_nothing(frozen: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(critic, wording, given, edited):
        return CriticScores(tuple(range(len(given))), ("edit",) * len(given), torch.full((len(given),), 0.3))

    monkeypatch.setattr("npedit.steps.flow_grpo.score_with_critic", same)
    step = make(frozen)
    before = weights(step.learners["student"].net)
    metrics = step.step([batch(0, 1)], 0)
    assert metrics["grad_norm/student"] == pytest.approx(0, abs=1e-6) and metrics["reward/mean"] == pytest.approx(0.3)
    torch.testing.assert_close(weights(step.learners["student"].net), before, atol=1e-6, rtol=0)


def test_the_policy_finds_what_the_reward_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that grows with brightness: the samples come to earn more, and a KL to the start holds that back."""

    def bright(critic, wording, given, edited):
        p = (4 * (edited.mean((1, 2, 3)) - 0.5)).sigmoid()
        return CriticScores(tuple(range(len(given))), ("edit",) * len(given), p)

    monkeypatch.setattr("npedit.steps.flow_grpo.score_with_critic", bright)
    gained = {}
    for kl_weight in (0.0, 300.0):
        settings = {"group": 6, "clip": 0.02, "kl_weight": kl_weight, "student": {"lr": 4e-3, "betas": (0.5, 0.95)}}
        step = make(parts(), **settings)
        rewards = [step.step([batch(0, 1)], update)["reward/mean"] for update in range(16)]
        gained[kl_weight] = sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4
    assert gained[0.0] > 0.008 and gained[300.0] < 0.7 * gained[0.0]


def test_ratios_leave_one_only_after_the_first_policy_update(frozen: Parts) -> None:
    assert make(frozen, policy_updates=1, clip=1e-5).step([batch(0, 1)], 0)["policy/outside_clip"] == 0
    found = make(parts(), policy_updates=3, clip=1e-5, student={"lr": 1e-2}).step([batch(0, 1)], 0)
    assert found["policy/outside_clip"] > 0.2


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_a_window_of_noisy_steps_is_drawn_in_the_first_half_and_the_other_steps_are_the_odes(
    frozen: Parts, sampler: str
) -> None:
    step, begun = make(frozen, sampling_steps=6, window=2, sampler=sampler), set()
    for update in range(6):
        found, _ = sampled(step, update=update)
        begun.add(found.trained[0])
        assert found.trained == (found.trained[0], found.trained[0] + 1) and len(found.before) == 2
        for k in range(5):
            x, t, after = found.states[k], found.times[k], found.times[k + 1]
            with torch.no_grad():
                v = step._velocity(x, t, found.text, (found.references,))
            if k not in found.trained:
                torch.testing.assert_close(found.states[k + 1], x + (after - t) * v)
                continue
            mean, std = (grpo.sde_step if sampler == "sde" else grpo.cps_step)(x, v, t, after, 0.7)
            assert ((found.states[k + 1] - mean) / std).std() == pytest.approx(1, abs=0.2)
            kept = found.before[found.trained.index(k)]
            torch.testing.assert_close(kept, grpo.log_prob(found.states[k + 1], mean, std))
    assert begun == {0, 1}


def test_large_advantages_are_cut(frozen: Parts) -> None:
    free, _ = sampled(make(frozen, group=6))
    cut, _ = sampled(make(frozen, group=6, advantage_clip=0.5))
    assert free.advantages.abs().max() > 0.5
    torch.testing.assert_close(cut.advantages, free.advantages.clamp(-0.5, 0.5))


@pytest.mark.parametrize("std", ["batch", "group"])
def test_advantages_do_not_depend_on_how_an_update_is_divided(
    frozen: Parts, std: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of four items, two accumulated batches, and two processes give the same advantages."""
    step = make(frozen, group=2, advantage_std=std, advantage_clip=1.5)
    rewards = torch.tensor([[0.50, 0.51, 0.1, 0.9], [0.52, 0.49, 0.8, 0.2]])
    found, _ = sampled(step)

    def advantages(*parts: torch.Tensor) -> torch.Tensor:
        taken = step._with_advantages([replace(found, rewards=part.flatten()) for part in parts])
        return torch.cat([t.advantages.view(2, -1) for t in taken], 1)

    whole, halves = advantages(rewards), rewards.split(2, 1)
    torch.testing.assert_close(advantages(*halves), whole)
    monkeypatch.setattr("npedit.steps.flow_grpo.all_gather", lambda mine: list(halves))
    for number, half in enumerate(halves):
        monkeypatch.setattr("npedit.steps.flow_grpo.rank", lambda number=number: number)
        torch.testing.assert_close(advantages(half), whole[:, 2 * number : 2 * number + 2])


@pytest.mark.parametrize(
    "settings",
    [{}, {"kl_weight": 0}, {"window": 1, "split_samples": True, "policy_updates": 3}, {"policy_updates": 3}],
    ids=["default", "no KL", "window", "three updates"],
)
def test_passes_per_update_are_those_that_are_made(frozen: Parts, settings: dict) -> None:
    step, made = make(frozen, sampling_steps=4, **settings), {"generator": 0, "critic": 0}
    velocity, logits = frozen.family.velocity, frozen.critic.logits

    def counted(key: str, call: Callable, texts: Callable) -> Callable:
        def wrapped(*given: Any, **named: Any) -> Any:
            made[key] += len(texts(given))
            return call(*given, **named)

        return wrapped

    vars(frozen.family)["velocity"] = counted("generator", velocity, lambda given: given[1])
    vars(frozen.critic)["logits"] = counted("critic", logits, lambda given: given[0])
    step.step([batch(0, 1)], 0)
    assert (made["generator"], made["critic"]) == Step.passes_per_update(step.settings, 2)


def test_edited_images_are_not_looked_at() -> None:
    found = []
    for edited in (None, torch.full((2, 3, 16, 16), torch.nan)):
        step, given = make(parts()), batch(0, 1)
        step.step([given if edited is None else PairedBatch(**vars(given), edited=edited)], 0)
        found.append(weights(step.learners["student"].net))
    assert torch.equal(*found)
    assert Step.requirements(FlowGrpoSettings()) == {"critic"}


def test_equal_seeds_give_equal_weights_bit_for_bit() -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        step = make(parts(), seed)
        torch.manual_seed(noise)
        step.step([batch(0, 1), batch(2, 3)], 0)
        found.append(weights(step.learners["student"].net))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_offloading_changes_nothing_and_adapters_are_trained_too() -> None:
    found = []
    for memory in ({}, {"offload": True}):
        frozen = parts(lora=True, **memory)
        step = make(frozen)
        base = weights(frozen.family.base)
        step.step([batch(0, 1)], 0)
        step.step([batch(2, 3)], 1)
        assert torch.equal(weights(frozen.family.base), base)
        found.append(weights(step.learners["student"].net.lora_layers))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling_steps": 1},
        {"group": 1},
        {"clip": 0},
        {"noise_level": 0},
        {"policy_updates": 0},
        {"beta": 1},
        {"window": 6},
        {"sampler": "cps", "noise_level": 1.2},
        {"split_samples": True, "group": 2, "policy_updates": 3},
    ],
)
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(UserError):
        validate_settings(FlowGrpoSettings, wrong, "stages.0.settings")


# ------------------------------------------------------------------------------------------------- a whole training


def recipe() -> Recipe:
    student = {"lr": 0.001}
    stages = [
        {"step": "supervised", "updates": 1, "batch_size": 2, "settings": {"student": student, "steps": 2}},
        {"step": "flow_grpo", "updates": 3, "batch_size": 2, "settings": SMALL | {"student": student}},
    ]
    return make_recipe(
        {"name": "small", "family": {"name": "flux"}, "critic": {"name": "llava_onevision"},
         "data": {"name": "toy_pairs"}, "stages": stages,
         "trainer": {"save_every": 1, "sample_items": 1, "steps": 2, "sample_every": 0, "evaluate_every": 0}}
    )  # fmt: skip


class Crash(Exception):
    """Ends a run without warning."""


def test_a_run_from_a_supervised_start_repeats_itself_after_a_stop(tmp_path: Path) -> None:
    """The reference policy of a resumed run is the supervised stage's end, not what it has become since."""

    def crash(name: str, facts: dict) -> None:
        if name == "update" and facts["step"] == 3:
            raise Crash

    whole = trainer.train(recipe(), tmp_path / "whole", parts=lambda r: parts())
    with pytest.raises(Crash):
        trainer.train(recipe(), tmp_path / "run", parts=lambda r: parts(), on_event=crash)
    trainer.train(recipe(), tmp_path / "run", parts=lambda r: parts())
    a, b = (checkpoint.load_checkpoint(r / "checkpoint-000004")[0] for r in (whole, tmp_path / "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    name = next(k for k in a if k.startswith("extra/"))
    assert not torch.equal(a[name], a[name.replace("extra/", "student/net.")])
