"""The one time convention: round trips, and the few-step schedule."""

import pytest
import torch

from npedit.flow import add_noise, few_step_times, predict_x0, shift_times, velocity


@pytest.fixture
def drawn():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(5, 4, 3, 2, generator=g), torch.randn(5, 4, 3, 2, generator=g)
    return x0, eps, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])


def test_noised_then_clean_gives_back_the_picture(drawn):
    x0, eps, t = drawn
    torch.testing.assert_close(predict_x0(add_noise(x0, eps, t), velocity(x0, eps), t), x0, atol=1e-6, rtol=0)


def test_t_one_is_noise_and_t_zero_is_the_picture(drawn):
    x0, eps, t = drawn
    x = add_noise(x0, eps, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[-1], eps[-1])


def test_velocity_is_the_derivative_in_time(drawn):
    x0, eps, _ = drawn
    x0, eps = x0.double(), eps.double()
    a, b = add_noise(x0, eps, torch.full((5,), 0.3).double()), add_noise(x0, eps, torch.full((5,), 0.4).double())
    torch.testing.assert_close((b - a) / 0.1, velocity(x0, eps), atol=1e-6, rtol=0)


def test_each_item_has_its_own_time(drawn):
    x0, eps, t = drawn
    one_by_one = torch.cat([add_noise(x0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(5)])
    assert torch.equal(add_noise(x0, eps, t), one_by_one)


def test_bfloat16_stays_bfloat16(drawn):
    x0, eps, t = drawn
    assert add_noise(x0.bfloat16(), eps.bfloat16(), t).dtype is torch.bfloat16
    assert predict_x0(x0.bfloat16(), eps.bfloat16(), t).dtype is torch.bfloat16


def test_gradient_reaches_picture_and_velocity(drawn):
    x, v, t = drawn
    x.requires_grad_(), v.requires_grad_()
    predict_x0(x, v, t).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(v.grad, -t.view(-1, 1, 1, 1).expand_as(v))


def test_shifted_schedule_is_z_images():
    wanted = torch.tensor([1, 0.9474, 0.8571, 0.6667])
    torch.testing.assert_close(few_step_times(4, 6.0), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shift_keeps_the_ends_and_the_order(shift):
    t = torch.linspace(0, 1, 101)
    moved = shift_times(t, shift)
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(1)
    assert (moved.diff() > 0).all()
    torch.testing.assert_close(shift_times(moved, 1 / shift), t, atol=1e-6, rtol=0)


def test_without_shift_the_times_are_even():
    assert torch.equal(few_step_times(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25]))
    assert torch.equal(few_step_times(1, 6.0), torch.tensor([1.0]))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least one step; got 0"):
        few_step_times(0, 6.0)
