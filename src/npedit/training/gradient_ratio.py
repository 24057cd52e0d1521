"""A warning when one of the two gradients of NP-Edit has had no say for long: the critic's or that of distribution
matching (DMD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LOWEST, HIGHEST = 0.1, 10.0  # of the critic's gradient norm over DMD's
UPDATES = 200  # in a row


class GradientRatioCheck:
    """Looks at rows of metrics in their order. A resumed run begins to count again."""

    def __init__(self) -> None:
        self.below = self.above = 0  # updates in a row

    def add(self, row: Mapping[str, Any]) -> str:
        """The warning that this row raises, "" if none. It is raised again only after a ratio within the limits, or
        after as many updates on the other side. Rows of updates without both gradients end the count."""
        ratio = _gradient_ratio(row)
        self.below = self.below + 1 if ratio < LOWEST else 0
        self.above = self.above + 1 if ratio > HIGHEST else 0
        if max(self.below, self.above) != UPDATES:
            return ""
        small, large, change = (
            ("critic's", "DMD's", "raise") if self.below else ("DMD's", "critic's", "lower")
        )  # fmt: skip
        return (
            f"for {UPDATES} updates the {small} gradient at x0 has been less than a tenth of the {large} "
            f"(critic / DMD: {ratio:.3g}), so training follows the {large} alone. Set balance: item, or {change} "
            "critic_weight."
        )


def _gradient_ratio(row: Mapping[str, Any]) -> float:
    """The critic's gradient norm over DMD's; NaN where a row lacks one of the two losses, or a norm is not finite."""
    if "loss/dmd" not in row or "critic/inverse_temperature" not in row:
        return math.nan
    critic, dmd = (float(row[f"grad_norm/from_{name}"]) for name in ("critic", "dmd"))
    if not (math.isfinite(critic) and math.isfinite(dmd)) or critic == dmd == 0:
        return math.nan
    return critic / dmd if dmd else math.inf
