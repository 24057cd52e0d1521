"""A curve in bounded memory: numbers come in one by one, and neighbours are joined as the curve grows."""

from __future__ import annotations

from dataclasses import dataclass

MOST_PARTS = 256  # of a curve; about one for each pixel of a drawn one


@dataclass
class CurvePart:
    """Neighbouring points of a curve: their first step, how many they are, the sum of their values, the lowest and the
    highest value."""

    step: int
    count: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return self.total / self.count

    def add(self, other: CurvePart) -> None:
        """Join the part after this one with this one."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class ThinnedCurve:
    """At most `MOST_PARTS` parts of equally many points; the last part may have fewer.

    Attributes:
        last: the last value; NaN before the first.
    """

    def __init__(self) -> None:
        self.parts: list[CurvePart] = []
        self.last = float("nan")
        self._points_per_part = 1

    def add(self, step: int, value: float) -> None:
        """Add the next point."""
        self.last = value
        point = CurvePart(step, 1, value, value, value)
        if self.parts and self.parts[-1].count < self._points_per_part:
            self.parts[-1].add(point)
            return
        if len(self.parts) == MOST_PARTS:
            self._join_neighbours()
        self.parts.append(point)

    def _join_neighbours(self) -> None:
        for left, right in zip(self.parts[::2], self.parts[1::2], strict=True):
            left.add(right)
        self.parts = self.parts[::2]
        self._points_per_part *= 2
