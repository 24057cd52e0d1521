"""The losses of a critic's answers, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from npedit.critics.base import answer_loss, vocabulary_loss


def test_answer_loss_is_minus_log_sigmoid():
    margin, answer = torch.tensor([0.3, 0.3, -2.0, 1.5]), torch.tensor([1, -1, 1, -1])
    for heat in (1.0, 0.1):
        hand = [-math.log(1 / (1 + math.exp(-a * heat * m))) for m, a in zip(margin.tolist(), answer.tolist())]
        torch.testing.assert_close(answer_loss(margin, answer, heat), torch.tensor(hand))


def test_answer_loss_is_the_two_way_cross_entropy():
    """The same number as a cross-entropy over the two logits alone (fault 24's kin: the sign and the order of the
    two)."""
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) * 4
    answer = torch.tensor([1, -1, 1, -1, 1, -1])
    wanted = torch.nn.functional.cross_entropy(logits, (answer < 0).long(), reduction="none")  # column 0 is Yes
    torch.testing.assert_close(answer_loss(logits[:, 0] - logits[:, 1], answer), wanted)


def test_extreme_margins_stay_finite():
    margin = torch.tensor([1e4, -1e4, 1e30, -1e30], requires_grad=True)
    loss = answer_loss(margin, torch.tensor([1, 1, -1, -1]))
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert loss[0] == 0 and loss[1] == 1e4
    assert gradient.tolist() == pytest.approx([0, -1, 1, 0])


def test_vocabulary_loss_by_hand():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    answer = torch.tensor([1, -1, 1])
    for heat in (1.0, 0.5):
        total = (heat * logits).exp().sum(1).log()
        hand = torch.stack([total[i] - heat * logits[i, c] for i, c in enumerate((4, 2, 4))])
        torch.testing.assert_close(vocabulary_loss(logits, answer, yes=4, no=2, inverse_temperature=heat), hand)
    huge = vocabulary_loss(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([-1]), yes=0, no=1)
    assert huge.item() == pytest.approx(2e4)


def test_the_vocabulary_takes_probability_from_the_two_way_answer():
    """Over the vocabulary the other words count too: the loss is never smaller."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    answer = torch.tensor([1, -1, 1, -1, 1])
    assert (vocabulary_loss(logits, answer, 3, 5) >= answer_loss(logits[:, 3] - logits[:, 5], answer)).all()
