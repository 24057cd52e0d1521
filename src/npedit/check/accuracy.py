"""How well probabilities fit known answers: accuracy, area under the ROC curve (AUC), calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 5  # of equal width, of the calibration table


@dataclass(frozen=True)
class Accuracy:
    """`count` answers, `right` of them right at the threshold 0.5. `auc` is the probability that a case whose truth is
    yes gets a higher p than one whose truth is no; None where one of the two is missing. `calibration_error` is the
    mean distance of p to the share of yes, by bins of p."""

    count: int
    positive: int
    right: int
    auc: float | None
    calibration_error: float

    @property
    def share(self) -> float:
        """Accuracy in [0, 1]."""
        return self.right / self.count

    @property
    def has_both(self) -> bool:
        """Whether at least five cases of each truth are there."""
        return min(self.positive, self.count - self.positive) >= 5

    @property
    def balanced_auc(self) -> float:
        """The AUC; 0.5 where it is not known."""
        return 0.5 if self.auc is None else self.auc


def measure_accuracy(p: Sequence[float], truth: Sequence[bool]) -> Accuracy:
    """The accuracy of probabilities p that the truth is yes.

    Raises:
        ValueError: no case was given, or p is not finite.
    """
    values, labels = np.asarray(p, dtype=float), np.asarray(truth, dtype=bool)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected at least one finite probability; got {list(p)[:5]}")
    right = int(((values > 0.5) == labels).sum())
    return Accuracy(len(values), int(labels.sum()), right, area_under_curve(values, labels), _error(values, labels))


def area_under_curve(values: np.ndarray, labels: np.ndarray) -> float | None:
    """See `Accuracy.auc`; equal values count half."""
    yes, no = values[labels], values[~labels]
    if not len(yes) or not len(no):
        return None
    return float(np.mean((yes[:, None] > no) + 0.5 * (yes[:, None] == no)))


def calibration_rows(p: Sequence[float], truth: Sequence[bool]) -> list[tuple[str, int, float, float]]:
    """(range of p, cases, mean p, share of yes) of each bin that has cases."""
    values, labels = np.asarray(p, dtype=float), np.asarray(truth, dtype=bool)
    rows = []
    for number in range(BINS):
        inside = _bin(values) == number
        if inside.any():
            name = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
            rows.append((name, int(inside.sum()), float(values[inside].mean()), float(labels[inside].mean())))
    return rows


def _bin(values: np.ndarray) -> np.ndarray:
    return np.minimum((values * BINS).astype(int), BINS - 1)


def _error(values: np.ndarray, labels: np.ndarray) -> float:
    numbers = _bin(values)
    bins = [numbers == number for number in range(BINS)]
    return float(
        sum(inside.sum() * abs(values[inside].mean() - labels[inside].mean()) for inside in bins if inside.any())
        / len(values)
    )
