"""Flow-GRPO's arithmetic against closed forms: the SDE's law, densities, divergences, advantages, clipping."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from npedit import flow, grpo

M, S = 1.3, 0.4  # the data's mean and standard deviation


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[eps - x0 | x_t = x] for data N(M, S^2)."""
    variance = (1 - t) ** 2 * S**2 + t**2
    away = (x - (1 - t) * M) / variance
    return t * away - (M + (1 - t) * S**2 * away)


def law(steps: int, noise_level: float, shift: float = 1.0, top: float = 1.0) -> list[tuple[float, float, float]]:
    """(t, mean, variance) after each step from the exact law at t = `top`. v is affine in x, so the steps' Gaussians
    are found without sampling."""
    times = [*flow.few_step_times(steps, shift).double().mul(top).tolist(), 0.0]
    times[0] = top
    mean = torch.full((1, 1, 1, 1), (1 - top) * M, dtype=torch.float64)
    variance, found = (1 - top) ** 2 * S**2 + top**2, []
    for t, after in zip(times, times[1:]):
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        (high, std), (low, _) = (grpo.sde_step(x, velocity(x, t), t, after, noise_level) for x in (one, zero))
        variance = float(high - low) ** 2 * variance + std**2
        mean = grpo.sde_step(mean, velocity(mean, t), t, after, noise_level)[0]
        found.append((after, float(mean), variance))
    return found


def worst(found: list[tuple[float, float, float]]) -> float:
    """The largest difference from the ODE's law, N((1 - t) M, (1 - t)^2 S^2 + t^2)."""
    return max(max(abs(m - (1 - t) * M), abs(v - (1 - t) ** 2 * S**2 - t**2)) for t, m, v in found)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.2])
def test_the_sde_has_the_odes_law_at_every_time(noise_level: float, shift: float) -> None:
    """To first order in the step: half the step, half the error."""
    coarse, fine = (worst(law(steps, noise_level, shift, top=0.9)) for steps in (200, 400))
    assert fine < 0.02 and fine == pytest.approx(coarse / 2, rel=0.15)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.2])
def test_from_pure_noise_the_law_is_found_as_t_falls(noise_level: float) -> None:
    """The step from t = 1 alone leaves a^4 / 4 too much of variance, however short it is; later steps forget it."""
    first = law(800, noise_level)[0]
    assert first[2] - 1 == pytest.approx(noise_level**4 / 4, abs=0.02)
    coarse, fine = (worst([f for f in law(steps, noise_level) if f[0] < 0.8]) for steps in (200, 800))
    assert fine < 0.012 and fine < 0.75 * coarse


def test_another_drift_has_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: noise alone, without the drift that takes it back."""
    real = grpo.sde_step

    def noise_alone(x, v, t, after, noise_level):
        return real(x, v, t, after, 0.0)[0], real(x, v, t, after, noise_level)[1]

    monkeypatch.setattr(grpo, "sde_step", noise_alone)
    assert worst(law(400, 0.7)) > 0.2


def test_a_sampled_step_is_the_one_of_the_closed_form() -> None:
    x = torch.randn(50_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    times = [1.0, 0.8, 0.55, 0.3]
    for t, after in zip(times, times[1:]):
        mean, std = grpo.sde_step(x, velocity(x, t), t, after, 0.7)
        x = mean + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(int(100 * t)))
    t, mean, variance = 1.0, torch.zeros(1, 1, 1, 1), 1.0
    for t, after in zip(times, times[1:]):
        slope = grpo.sde_step(torch.ones(1, 1, 1, 1), velocity(torch.ones(1, 1, 1, 1), t), t, after, 0.7)[0]
        slope = slope - grpo.sde_step(torch.zeros(1, 1, 1, 1), velocity(torch.zeros(1, 1, 1, 1), t), t, after, 0.7)[0]
        mean, std = grpo.sde_step(mean, velocity(mean, t), t, after, 0.7)
        variance = float(slope) ** 2 * variance + std**2
    assert float(x.mean()) == pytest.approx(float(mean), abs=0.015)
    assert float(x.var()) == pytest.approx(variance, rel=0.03)


def test_without_noise_it_is_the_ode() -> None:
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mean, std = grpo.sde_step(x, v, 0.6, 0.4, 0.0)
    assert std == 0
    torch.testing.assert_close(mean, x - 0.2 * v)


def test_the_first_step_is_finite_and_as_the_authors_code_has_it() -> None:
    """There sigma_1 = a sqrt(1 / (1 - t_1)), t_1 the second time."""
    x, v = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    mean, std = grpo.sde_step(x, v, 1.0, 0.9, 0.7)
    sigma = 0.7 * math.sqrt(1 / 0.1)
    torch.testing.assert_close(mean, x - 0.1 * (v + sigma**2 / 2 * x))
    assert std == pytest.approx(sigma * math.sqrt(0.1))


@pytest.mark.parametrize("noise_level", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize(("t", "after"), [(1.0, 0.7), (0.8, 0.1), (0.5, 0.0)])
def test_a_cps_step_has_the_right_law_however_long_it_is(noise_level: float, t: float, after: float) -> None:
    """For data that are the point M: from N((1 - t) M, t^2) to N((1 - after) M, after^2). The SDE's step is wrong."""
    x = torch.tensor([(1 - t) * M, (1 - t) * M + t], dtype=torch.float64).view(2, 1, 1, 1)  # mean, mean + deviation
    v = (x - (1 - t) * M) / t - M
    mean, std = grpo.cps_step(x, v, t, after, noise_level)
    assert mean[0].item() == pytest.approx((1 - after) * M)
    assert (mean[1] - mean[0]).item() ** 2 + std**2 == pytest.approx(after**2)
    assert std == pytest.approx(after * math.sin(noise_level * math.pi / 2))


def test_a_cps_step_without_noise_is_the_odes() -> None:
    x, v = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = grpo.cps_step(x, v, 0.8, 0.5, 0.0)
    torch.testing.assert_close(mean, x + (0.5 - 0.8) * v)
    assert std == 0
    with pytest.raises(ValueError, match="noise level"):
        grpo.cps_step(x, v, 0.8, 0.5, 1.1)


@pytest.mark.parametrize(("t", "after"), [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_times_must_fall(t: float, after: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= after < t <= 1"):
        grpo.sde_step(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), t, after, 0.7)


def test_log_probabilities_are_those_of_torch() -> None:
    x, mean = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    wanted = Normal(mean, 0.37).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(grpo.log_prob(x, mean, 0.37), wanted)


def test_the_divergence_is_torchs() -> None:
    mean, other = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    wanted = kl_divergence(Normal(mean, 0.37), Normal(other, 0.37)).mean()
    torch.testing.assert_close(grpo.kl_divergence(mean, other, 0.37), wanted)
    assert grpo.kl_divergence(mean, mean, 0.37) == 0


def test_advantages_are_within_groups_and_zero_where_rewards_are_equal() -> None:
    rewards = torch.tensor([[0.1, 0.5, 0.0], [0.3, 0.5, 1.0], [0.5, 0.5, 0.5]])
    found = grpo.advantages(rewards)
    assert found[:, 1].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[:, 0], torch.tensor([-1.2247, 0.0, 1.2247]), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 2], grpo.advantages(rewards[:, 2:] + 7)[:, 0], atol=1e-4, rtol=1e-4)


def test_advantages_over_the_whole_batchs_spread() -> None:
    """A group all but alike counts for little, and each group's advantages still have the mean 0."""
    rewards = torch.tensor([[0.1, 0.500, 0.0], [0.3, 0.501, 1.0], [0.5, 0.502, 0.5]])
    found = grpo.advantages(rewards, whole_batch=True)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert found[2, 1] == pytest.approx(0.001 / (statistics.pstdev(rewards.flatten().tolist()) + 1e-4), rel=1e-3)
    assert grpo.advantages(rewards)[2, 1] > 1


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "held"),
    [(0.0, 1.0, False), (0.05, 1.0, False), (0.2, 1.0, True), (-0.2, 1.0, False),
     (0.0, -1.0, False), (-0.05, -1.0, False), (-0.2, -1.0, True), (0.2, -1.0, False), (0.05, 0.0, True)],
)  # fmt: skip
def test_clipping_stops_the_gradient_where_the_sample_has_been_learnt_from(
    log_ratio: float, advantage: float, held: bool
) -> None:
    now = torch.tensor([log_ratio - 1.0], requires_grad=True)
    loss = grpo.policy_loss(now, torch.tensor([-1.0]), torch.tensor([advantage]), 0.1)
    (gradient,) = torch.autograd.grad(loss, now)
    assert float(gradient) == pytest.approx(0.0 if held else -advantage * math.exp(log_ratio), rel=1e-5)


def test_the_policy_loss_is_the_mean_over_samples() -> None:
    now, advantage = torch.tensor([0.0, 0.3, -0.3]), torch.tensor([2.0, 1.0, -1.0])
    assert float(grpo.policy_loss(now, torch.zeros(3), advantage, 0.1)) == pytest.approx(-(2 + 1.1 - 0.9) / 3)
