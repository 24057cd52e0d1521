"""DMD's guidance part and matching part at times of their own (`guidance_times`, `matching_times`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npedit import dmd, flow
from npedit.generator import sample_noise, seeded_generator
from npedit.steps import _distribution_matching
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, nudge, parts

BY_TYPE = {"recolour": 1.0, "remove": 6.0}  # of the items below the first and the second
X0 = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))


def make(**settings) -> Step:
    """A step whose fake score is not the teacher, and whose unconditional prediction is not the conditional one."""
    made = parts(critic=False)
    chosen = NpEditSettings(critic_weight=0, fake_updates=1, guidance=2.0, negative_prompt="low quality", **settings)
    step = Step(chosen, made, made.create_trainable("student", 0), 10, 0)
    nudge(step.learners["fake"].net)
    return step


def gradient(step: Step, generated_at: float = 1.0) -> Tensor:
    return step.distribution_matching(batch(0, 1, 2), X0, generated_at, seeded_generator("g"))


def teacher_calls(step: Step, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The times of every pass of the teacher."""
    family, found = step.parts.family, []
    real = family.velocity

    def noted(net, x, t, text, references=()):
        if net is family.base:
            found.append(t)
        return real(net, x, t, text, references)

    monkeypatch.setattr(family, "velocity", noted)
    return found


@pytest.mark.parametrize("by_type", [{}, BY_TYPE])
def test_at_equal_times_both_parts_sum_to_the_usual_gradient(by_type, monkeypatch):
    eps = torch.randn(X0.shape, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(_distribution_matching, "sample_noise", lambda like, count, generator: [eps])
    at = {"t_min": 0.5, "t_max": 0.5, "guidance_by_type": by_type}
    usual, apart = gradient(make(**at)), gradient(make(**at, guidance_times="full"))
    assert usual.abs().max() > 0.1
    torch.testing.assert_close(apart, usual, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_written_out_equation():
    """Equation 8 of Decoupled DMD, in x0, with DMD's normaliser of the whole target."""
    step = make(guidance_by_type=BY_TYPE, guidance_times="below", matching_times="full")
    family, generator, given = step.parts.family, seeded_generator("g"), batch(0, 1, 2)
    text, blank = family.encode_text(given.target_captions), family.encode_text(["low quality"] * 3)
    with torch.no_grad():
        t = 0.02 + 0.96 * torch.rand(3, generator=generator)
        x = flow.add_noise(X0, sample_noise(X0, 1, generator)[0], t)
        s = 0.02 + (0.6 - 0.02) * torch.rand(3, generator=generator)
        y = flow.add_noise(X0, sample_noise(X0, 1, generator)[0], s)
        fake = x - t.view(-1, 1, 1, 1) * family.velocity(step.learners["fake"].net, x, t, text)
        real = x - t.view(-1, 1, 1, 1) * family.velocity(family.base, x, t, text)
        with_text, without = (y - s.view(-1, 1, 1, 1) * family.velocity(family.base, y, s, c) for c in (text, blank))
        target = real + (torch.tensor([1.0, 6.0, 2.0]).view(-1, 1, 1, 1) - 1) * (with_text - without)
    wanted = (fake - target) / (X0 - target).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient(step, generated_at=0.6), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", ["shared", "full", "below"])
def test_without_guidance_the_guidance_part_is_zero_and_costs_nothing(times, monkeypatch):
    step = make(guidance_by_type=dict.fromkeys(("recolour", "remove", "add"), 1.0), guidance_times=times)
    calls = teacher_calls(step, monkeypatch)
    torch.testing.assert_close(gradient(step, 0.5), gradient(make(guidance_by_type={"recolour": 1.0, "remove": 1.0,
                               "add": 1.0})), rtol=0, atol=0)  # fmt: skip
    assert len(calls) == 1


def test_the_guidance_part_is_zero_at_scale_1_and_adds_up_to_guidance():
    a, b = X0, X0.flip(0)
    scale = torch.tensor([1.0, 3.5, 0.0])
    part = dmd.guidance_part(a, b, scale)
    assert not part[0].any()
    torch.testing.assert_close(a + part, dmd.classifier_free_guidance(a, b, scale))


@pytest.mark.parametrize(
    ("matching", "guidance", "highest"),
    [("full", "below", [1.0, 0.3, 0.3]), ("below", "below", [0.3, 0.3, 0.3]), ("full", "full", [1.0, 1.0, 1.0]),
     ("below", "shared", [0.3, 0.3])],
)  # fmt: skip
def test_each_part_keeps_to_its_interval(matching, guidance, highest, monkeypatch):
    """The passes: conditional for the matching part, then (if it is apart) both of the guidance part."""
    step = make(matching_times=matching, guidance_times=guidance)
    calls = teacher_calls(step, monkeypatch)
    for _ in range(40):
        step.distribution_matching(batch(0, 1, 2), X0, 0.3, torch.default_generator)
    for i, end in enumerate(highest):
        times = torch.cat(calls[i :: len(highest)])
        assert 0.02 <= times.min() < 0.1 and end - 0.12 < times.max() <= min(end, 0.98), (i, end)


def test_below_pure_noise_is_the_full_range_and_never_below_t_min(monkeypatch):
    below, full = make(guidance_times="below", matching_times="below"), make(guidance_times="full")
    torch.testing.assert_close(gradient(below, 1.0), gradient(full, 1.0), rtol=0, atol=0)
    calls = teacher_calls(below, monkeypatch)
    gradient(below, 0.001)
    assert all(bool((t == torch.tensor(0.02)).all()) for t in calls)


def test_the_end_of_the_interval_is_the_time_of_the_students_last_call(monkeypatch):
    step, ends, last = make(guidance_times="below", steps=3), [], []
    family, real, matching = step.parts.family, step.parts.family.velocity, step.distribution_matching

    def noted(net, x, t, text, references=()):
        if references:  # the student's calls alone have a reference
            last.append(float(t[0]))
        return real(net, x, t, text, references)

    monkeypatch.setattr(family, "velocity", noted)
    step.distribution_matching = lambda given, x0, at, generator: (
        ends.append((at, last[-1])) or matching(given, x0, at, generator)
    )
    for update in range(6):
        step.step([batch(0, 1)], update)
    assert len({at for at, _ in ends}) == 3  # all transitions of three steps
    assert all(at == pytest.approx(seen) for at, seen in ends)
