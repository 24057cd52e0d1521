"""Rewards and success rates of runs with Flow-GRPO, drawn side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npedit.report.curves import COLOURS, Curves, Rows, running_mean
from npedit.report.plots import encode_figure, new_figure

PANELS = {"reward/mean": "mean reward of the samples", "eval/both": "success rate on held-out scenes"}


def plot_reward_curves(runs: Mapping[str, Rows]) -> bytes:
    """A PNG with the rewards and the success rates of several runs over their updates, one colour for each run. The
    rewards are running means. A run without such numbers has no line."""
    figure = new_figure((10.8, 3.6))
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            if points := Curves(rows).points(key):
                x, y = (np.array(values) for values in zip(*points, strict=True))
                y = y if key == "eval/both" else running_mean(y)
                style = "--" if i >= len(COLOURS) else "-"
                mark = "o" if key == "eval/both" or len(x) < 3 else ""
                axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], marker=mark, markersize=3, label=name)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.set_xlabel("update", fontsize=9)
        axes.grid(axis="y", alpha=0.25)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside right center", frameon=False, fontsize=8.5)
    return encode_figure(figure)


def reward_ends(rows: Rows) -> tuple[float, float] | None:
    """The mean reward over the first and over the last tenth of the updates; None without rewards."""
    rewards = [value for _, value in Curves(rows).points("reward/mean")]
    if not rewards:
        return None
    part = max(1, len(rewards) // 10)
    return sum(rewards[:part]) / part, sum(rewards[-part:]) / part
