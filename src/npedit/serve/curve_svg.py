"""Small curves as SVG pictures, for the status page. Colours fit light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from npedit.report.curves import COLOURS, LOSSES, running_mean
from npedit.scoring.reward_hacking import CRITIC_KEYS, HELD_OUT_KEYS
from npedit.serve.run_figures import SUCCESS, RunFigures
from npedit.serve.thinned_curve import CurvePart, ThinnedCurve

WIDTH, HEIGHT = 340, 150
LEFT, TOP, RIGHT, BOTTOM = 40, 28, 330, 128  # of the axes
EXTRA_ROOM = 1.1  # the vertical axis ends so much above the highest mean
STYLE = """text { font: 11px system-ui, sans-serif; fill: #5b6472 } .title { font-weight: 600; fill: #1c2330 }
.axis { stroke: #8888; fill: none } .grid { stroke: #8883; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #9aa3b2 } .title { fill: #e8eaee } }"""


@dataclass(frozen=True)
class Panel:
    """One small picture: its title, and the name in the legend of each key's curve. A share is drawn from 0 to 100 %.
    The figures of evaluations are few, and are drawn as they are, with dots."""

    title: str
    curves: dict[str, str]
    is_share: bool = False
    is_evaluation: bool = False

    def keys_in(self, figures: RunFigures) -> list[str]:
        """The keys that a run has numbers for."""
        return [key for key in self.curves if key in figures.curves]


JUDGE_EDIT, JUDGE_IDENTITY = HELD_OUT_KEYS["held-out judge"]
JUDGE_PANEL = Panel(
    "held-out judge", {JUDGE_EDIT: "applied", JUDGE_IDENTITY: "rest kept"}, is_share=True, is_evaluation=True
)
PANELS = (
    Panel("success", {SUCCESS: "success"}, is_share=True, is_evaluation=True),
    JUDGE_PANEL,
    Panel("critic", dict(zip(CRITIC_KEYS, ("applied", "grade", "rubric", "rest kept"), strict=True)), is_share=True),
    *(Panel(title.partition(" (")[0], {key: key.removeprefix("loss/")}) for key, title in LOSSES.items()),
)


def draw_panel(panel: Panel, figures: RunFigures) -> str:
    """The panel as an SVG picture. A curve is the running mean; the band behind it has the lowest and highest values
    of neighbouring updates."""
    keys = panel.keys_in(figures)
    curves = [figures.curves[key] for key in keys]
    top = 1.0 if panel.is_share else _highest(curves)
    axes = _Axes(max(1, figures.update), top)
    drawn = [_draw_curve(axes, curve, COLOURS[i], panel.is_evaluation) for i, curve in enumerate(curves)]
    legend = [(panel.curves[key], COLOURS[i]) for i, key in enumerate(keys)] if len(keys) > 1 else []
    parts = [_draw_title(panel, curves), *_draw_grid(axes, panel.is_share), *drawn, *_draw_legend(legend)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<style>{STYLE}</style><clipPath id="axes"><rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
        f'height="{BOTTOM - TOP}"/></clipPath>{"".join(parts)}</svg>\n'
    )


def format_figure(value: float, is_share: bool) -> str:
    """A figure of a curve with two or three digits; its unit stays on its line."""
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if is_share else f"{value:.3g}"


@dataclass(frozen=True)
class _Axes:
    """From 0 to the last step, and from 0 to `top`."""

    last_step: int
    top: float

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / self.last_step

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(2.0, max(-1.0, value / self.top))

    def points(self, steps: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(steps, values, strict=True))


def _highest(curves: Sequence[ThinnedCurve]) -> float:
    """The upper end of the vertical axis: above all running means."""
    highest = max((max(_means(curve.parts)) for curve in curves), default=0.0)
    return EXTRA_ROOM * highest if highest > 0 else 1.0


def _means(parts: Sequence[CurvePart]) -> list[float]:
    return running_mean(np.array([part.mean for part in parts])).tolist()


def _draw_curve(axes: _Axes, curve: ThinnedCurve, colour: str, is_evaluation: bool) -> str:
    parts = curve.parts
    steps = [part.step + (parts[1].step - parts[0].step if len(parts) > 1 else 0) / 2 for part in parts]
    if is_evaluation or len(parts) == 1:
        steps, means = [part.step for part in parts], [part.mean for part in parts]
        dots = "".join(f'<circle cx="{axes.x(s):.1f}" cy="{axes.y(m):.1f}" r="2.5"/>' for s, m in zip(steps, means))
        return f'<g fill="{colour}">{dots}</g>{_line(axes.points(steps, means), colour)}'
    low, high = [part.low for part in parts], [part.high for part in parts]
    band = f"{axes.points(steps, high)} {axes.points(steps[::-1], low[::-1])}"
    return (
        f'<polygon points="{band}" fill="{colour}" stroke="{colour}" opacity=".25" clip-path="url(#axes)"/>'
        f"{_line(axes.points(steps, _means(parts)), colour)}"
    )


def _line(points: str, colour: str) -> str:
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round" '
        'clip-path="url(#axes)"/>'
    )


def _draw_title(panel: Panel, curves: Sequence[ThinnedCurve]) -> str:
    """The title, and the last value where there is one curve."""
    value = format_figure(curves[0].last, panel.is_share) if len(curves) == 1 else ""
    return (
        f'<text x="4" y="14" class="title">{escape(panel.title)}</text>'
        f'<text x="{RIGHT}" y="14" class="title" text-anchor="end">{value}</text>'
    )


def _draw_grid(axes: _Axes, is_share: bool) -> list[str]:
    """The axes with the numbers at their ends and in the middle."""
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for share in (0.0, 0.5, 1.0):
        height = BOTTOM - share * (BOTTOM - TOP)
        if share:
            parts.append(f'<path class="grid" d="M{LEFT} {height}H{RIGHT}"/>')
        words = format_figure(share * axes.top, is_share) if is_share else f"{share * axes.top:.2g}"
        parts.append(f'<text x="{LEFT - 4}" y="{height + 4}" text-anchor="end">{words}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>')
    parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end">update {axes.last_step:,}</text>')
    return parts


def _draw_legend(names: Sequence[tuple[str, str]]) -> list[str]:
    """The curves' names, at the right of the title."""
    parts, right = [], RIGHT
    for name, colour in reversed(names):
        parts.append(f'<text x="{right}" y="14" text-anchor="end" style="fill: {colour}">{escape(name)}</text>')
        right -= 6 * len(name) + 14
    return parts
