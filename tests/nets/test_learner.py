"""The learner: master weights, accumulation, clipping, schedule, finite guard, averages, exact state."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.nets.adamw import AdamWWithoutMomentum
from npedit.nets.learner import Learner, LearnerSettings
from npedit.recipe.config import validate_settings

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(4, 2, generator=torch.Generator().manual_seed(2))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh(), nn.Linear(5, 2)).eval()


def learner(total: int = 10, **settings) -> Learner:
    return Learner(net(), LearnerSettings(**{"lr": 0.01, **settings}), total)


def loss(of: Learner, rows: slice = slice(None)):
    return lambda: (of.net(X[rows]) - Y[rows]).square().mean()


def weights(of: Learner) -> Tensor:
    return nn.utils.parameters_to_vector(of.net.parameters()).detach().clone()


def test_it_learns() -> None:
    one = learner(total=200, lr=0.02)
    before = loss(one)().item()
    for _ in range(200):
        one.update([loss(one)])
    assert loss(one)().item() < 0.2 * before


def test_a_bfloat16_model_trains_float32_master_weights() -> None:
    """The model computes as it came, bit for bit; updates far below bfloat16's precision add up; masters are saved."""
    base = net().bfloat16()
    one = Learner(copy.deepcopy(base), LearnerSettings(lr=1e-5, betas=(0.5, 0.9), ema=0.5), 300)
    inputs = X.bfloat16()
    assert torch.equal(one.net(inputs), base(inputs))

    def push() -> Tensor:
        return one.net(inputs).float().sum()

    one.update([push])
    assert {p.dtype for p in one.net.parameters()} == {torch.bfloat16}
    assert {p.grad for p in one.net.parameters()} == {None}
    assert torch.equal(one.net[3].bias, base[3].bias)  # one update is rounded away
    for _ in range(299):
        one.update([push])
    saved, numbers = one.state()
    assert {t.dtype for k, t in saved.items() if k.startswith(("net.", "ema.", "optimizer.exp"))} == {torch.float32}
    moved = saved["net.3.bias"] - base[3].bias.float()
    torch.testing.assert_close(moved, torch.full((2,), -0.003), rtol=0.01, atol=0)
    assert torch.equal(one.net[3].bias, saved["net.3.bias"].bfloat16())
    with one.use_ema_weights():
        assert torch.equal(one.net[3].bias, saved["ema.3.bias"].bfloat16())
    other = Learner(copy.deepcopy(base), LearnerSettings(lr=1e-5, betas=(0.5, 0.9), ema=0.5), 300)
    other.load_state(saved, numbers)
    assert torch.equal(weights(one), weights(other))
    one.update([push])
    other.update([lambda: other.net(inputs).float().sum()])
    assert all(torch.equal(t, other.state()[0][k]) for k, t in one.state()[0].items())


def test_the_next_stage_goes_on_from_the_float32_weights() -> None:
    """Not from the rounded ones that the model computes with."""
    one = Learner(net().bfloat16(), LearnerSettings(lr=1e-5), 10)
    one.update([lambda: one.net(X.bfloat16()).float().sum()])
    one.load_ema_weights()
    ema = {k[4:]: t.clone() for k, t in one.state()[0].items() if k.startswith("ema.")}
    following = Learner(one.net, LearnerSettings(), 10).state()[0]
    assert all(torch.equal(following[f"net.{name}"], value) for name, value in ema.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ema.values())


def test_the_model_to_be_saved_has_the_float32_weights() -> None:
    one = Learner(net().bfloat16(), LearnerSettings(lr=1e-5), 10)
    one.update([lambda: one.net(X.bfloat16()).float().sum()])
    whole = distributed.gather_full_model(one.net)
    assert whole is not one.net and {p.dtype for p in whole.parameters()} == {torch.float32}
    assert all(torch.equal(p, one.state()[0][f"net.{name}"]) for name, p in whole.named_parameters())
    plain = learner()
    assert distributed.gather_full_model(plain.net) is plain.net


def test_gradients_of_several_losses_add_up_in_float32() -> None:
    """In bfloat16, 1 + 1/512 is 1."""
    seen = []
    one = Learner(net().bfloat16(), LearnerSettings(clip=1e9), 1)
    one._optimizer.register_step_pre_hook(lambda o, *_: seen.append([p.grad for p in o.param_groups[0]["params"]][-1]))
    one.update([lambda: one.net[3].bias.sum() * 2, lambda: one.net[3].bias.sum() / 256])
    assert seen[0].tolist() == [1 + 1 / 512] * 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [False, True])
def test_without_beta1_the_updates_are_those_of_adamw_bit_for_bit(foreach: bool, weight_decay: float) -> None:
    ours, theirs = net(), net()
    chosen = {"lr": 0.01, "weight_decay": weight_decay, "foreach": foreach}
    lean = AdamWWithoutMomentum(list(ours.parameters()), beta2=0.9, **chosen)
    adamw = torch.optim.AdamW(theirs.parameters(), betas=(0.0, 0.9), **chosen)
    for i in range(5):
        for model, optimizer in ((ours, lean), (theirs, adamw)):
            optimizer.zero_grad()
            ((model(X) - Y) * (i + 1)).square().mean().backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert {key for state in lean.state.values() for key in state} == {"step", "exp_avg_sq"}


def test_what_a_setting_switches_off_is_neither_kept_nor_saved() -> None:
    one = learner(ema=0.0, betas=(0.0, 0.9))
    one.update([loss(one)])
    assert not [k for k in one.state()[0] if k.startswith(("ema.", "optimizer.exp_avg."))]
    newest = weights(one)
    with one.use_ema_weights():
        assert torch.equal(weights(one), newest)
    one.load_ema_weights()
    assert torch.equal(weights(one), newest)


def test_a_checkpoint_from_before_resumes() -> None:
    """It has an average and a first moment that nobody needs."""
    one, other = learner(ema=0.0), learner(ema=0.0)
    one.update([loss(one)])
    tensors, numbers = one.state()
    old = {k: t.clone() for k, t in tensors.items()}
    for key in list(old):
        if key.startswith("net."):
            old[f"ema.{key[4:]}"] = old[key].clone()
            old[f"optimizer.exp_avg.{key[4:]}"] = torch.ones_like(old[key])
    other.load_state(old, numbers)
    for each in (one, other):
        each.update([loss(each)])
    assert torch.equal(weights(one), weights(other))


def test_four_times_one_is_one_times_four() -> None:
    many, once = learner(), learner()
    a = many.update([loss(many, slice(i, i + 1)) for i in range(4)])
    b = once.update([loss(once)])
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    torch.testing.assert_close(weights(many), weights(once), rtol=1e-5, atol=1e-6)


def test_each_loss_is_freed_before_the_next_is_computed() -> None:
    """Accumulation saves memory only if the losses are not computed all at first."""
    one, order = learner(), []

    def noted(i: int):
        def compute() -> Tensor:
            order.append(i)
            value = loss(one)()
            value.register_hook(lambda g: order.append(-i))
            return value

        return compute

    one.update([noted(1), noted(2)])
    assert order == [1, -1, 2, -2]


def test_clipping_bounds_the_gradient_and_reports_the_norm_before() -> None:
    seen = []
    one = learner(clip=0.001)
    one._optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in one.net.parameters())))
    )
    norm = one.update([loss(one)])["grad_norm"]
    assert norm > 0.01 and seen[0] == pytest.approx(0.001, rel=1e-3)


def test_the_learning_rate() -> None:
    one = learner(total=8, warmup_updates=4, decay="cosine")
    rates = [one.update([loss(one)])["lr"] for _ in range(8)]
    expected = [0.01 * min(1, (n + 1) / 4) * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert rates == pytest.approx(expected)
    flat = learner(decay="constant")
    assert [flat.update([loss(flat)])["lr"] for _ in range(3)] == [0.01] * 3


def test_the_average_really_averages() -> None:
    one = learner(ema=0.5, lr=0.1)
    mean = weights(one)
    for n in range(6):
        one.update([loss(one)])
        decay = min(0.5, (n + 1) / (n + 10))
        mean = decay * mean + (1 - decay) * weights(one)
    newest = weights(one)
    with one.use_ema_weights() as averaged:
        assert averaged is one.net
        torch.testing.assert_close(weights(one), mean)
        assert not torch.allclose(weights(one), newest)
    assert torch.equal(weights(one), newest)


def test_the_newest_weights_come_back_after_an_error() -> None:
    one = learner(lr=0.1)
    one.update([loss(one)])
    newest = weights(one)
    with pytest.raises(RuntimeError, match="within"), one.use_ema_weights():
        raise RuntimeError("within")
    assert torch.equal(weights(one), newest)


def test_training_goes_on_unharmed_after_a_look_at_the_average() -> None:
    looked, plain = learner(), learner()
    for _ in range(3):
        looked.update([loss(looked)])
        plain.update([loss(plain)])
        with looked.use_ema_weights():
            loss(looked)()
    assert torch.equal(weights(looked), weights(plain))


def test_settle_makes_the_average_the_newest() -> None:
    one = learner(lr=0.1)
    for _ in range(3):
        one.update([loss(one)])
    with one.use_ema_weights():
        mean = weights(one)
    one.load_ema_weights()
    assert torch.equal(weights(one), mean)
    one.update([loss(one)])
    with one.use_ema_weights():
        assert not torch.equal(weights(one), mean)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counter(bad: float) -> None:
    one = learner()
    one.update([loss(one)])
    before, moments = weights(one), copy.deepcopy(one._optimizer.state_dict()["state"])
    result = one.update([loss(one), lambda: loss(one)() * bad])
    assert result["skipped"] == 1 and not math.isfinite(result["grad_norm"])
    assert torch.equal(weights(one), before)
    assert torch.equal(one._optimizer.state_dict()["state"][0]["exp_avg_sq"], moments[0]["exp_avg_sq"])
    one.update([loss(one)])
    assert torch.isfinite(weights(one)).all() and not torch.equal(weights(one), before)


def test_too_many_in_a_row_stop_the_run() -> None:
    one = learner(max_skipped=2)

    def bad() -> Tensor:
        return loss(one)() * math.nan

    for _ in range(3):  # a good one between starts the count anew
        one.update([bad])
        one.update([bad])
        one.update([loss(one)])
    one.update([bad])
    one.update([bad])
    with pytest.raises(UserError, match="3 updates in a row.*metrics.jsonl.*lr"):
        one.update([bad])


def test_a_loss_that_does_not_reach_the_net_is_an_error() -> None:
    one = learner()
    with pytest.raises(ValueError, match="depend on the model"):
        one.update([lambda: torch.ones((), requires_grad=True) * 2])
    with pytest.raises(ValueError, match="at least one loss"):
        one.update([])
    with pytest.raises(ValueError, match="requires a gradient"):
        Learner(net().requires_grad_(False), LearnerSettings(), 1)


def test_frozen_parameters_stay_and_are_not_saved() -> None:
    part = net()
    part[0].requires_grad_(False)
    one = Learner(part, LearnerSettings(lr=0.1), 3)
    frozen = part[0].weight.clone()
    one.update([loss(one)])
    assert torch.equal(part[0].weight, frozen)
    assert "net.0.weight" not in one.state()[0] and "net.3.weight" in one.state()[0]


def test_the_state_goes_on_bit_for_bit() -> None:
    whole, first = learner(warmup_updates=3, decay="cosine"), learner(warmup_updates=3, decay="cosine")
    for _ in range(2):
        whole.update([loss(whole)])
        first.update([loss(first)])
    whole.update([lambda: loss(whole)() * math.nan])
    first.update([lambda: loss(first)() * math.nan])
    tensors, numbers = first.state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    second = learner(warmup_updates=3, decay="cosine")
    second.load_state(tensors, numbers)
    for _ in range(2):
        a, b = whole.update([loss(whole)]), second.update([loss(second)])
        assert a == b
    for name, value in whole.state()[0].items():
        assert torch.equal(value, second.state()[0][name]), name


def test_a_plain_number_in_the_optimizers_state_comes_back_as_one() -> None:
    """AdamW in 8 bits counts its steps so."""
    first, second = learner(), learner()
    first.update([loss(first)])
    for kept in first._optimizer.state.values():
        kept["step"] = int(kept["step"])
    tensors, numbers = first.state()
    second.load_state(tensors, numbers)
    assert [type(kept["step"]) for kept in second._optimizer.state.values()] == [int] * 6


def test_the_8_bit_optimizer_wants_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="student.optimizer: .*pip install .npedit.8bit.., or use adamw"):
        validate_settings(LearnerSettings, {"optimizer": "adamw8bit"}, "student")


def test_a_state_of_another_net_is_refused() -> None:
    tensors, numbers = learner().state()
    other = Learner(nn.Linear(3, 2), LearnerSettings(), 1)
    with pytest.raises(ValueError, match=r"net\.weight .*got nothing"):
        other.load_state(tensors, numbers)


INFINITE = float("inf")
OUT_OF_RANGE = [
    {"lr": 0}, {"lr": INFINITE}, {"ema": 1.0}, {"clip": 0}, {"decay": "linear"}, {"weight_decay": INFINITE},
    {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"betas": [-0.1, 0.9]}, {"betas": [0.0, float("nan")]},
]  # fmt: skip


@pytest.mark.parametrize("bad", OUT_OF_RANGE, ids=str)
def test_settings_out_of_range(bad: dict) -> None:
    with pytest.raises(UserError, match=f"student.{next(iter(bad))}"):
        validate_settings(LearnerSettings, bad, "student")
