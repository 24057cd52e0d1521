"""Rubrics and graded questions in the training step: the gradient written out, and when it is the usual one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tests.support.side_by_side as two
from npedit.critics.base import scale_margin
from npedit.critics.ensemble import Ensemble
from npedit.critics.internvl import InternVL
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.data import Batch
from npedit.errors import UserError
from npedit.item_questions import grade_question, item_questions, rubric_questions
from npedit.questions import GRADES, questions_for
from npedit.recipe.config import MemorySettings, embedded_weights
from npedit.steps._critic_gradient import CriticFeedback, CriticGradient, CriticGradientSettings
from npedit.steps.base import Parts
from npedit.training import trainer
from tests.support.parts import batch, parts

RUBRICS = (
    '[{"question": "is the circle red ?", "answer": "yes"}, {"question": "is there a dog ?", "answer": "no"}]',
    '[{"question": "is it the same dog ?", "answer": "no", "images": "both"}]',
    "",
)


@pytest.fixture(scope="module")
def shared() -> Parts:
    return parts()


def with_rubrics(*rubrics: str) -> Batch:
    return replace(batch(*range(len(rubrics))), questions=rubrics)


def feedback(shared: Parts, given: Batch, update: int = 0, **settings) -> CriticFeedback:
    """What the critic says about edited latents that differ a little from the references'."""
    chosen = CriticGradientSettings(**({"critic_weight": 1.0, "ramp_updates": 0} | settings))
    x0 = shared.family.encode(given.references)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    return CriticGradient(chosen, shared)(given, x0 + 0.1 * noise, update)


def usual_as_rubric(given: Batch, wording: str) -> Batch:
    """The batch whose rubrics are the very texts of the usual questions."""
    rubrics = [
        json.dumps(
            [
                {"question": q.text, "answer": "yes" if q.answer > 0 else "no"}
                | ({"images": "both"} if len(q.looks_at) == 2 else {})
                for q in questions_for(kind, words, thing, wording)
            ]
        )
        for kind, words, thing in zip(given.edit_types, given.instructions, given.objects)
    ]
    return replace(given, questions=tuple(rubrics))


@pytest.mark.parametrize("answer", ["two_way", "vocabulary"])
def test_a_rubric_of_the_usual_questions_is_the_usual_loss_exactly(shared, answer):
    given = batch(0, 1, 2, nothing=(2,))  # a removal and a "do nothing" item among them
    usual = feedback(shared, given, answer=answer, ramp_updates=10, update=3)
    own = feedback(shared, usual_as_rubric(given, "short"), answer=answer, rubric="instead", ramp_updates=10, update=3)
    assert torch.equal(own.gradient, usual.gradient) and torch.equal(own.error, usual.error)
    assert usual.gradient.abs().max() > 0
    assert "critic/p_rubric" in own.metrics and "critic/p_edit" not in own.metrics


def test_rubrics_in_the_data_change_nothing_while_the_setting_is_off(shared):
    plain, unused = feedback(shared, batch(0, 1, 2)), feedback(shared, with_rubrics(*RUBRICS))
    assert torch.equal(plain.gradient, unused.gradient) and plain.metrics == unused.metrics


def test_an_item_with_the_same_question_twice_counts_once(shared):
    once = '[{"question": "is the circle red ?", "answer": "yes"}]'
    twice = json.dumps(json.loads(once) * 2)
    a, b = (feedback(shared, with_rubrics(r), rubric="beside", rubric_weight=0.7) for r in (once, twice))
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(a.error, b.error)


def written_out(shared: Parts, given: Batch, heat: float, **settings) -> tuple[Tensor, Tensor]:
    """The gradient at x0 of the loss that the formulas give, one question at a time, and each item's error."""
    critic, choice = shared.critic, CriticGradientSettings(**settings).question_choice()
    x0 = shared.family.encode(given.references)
    x0 = (x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))).requires_grad_()
    images, total, errors = shared.family.decode(x0), torch.zeros(()), []
    for i in range(len(given)):
        pictures = {"reference": given.references[i], "edited": images[i]}
        about = (given.edit_types[i], given.instructions[i], given.objects[i], given.questions[i])
        wrong, shares = 0.0, 0.0
        for question, weight, share in item_questions(*about, "short", choice):
            seen = [critic.encode_images(pictures[name][None])[0] for name in question.looks_at]
            logits = critic.logits([question.text], [seen], answers=[question.answers])
            logits = logits[0, critic.answer_ids(question.answers)]
            values = torch.linspace(0, 1, len(question.answers))
            scores = [(t * logits).softmax(0) @ (values if question.answer > 0 else 1 - values) for t in (heat, 1.0)]
            total = total - weight * scores[0].log() / len(given)
            wrong, shares = wrong + share * (1 - float(scores[1].detach())), shares + share
        errors.append(wrong / shares)
    return torch.autograd.grad(total, x0)[0], torch.tensor(errors)


@pytest.mark.parametrize(
    "settings",
    [
        {"rubric": "beside", "rubric_weight": 0.6, "identity_weight": 0.4},
        {"rubric": "instead", "rubric_weight": 2.0},
        {"grade": "beside", "grade_weight": 0.3},
        {"grade": "instead", "rubric": "beside"},
    ],
)
@pytest.mark.parametrize("update", [0, 5])
def test_the_gradient_is_that_of_the_written_out_loss(shared, settings, update):
    given, heat = with_rubrics(*RUBRICS), {0: 0.2, 5: 0.6}[update]
    gradient, errors = written_out(shared, given, heat, **settings)
    ours = feedback(shared, given, update, ramp_from=0.2, ramp_updates=10, **settings)
    torch.testing.assert_close(ours.gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    torch.testing.assert_close(ours.error, errors, rtol=1e-4, atol=1e-5)


def test_what_is_logged_about_rubrics_and_grades(shared):
    given = with_rubrics(*RUBRICS)
    seen = feedback(shared, given, rubric="beside", grade="beside").metrics
    for name in ("rubric", "grade", "edit", "identity"):
        assert 0 < seen[f"critic/p_{name}"] < 1 and seen[f"loss/critic_{name}"] > 0
    plain = feedback(shared, given).metrics
    assert seen["critic/p_edit"] == pytest.approx(plain["critic/p_edit"], abs=1e-6)
    assert feedback(shared, given, rubric="beside").metrics.keys() - plain.keys() == {
        "critic/p_rubric", "loss/critic_rubric",
    }  # fmt: skip


def test_packed_questions_change_answers_by_rounding_and_take_fewer_operations():
    """The rubric's questions about the edited image share one row; the grade shares that of the usual questions."""
    found, given = {}, with_rubrics(*RUBRICS)
    for packed in (False, True):
        memory = MemorySettings(packed_questions=packed)
        these = replace(parts(critic=False), critic=InternVL.tiny(0), memory=memory)
        with FlopCounterMode(display=False) as counter:
            said = feedback(these, given, rubric="beside", grade="beside")
        found[packed] = (said, counter.get_total_flops())
    (plain, most), (packed, few) = found[False], found[True]
    assert packed.metrics == pytest.approx(plain.metrics, abs=1e-5) and few < 0.95 * most
    torch.testing.assert_close(packed.gradient, plain.gradient, atol=1e-4 * float(plain.gradient.abs().max()), rtol=0)


def test_an_ensemble_logs_each_members_own_grade():
    critic = Ensemble.tiny(0)
    these = replace(parts(critic=False), critic=critic)
    given = batch(0)
    said = feedback(these, given, grade="instead", identity_weight=0)
    for name, own in critic.member_logits.items():
        margin = scale_margin(own[:, critic.answer_ids(GRADES)])
        assert said.metrics[f"critic/p_of/{name}"] == pytest.approx(float(margin.sigmoid()), abs=1e-6)
    assert said.gradient.abs().max() > 0


def test_a_critic_without_digits_is_refused_before_the_first_update(shared):
    toy = LlavaOnevision.load(embedded_weights("critic"), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="grade: expected the answers '1', .* one token each.*set grade to off"):
        CriticGradient(CriticGradientSettings(grade="beside"), replace(shared, critic=toy))
    CriticGradient(CriticGradientSettings(rubric="beside"), replace(shared, critic=toy))


def test_such_a_critic_is_refused_before_the_stages_that_do_not_ask_it(tmp_path):
    """The recipe has a stage without a critic first, which would be trained in vain."""
    toy = LlavaOnevision.load(embedded_weights("critic"), torch.float32, torch.device("cpu"))
    stages = [
        {"step": "reference_copy", "updates": 2, "batch_size": 4, "settings": {"steps": 2}},
        {"step": "np_edit", "updates": 2, "batch_size": 4, "settings": {"steps": 2, "grade": "beside"}},
    ]
    events = []
    with pytest.raises(UserError, match=r"stages\.1\.settings\.grade: expected the answers '1', .* one token each"):
        trainer.train(
            two.recipe(stages=stages),
            tmp_path / "run",
            lambda name, _: events.append(name),
            parts=lambda made: replace(two.parts(made), critic=toy),
        )
    assert not events


def test_the_texts_reach_the_critic(shared, monkeypatch):
    asked, real = [], shared.critic.logits
    monkeypatch.setattr(shared.critic, "logits", lambda q, seen, packed, answers: asked.extend(q) or real(q, seen))
    feedback(shared, with_rubrics(RUBRICS[0]), rubric="instead", grade="beside")
    wanted = [q.text for q in rubric_questions(RUBRICS[0], "short")]
    assert asked == [*wanted, grade_question("paint the circle red", "short").text]
