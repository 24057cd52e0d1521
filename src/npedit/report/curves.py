"""The numbers of a run's metrics, ready to be drawn: by key, smoothed, and thinned out where a run is long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]

LARGEST = 1e30  # larger numbers, as of a training that diverged, are not drawn: axes are limited to floats
MAX_POINTS = 4000  # of one drawn curve; more than twice a figure's width in pixels
COLOURS = ("#2484c6", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6bb1", "#9a8f1f", "#7f7f7f", "#a6761d")
LOSSES = {
    "loss/critic_edit": "critic: is the edit applied?",
    "loss/critic_identity": "critic: is the rest preserved?",
    "loss/dmd": "distribution matching (size of the DMD gradient)",
    "loss/copy": "identity edits: distance to the reference",
    "loss/fake": "fake score: flow matching",
    "loss/supervised": "supervised: distance to the true edit",
    "loss/prior": "bootstrap: prior of the edit",
    "loss/prior_reverse": "bootstrap: prior of the reverse edit",
    "loss/cycle": "bootstrap: the reference from its edit",
    "loss/identity": "bootstrap: the reference from itself",
    "loss/kl": "Flow-GRPO: KL divergence to the initial weights",
}


class Curves:
    """The numbers of a run's metrics by key, collected in one pass over the rows.

    Attributes:
        stage_starts: the first update of each stage but the first.
    """

    def __init__(self, rows: Rows) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {}
        self.stage_starts: list[int] = []
        stage = None
        for row in rows:
            step = row["step"]
            for key, value in row.items():
                if isinstance(value, int | float) and abs(value) <= LARGEST:
                    self._points.setdefault(key, []).append((step, float(value)))
            if row.get("stage", stage) != stage:
                self.stage_starts += [] if stage is None else [step]
                stage = row["stage"]

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has a finite number under `key`, of a size that can be drawn."""
        return self._points.get(key, [])

    def keys_with(self, prefix: str) -> list[str]:
        """The keys with this prefix that have numbers, sorted."""
        return sorted(key for key in self._points if key.startswith(prefix))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the values around each; the window is cut off at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def thin_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points (x, y) of a long curve, in order: the lowest and the highest of each equal part, so
    that the drawn curve has the same extent everywhere."""
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS // 2 + 1).astype(int)
    parts = [(low, high) for low, high in zip(edges[:-1], edges[1:])]
    kept = {k for low, high in parts for k in (low + int(y[low:high].argmin()), low + int(y[low:high].argmax()))}
    places = np.array(sorted(kept))
    return x[places], y[places]
