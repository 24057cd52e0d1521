"""Distribution matching against the closed form, and the normaliser of each sample by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npedit import dmd, flow

MEAN_T, MEAN_S, DEVIATION = 0.7, -0.4, 0.6


def gaussian_velocity(x: Tensor, t: Tensor, mean: float | Tensor, deviation: float) -> Tensor:
    """The exact score net of x0 ~ N(mean, deviation^2): v = E[eps - x0 | x_t = x].

    x_t is normal with mean (1 - t) m and variance (1 - t)^2 s^2 + t^2, so E[x0 | x_t] and E[eps | x_t] are linear in x.
    """
    t = t.to(x.dtype).view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * deviation**2 + t**2
    away = (x - (1 - t) * mean) / variance
    return t * away - (mean + (1 - t) * deviation**2 * away)


def guesses(x0: Tensor, t: Tensor, mean_s: float | Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(real, fake): what the two exact score nets take for the clean sample, through `flow.clean`."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)
    x = flow.add_noise(x0, eps, t)
    real, fake = (flow.predict_x0(x, gaussian_velocity(x, t, m, DEVIATION), t) for m in (MEAN_T, mean_s))
    return real, fake


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_analytic_nets_are_the_conditional_means():
    """The test's own yardstick: a regression of eps - x0 on x_t finds the same line."""
    t, x0, eps = torch.tensor([0.35]), MEAN_T + DEVIATION * drawn(1, 1, 1, 400_000), drawn(1, 1, 1, 400_000, seed=1)
    x, v = flow.add_noise(x0, eps, t).flatten(), (eps - x0).flatten()
    slope = ((x - x.mean()) * (v - v.mean())).mean() / x.var()
    two = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    line = gaussian_velocity(two, t, MEAN_T, DEVIATION).flatten()
    assert float(line[1] - line[0]) == pytest.approx(float(slope), abs=0.01)
    assert float(line[0]) == pytest.approx(float(v.mean() - slope * x.mean()), abs=0.01)


@pytest.mark.parametrize("time", [0.02, 0.25, 0.5, 0.75, 0.98, 1.0])
def test_the_gap_of_two_gaussians_is_the_closed_form(time):
    """(m_s - m_t) t^2 / ((1 - t)^2 s^2 + t^2), the same for every sample and every noise."""
    x0, t = MEAN_S + DEVIATION * drawn(5, 2, 3, 4), torch.full((5,), time)
    real, fake = guesses(x0, t, MEAN_S)
    time = float(t[0])  # as float32 holds it
    wanted = (MEAN_S - MEAN_T) * time**2 / ((1 - time) ** 2 * DEVIATION**2 + time**2)
    torch.testing.assert_close(fake - real, torch.full_like(x0, wanted), atol=1e-9, rtol=1e-9)
    # The package's gap is the same over each sample's width.
    width = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(dmd.dmd_gradient(x0, real, fake).double() * width, fake - real, atol=1e-5, rtol=1e-5)
    assert (dmd.dmd_gradient(x0, real, fake).sign() == torch.sign(torch.tensor(MEAN_S - MEAN_T))).all()


def test_times_may_differ_from_sample_to_sample():
    x0, t = MEAN_S + DEVIATION * drawn(3, 2, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    real, fake = guesses(x0, t, MEAN_S)
    s = t.double()
    wanted = (MEAN_S - MEAN_T) * s**2 / ((1 - s) ** 2 * DEVIATION**2 + s**2)
    torch.testing.assert_close((fake - real).mean((1, 2, 3)), wanted, atol=1e-7, rtol=1e-7)


def test_descent_moves_the_student_to_the_teachers_mean():
    """A wrong sign would drive it away."""
    mean = torch.tensor(MEAN_S, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.05)
    for step in range(120):
        x0 = mean + DEVIATION * drawn(16, 1, 2, 2, seed=step)
        t = 0.02 + 0.96 * torch.rand(16, generator=torch.Generator().manual_seed(step))
        real, fake = guesses(x0.detach(), t, mean.detach(), seed=1000 + step)
        optimizer.zero_grad()
        gap = dmd.dmd_gradient(x0, real, fake)
        (x0 * gap).mean().backward()  # its gradient with respect to x0 is gap / gap.numel()
        optimizer.step()
    assert float(mean.detach()) == pytest.approx(MEAN_T, abs=0.03)


def test_equal_models_leave_the_student_alone():
    x0, t = MEAN_T + DEVIATION * drawn(3, 2, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    real, fake = guesses(x0, t, MEAN_T)
    assert torch.equal(dmd.dmd_gradient(x0, real, fake), torch.zeros(3, 2, 2, 2))


# -------------------------------------------------------------------------------------------------------- normaliser


def test_the_normaliser_is_one_number_a_sample():
    """Fault 1: one value a pixel. (DMD, equation 8: mean over channels and places.)"""
    x0, real, fake = (drawn(4, 3, 5, 6, seed=s).float() for s in range(3))
    got = dmd.dmd_gradient(x0, real, fake)
    ratio = (fake - real) / got
    widths = ratio.flatten(1)
    torch.testing.assert_close(widths, widths[:, :1].expand_as(widths), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(widths[:, 0], (x0 - real).abs().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    per_pixel = (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
    assert (got - per_pixel).abs().max() > 0.1
    torch.testing.assert_close(dmd.dmd_gradient(x0, real, fake, "pixel"), per_pixel)  # to be compared: npedit study


def test_a_samples_gradient_does_not_depend_on_the_others():
    x0, real, fake = (drawn(4, 3, 5, 6, seed=s) for s in range(3))
    alone = dmd.dmd_gradient(x0[:1], real[:1], fake[:1])
    others = [torch.cat([a[:1], 100 * a[1:]]) for a in (x0, real, fake)]
    assert torch.equal(dmd.dmd_gradient(*others)[:1], alone)
    assert torch.equal(dmd.dmd_gradient(x0, real, fake)[:1], alone)


def test_a_sample_that_is_already_right_gives_no_infinity():
    x0, fake = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    assert torch.isfinite(dmd.dmd_gradient(x0, x0, fake)).all()
    assert torch.equal(dmd.dmd_gradient(x0, x0, x0), x0)


def test_the_gap_is_float32_and_carries_no_gradient():
    x0, real, fake = (drawn(2, 3, 4, 4, seed=s).bfloat16().requires_grad_() for s in range(3))
    got = dmd.dmd_gradient(x0, real, fake)
    assert got.dtype is torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, dmd.dmd_gradient(x0.float(), real.float(), fake.float()), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------------ losses


def test_the_fakes_loss_is_flow_matching_on_the_students_output():
    v, x0, eps = (drawn(2, 3, 4, 4, seed=s).float().requires_grad_() for s in range(3))
    loss = dmd.fake_score_loss(v, x0, eps)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float((v - (eps - x0)).detach().square().mean()), rel=1e-6)
    assert x0.grad is None and eps.grad is None  # the student learns nothing from it
    torch.testing.assert_close(v.grad, 2 * (v - (eps - x0)).detach() / v.numel())
    assert dmd.fake_score_loss(eps - x0, x0, eps).item() == 0


# ---------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_guidance_is_one_scale_a_sample(batch):
    """Fault 15: a scale of shape (b,) against (b, c, h, w) is an error, or goes along the width where that is b."""
    conditional, blank = drawn(batch, 3, 4, 5), drawn(batch, 3, 4, 5, seed=1)  # 5 is also the width
    scale = torch.arange(1, batch + 1).float()
    got = dmd.classifier_free_guidance(conditional, blank, scale)
    assert got.shape == (batch, 3, 4, 5)
    for i in range(batch):
        torch.testing.assert_close(got[i], blank[i] + (i + 1) * (conditional[i] - blank[i]))


def test_guidance_one_is_the_conditional_and_zero_the_other():
    conditional, blank = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    got = dmd.classifier_free_guidance(conditional, blank, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(got[0], conditional[0])
    assert torch.equal(got[1], blank[1])
