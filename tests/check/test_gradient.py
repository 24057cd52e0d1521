"""The gradient section: silent on the toy; wrong gradients and a learning rate that breaks the student are found."""

from __future__ import annotations

import math

import pytest
import torch

from npedit.check.findings import Section
from npedit.check.finite_differences import check_question
from npedit.check.gradient import check_gradient, report_balance, report_gradients, report_learning_rate
from npedit.check.subject import CheckOptions, Subject
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.nets.device import CPU
from npedit.questions import questions_for
from npedit.recipe.config import embedded_weights, load_recipe
from npedit.steps.base import Parts
from tests.check.conftest import severities

SMALL = ("stages.0.batch_size=2", "stages.1.batch_size=2")


class Reversed(LlavaOnevision):
    """Its gradient with respect to the pictures points the other way."""

    def encode_images(self, images):
        return super().encode_images(2 * images.detach() - images)


class Detached(LlavaOnevision):
    """No gradient reaches the pictures."""

    def encode_images(self, images):
        return super().encode_images(images.detach())


def subject_with(demo, critic=None, *overrides) -> Subject:
    """The demo with batches of two, two examples, and another critic."""
    old = demo.parts
    parts = Parts(old.family, critic or old.critic, old.wording, old.device)
    recipe = load_recipe("demo", [*SMALL, *overrides])
    return Subject(recipe, demo.data, parts, CheckOptions(samples=2), demo.examples[:1])


def open_as(kind) -> LlavaOnevision:
    return kind.load(embedded_weights("critic"), torch.float32, CPU)


@pytest.mark.slow
def test_the_demo_is_silent(demo) -> None:
    section = check_gradient(subject_with(demo))
    assert severities(section).keys() <= {"balance"}  # the norms of two items vary
    titles = [t.title for t in section.tables]
    assert len(titles) == 2 and "Gradient norms at x0" in titles[1]
    assert {f.key for f in section.findings} == {"gradient-right", "balance", "learning-rate"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LlavaOnevision, {}),
        (Reversed, {"gradient-wrong": "will not learn"}),
        (Detached, {"gradient-zero": "will not learn"}),
    ],
)
def test_a_wrong_gradient_and_one_that_does_not_arrive_are_found(demo, kind, expected) -> None:
    subject, section = subject_with(demo, open_as(kind)), Section("gradient", "Gradient")
    report_gradients(section, subject, subject.recipe.stages[1], subject.student())
    assert severities(section) == expected


def test_finite_differences_leave_the_student_as_it_was(demo) -> None:
    subject = subject_with(demo)
    before = [p.detach().clone() for p in subject.student().parameters()]
    example = demo.examples[0]
    question = questions_for(example.edit_type, example.instruction, example.object, "short")[0]
    found = check_question(subject.parts, subject.student(), example, question, 4, 0)
    assert found.norm > 0 and found.error is not None and found.error < 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, subject.student().parameters()))


def test_a_gradient_that_is_not_finite_has_no_error(demo) -> None:
    critic = open_as(LlavaOnevision)
    with torch.no_grad():
        critic.model.lm_head.weight[0].fill_(math.inf)
        critic.model.lm_head.weight[critic.yes].fill_(math.nan)
    subject = subject_with(demo, critic)
    example = demo.examples[0]
    question = questions_for(example.edit_type, example.instruction, example.object, "short")[0]
    found = check_question(subject.parts, subject.student(), example, question, 2, 0)
    assert not math.isfinite(found.norm) and found.error is None


def test_a_learning_rate_that_breaks_the_student_is_found_and_the_student_is_restored(demo) -> None:
    subject = subject_with(demo, None, "stages.1.settings.critic_weight=0", "stages.1.settings.student.lr=0.1")
    subject.parts = Parts(subject.parts.family, None, "short", subject.parts.device)
    before = [p.detach().clone() for p in subject.student().parameters()]
    section = Section("gradient", "Gradient")
    for stage in subject.recipe.stages:
        report_learning_rate(section, subject, stage, subject.student())
    assert severities(section) == {"learning-rate": "will not learn"}
    assert [f.measured.split(":")[0] for f in section.findings if f.severity != "ok"] == ["np_edit"]
    assert all(torch.equal(a, b) for a, b in zip(before, subject.student().parameters()))


@pytest.mark.parametrize("weight", ["1.0e-3", "1.0e+3"])
def test_gradients_of_very_different_size_are_found(demo, weight) -> None:
    overrides = ("stages.1.settings.balance=none", f"stages.1.settings.critic_weight={weight}")
    subject, section = subject_with(demo, None, *overrides), Section("gradient", "Gradient")
    report_balance(section, subject, subject.recipe.stages[1], subject.student())
    assert severities(section) == {"balance": "warning"}
