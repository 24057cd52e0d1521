"""Answers on a scale: the margin of the expected score, its loss and gradient, and the digits of each critic."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from npedit.critics.base import Critic, answer_loss, question_margins, scale_margin
from npedit.critics.ensemble import Ensemble
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.critics.smolvlm import SmolVLM
from npedit.item_questions import grade_question, rubric_questions
from npedit.questions import GRADES, YES_NO, questions_for
from npedit.recipe.config import embedded_weights
from tests.support.chat_critics import images
from tests.support.critics import MAKERS

VALUES = torch.linspace(0, 1, 5, dtype=torch.float64)
RUBRIC = '[{"question": "is the dog blue ?", "answer": "yes"}, {"question": "is there a fence ?", "answer": "no"}]'
LOOKS_AT = {"reference": 0, "edited": 1}


def grades(rows: int = 6, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Random logits (rows, 5) of the five grades."""
    return scale * torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("heat", [1.0, 0.1])
def test_the_margin_is_the_log_odds_of_the_expected_score(heat):
    logits = grades()
    expected = (heat * logits).softmax(1) @ VALUES
    torch.testing.assert_close(scale_margin(logits, heat), (expected / (1 - expected)).log())
    for answer, score in ((1, expected), (-1, 1 - expected)):
        loss = answer_loss(scale_margin(logits, heat), torch.full((6,), answer))
        torch.testing.assert_close(loss, -score.log())


@pytest.mark.parametrize("heat", [1.0, 0.3])
def test_two_answers_give_the_two_way_loss_bit_for_bit(heat):
    margin = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 9
    pair = torch.stack([torch.zeros(50), margin], 1).requires_grad_()
    answer = torch.tensor([1, -1]).repeat(25)
    ours, usual = answer_loss(scale_margin(pair, heat), answer), answer_loss(pair[:, 1] - pair[:, 0], answer, heat)
    assert torch.equal(ours, usual)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), pair)[0] for loss in (ours, usual)))


def test_if_only_the_ends_are_possible_the_loss_is_that_of_yes_and_no():
    ends = torch.tensor([[2.0, -1e3, -1e3, -1e3, -1.0], [0.0, -1e3, -1e3, -1e3, 4.0]])
    torch.testing.assert_close(scale_margin(ends), ends[:, 4] - ends[:, 0])


def test_the_gradient_is_the_formula():
    """d(-log e) / dz_k = p_k - p_k v_k / e, with p the softmax, v the values and e the expected score."""
    logits = grades().requires_grad_()
    (gradient,) = torch.autograd.grad(answer_loss(scale_margin(logits), torch.ones(6)).sum(), logits)
    p = logits.detach().softmax(1)
    torch.testing.assert_close(gradient, p - p * VALUES / (p @ VALUES)[:, None])


@pytest.mark.parametrize("answer", [1, -1])
def test_the_gradient_is_that_of_finite_differences(answer):
    answers = torch.full((3,), answer)
    assert torch.autograd.gradcheck(
        lambda z: answer_loss(scale_margin(z, 0.7), answers), (grades(3, 2).requires_grad_(),)
    )


def test_a_critic_that_is_sure_of_the_lowest_grade_still_gives_a_gradient():
    """The squared distance of the expected score to 1 gives almost none."""
    sure = torch.tensor([[20.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(answer_loss(scale_margin(sure), torch.ones(1)).sum(), sure)
    (squared,) = torch.autograd.grad((sure.softmax(1) @ VALUES - 1).square().sum(), sure)
    assert ours.norm() > 0.5 and squared.norm() < 1e-6


def test_extreme_logits_stay_finite():
    huge = torch.tensor([[1e4, 0, 0, 0, -1e4], [-1e4, 0, 0, 0, 1e4]], requires_grad=True)
    loss = answer_loss(scale_margin(huge), torch.tensor([1, -1]))
    (gradient,) = torch.autograd.grad(loss.sum(), huge)
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient.abs().sum() > 0.5


def test_each_question_gets_the_margin_of_its_own_answers():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    ids = {YES_NO: [7, 2], GRADES: [1, 3, 4, 5, 8]}
    found = question_margins(logits, [GRADES, YES_NO, GRADES, YES_NO], ids, 0.5)
    for row, margin in enumerate(found):
        own = ids[YES_NO] if row % 2 else ids[GRADES]
        torch.testing.assert_close(margin, scale_margin(logits[row : row + 1, own], 0.5)[0])


# ------------------------------------------------------------------------------------------------------- the critics


@pytest.fixture(scope="module", params=[*MAKERS, "ensemble"])
def critic(request) -> Critic:
    return Ensemble.tiny(0) if request.param == "ensemble" else MAKERS[request.param](0)


def test_each_family_answers_with_five_digits(critic):
    ids = critic.answer_ids(GRADES)
    assert len({*ids, critic.yes, critic.no}) == 7
    assert critic.answer_ids(YES_NO) == [critic.no, critic.yes]
    for member in getattr(critic, "members", [critic]):
        assert [member.tokenizer.decode([number]).strip() for number in member.answer_ids(GRADES)] == list(GRADES)


def ask(critic: Critic, packed: bool) -> tuple[Tensor, Tensor]:
    """The margins of usual, rubric and graded questions about one edit, and the gradient of their sum."""
    asked = [*questions_for("recolour", "paint it blue"), *rubric_questions(RUBRIC), grade_question("paint it blue")]
    pictures = images(2).requires_grad_()
    visual = critic.encode_images(pictures)
    seen = [[visual[LOOKS_AT[name]] for name in q.looks_at] for q in asked]
    logits = critic.logits([q.text for q in asked], seen, packed, [q.answers for q in asked])
    ids = {scale: critic.answer_ids(scale) for scale in (YES_NO, GRADES)}
    margins = question_margins(logits, [q.answers for q in asked], ids)
    (gradient,) = torch.autograd.grad(margins.sum(), pictures)
    return margins.detach(), gradient


def test_rubric_and_grade_share_the_packed_rows(critic):
    plain, packed = ask(critic, False), ask(critic, True)
    torch.testing.assert_close(packed[0], plain[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(packed[1], plain[1], atol=1e-6, rtol=0)
    assert plain[1].abs().max() > 1e-4 and not torch.equal(packed[0], plain[0])


def test_a_graded_question_gives_a_gradient_at_the_picture(critic):
    """Against finite differences of the whole critic, in float64."""
    pictures = images(2).double()
    for part in getattr(critic, "members", [critic]):
        part.model.double()
    question = grade_question("paint it blue")
    ids = critic.answer_ids(GRADES)

    def loss(shift: Tensor) -> Tensor:
        visual = critic.encode_images(torch.stack([pictures[0], pictures[1] + shift]))
        logits = critic.logits([question.text], [visual], answers=[GRADES])
        return answer_loss(scale_margin(logits[:, ids].double()), torch.ones(1)).sum()

    shift = torch.zeros(3, 32, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(shift), shift)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(1e-2 * direction) - loss(-1e-2 * direction)) / 2e-2
    for part in getattr(critic, "members", [critic]):
        part.model.float()
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_a_space_before_the_digits_may_be_a_token_of_its_own():
    """As the published SmolVLM2's tokenizer has it: " 5" is a space and a digit. The answer comes after the space."""
    critic = SmolVLM.tiny(0)
    state = json.loads(critic.tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, state["pre_tokenizer"]],
    }
    space, unused = state["model"]["vocab"], "Ġdone"
    space["Ġ"] = space.pop(unused)
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|im_end|>", eos_token="<end_of_utterance>", unk_token="<unk>"
    )
    split = SmolVLM(critic.model, tokenizer, critic.processor, critic.template, critic.device)
    assert tokenizer.convert_ids_to_tokens(split.answer_ids(GRADES)) == list(GRADES)
    visual, text = split.encode_images(images(2)), grade_question("paint it blue").text
    found = split.logits([text, "is it red ?"], [visual, visual], answers=[GRADES, YES_NO])
    rows = [split._prompt_ids(text, visual) + [space["Ġ"]], split._prompt_ids("is it red ?", visual)]
    wanted = split.model.lm_head(split._last_states(rows, [visual, visual])).float()
    assert torch.equal(found, wanted)
    packed = split.logits([text, "is it red ?"], [visual, visual], True, [GRADES, YES_NO])
    torch.testing.assert_close(packed, found, atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ the ensemble


def test_an_ensembles_grade_is_the_mean_of_log_probabilities():
    critic = Ensemble.tiny(0)
    visual = critic.encode_images(images(2))
    question = grade_question("paint it blue")
    pooled = critic.logits([question.text], [visual])[:, critic.answer_ids(GRADES)]
    each = [
        member.logits([question.text], [[tokens[i] for tokens in visual]])[:, member.answer_ids(GRADES)].log_softmax(1)
        for i, member in enumerate(critic.members)
    ]
    torch.testing.assert_close(pooled, sum(each) / 2)


def test_a_critic_without_digits_is_refused():
    toy = LlavaOnevision.load(embedded_weights("critic"), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="'1', .* one token each"):
        toy.answer_ids(GRADES)
    chat = MAKERS["internvl"](0)
    with pytest.raises(ValueError, match="'7', '8' to differ in one token each.*<unk>"):
        chat.answer_ids(("7", "8"))
    both = Ensemble([toy, MAKERS["smolvlm"](0)])
    with pytest.raises(ValueError, match="a member of the ensemble.*'1', .* one token each"):
        both.answer_ids(GRADES)
    assert both.logits(["is it ?"], [both.encode_images(images(1))]).shape == (1, 2)
    with pytest.raises(ValueError, match="words that members share; got '6'"):
        Ensemble.tiny(0).answer_id("6")
