"""Accuracy, AUC and calibration of probabilities."""

from __future__ import annotations

import pytest

from npedit.check.accuracy import calibration_rows, measure_accuracy


def test_perfect_reversed_and_blind() -> None:
    truth = [True] * 5 + [False] * 5
    assert measure_accuracy([0.9] * 5 + [0.1] * 5, truth).auc == 1.0
    assert measure_accuracy([0.1] * 5 + [0.9] * 5, truth).auc == 0.0
    blind = measure_accuracy([0.7] * 10, truth)
    assert (blind.auc, blind.share) == (0.5, 0.5)


def test_order_can_be_right_where_the_threshold_is_wrong() -> None:
    found = measure_accuracy([0.3, 0.2, 0.1, 0.05], [True, True, False, False])
    assert (found.auc, found.share, found.has_both) == (1.0, 0.5, False)


def test_one_truth_alone_has_no_auc() -> None:
    found = measure_accuracy([0.9, 0.8], [True, True])
    assert (found.auc, found.balanced_auc, found.share) == (None, 0.5, 1.0)


def test_calibration() -> None:
    p, truth = [0.9] * 10 + [0.1] * 10, [True] * 9 + [False] + [True] + [False] * 9
    assert measure_accuracy(p, truth).calibration_error == pytest.approx(0, abs=1e-9)
    assert calibration_rows(p, truth) == [
        ("0.0 to 0.2", 10, pytest.approx(0.1), pytest.approx(0.1)),
        ("0.8 to 1.0", 10, pytest.approx(0.9), pytest.approx(0.9)),
    ]
    assert measure_accuracy([1.0] * 4, [True, False, True, False]).calibration_error == pytest.approx(0.5)


@pytest.mark.parametrize("p", [[], [float("nan")]])
def test_no_number_is_an_error(p) -> None:
    with pytest.raises(ValueError, match="finite probability"):
        measure_accuracy(p, [True] * len(p))
