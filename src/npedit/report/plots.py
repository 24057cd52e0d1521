"""The curves of a report. Each figure is drawn twice, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.scoring.reward_hacking import HELD_OUT_KEYS, RewardHackingAlarm, monitor_rows

Rows = Sequence[dict[str, Any]]
Mean = tuple[float, tuple[float, float] | None]  # and its interval
Drawn = tuple[str, str, bytes, bytes]  # title, caption, light PNG, dark PNG

COLOURS = ("#2484c6", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6bb1", "#9a8f1f", "#7f7f7f", "#a6761d")
LARGEST = 1e30  # numbers beyond it, as of a training that diverged, are not drawn: axes of floats end there
LOSSES = {
    "loss/critic_edit": "critic: was the edit done?",
    "loss/critic_identity": "critic: is the rest the same?",
    "loss/dmd": "distribution matching (size of the score gap)",
    "loss/copy": "do nothing: distance to the reference",
    "loss/fake": "fake score: flow matching",
    "loss/supervised": "supervised: distance to the true edit",
    "loss/kl": "Flow-GRPO: KL to the start",
}
NORMS = {
    "grad_norm/student": "student",
    "grad_norm/fake": "fake score",
    "grad_norm/from_critic": "at the draft, from the critic",
    "grad_norm/from_dmd": "at the draft, from distribution matching",
}


def draw_figures(rows: Rows, evaluate_items: int) -> list[Drawn]:
    """Every figure that the metrics have numbers for. `evaluate_items` is the n behind each evaluation."""
    out: list[Drawn] = []
    if series(rows, "eval/both"):
        out.append(
            _render_light_and_dark(
                "Success on held-out scenes",
                "What the oracle says of held-out scenes as training goes on. The band is the 95 % Wilson interval of "
                f"'both' for the {evaluate_items} scenes of each evaluation. Right: 'both' by edit type.",
                (11, 3.9),
                lambda figure: _plot_success(figure, rows, evaluate_items),
            )
        )
    answers = [k for k in sorted({k for r in rows for k in r if k.startswith("critic/p_yes/")}) if series(rows, k)]
    if answers:
        out.append(
            _render_light_and_dark(
                "The critic's P(yes)",
                "The probability that the critic gives to the wanted answer to its question about the edit, by type "
                "(running mean). That answer is Yes; for removal it is No to 'is it still there?'.",
                (11, 3.9),
                lambda figure: _plot_critic_answers(figure, rows, answers),
            )
        )
    out += _held_out_section(rows, evaluate_items)
    losses = [k for k in LOSSES if series(rows, k)]
    if losses:
        out.append(
            _render_light_and_dark(
                "Losses",
                "Faint: each update. Strong: running mean. Dotted lines part the stages.",
                (11, 2.6 * -(-len(losses) // 2)),
                lambda figure: _plot_losses(figure, rows, losses),
            )
        )
    norms = [k for k in NORMS if series(rows, k)]
    if norms:
        out.append(
            _render_light_and_dark(
                "Gradient norms",
                "Before clipping, on a logarithmic scale (running mean). Neither critic nor distribution "
                "matching should drown the other.",
                (11, 3.4),
                lambda figure: _plot_gradient_norms(figure, rows, norms),
            )
        )
    return out


def _held_out_section(rows: Rows, evaluate_items: int) -> list[Drawn]:
    monitor = monitor_rows(rows, evaluate_items)
    critic = [(step, score) for step, score in monitor.critic_scores() if abs(score) <= LARGEST]
    if not critic:
        return []
    caption = (
        "The mean of 'was it done?' and 'is the rest kept?', as the critic that is trained against sees it and as what "
        "is held out from training does. The alarm (crosses) fires where the former has risen since the best "
        "evaluation and the latter has fallen by more than two standard errors."
    )
    return [
        _render_light_and_dark(
            "The critic against what is held out", caption, (11, 3.4),
            lambda figure: _plot_held_out(figure, rows, critic, monitor.alarms),
        )
    ]  # fmt: skip


def series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(step, value) of every row that has a finite number there, of a size that can be drawn."""
    values = ((r["step"], r.get(key)) for r in rows)
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and abs(v) <= LARGEST]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the values around each; the window is cut off at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def encode_png(picture: Image.Image) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plot_comparison(
    editors: Sequence[str], panels: Sequence[tuple[str, Sequence[Mean]]], dots: Sequence[Sequence[float]] = ()
) -> bytes:
    """A PNG with a panel for each measure: (title, for each editor its mean and 95 % interval, or None for none).
    `dots` are single values of each editor beneath their mean, drawn small in every panel."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, (0.9 + 0.32 * len(editors)) * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (title, means) in zip(grid, panels):
        for k, (value, ci) in enumerate(means):
            ends = ci or (value, value)
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(ends, (k, k), color=colour, linewidth=2.2)
            axes.plot(value, k, "o", color=colour)
        for k, values in enumerate(dots):
            axes.plot(values, [k + 0.25] * len(values), ".", color=COLOURS[k % len(COLOURS)], markersize=4)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_yticks(range(len(editors)), editors, fontsize=8.5)
        axes.set_ylim(len(editors) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(axis="x", alpha=0.25)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


OVERLAID = {
    "eval/both": "oracle: applied and preserved",
    "critic/p_edit": "critic: p(wanted answer), was it done?",
    "critic/p_identity": "critic: p(wanted answer), is the rest the same?",
    **{k: LOSSES[k] for k in ("loss/dmd", "loss/fake")},
    **{k: f"gradient norm: {words}" for k, words in NORMS.items() if k != "grad_norm/fake"},
}


def plot_runs(runs: Mapping[str, Rows]) -> bytes:
    """A PNG with a panel for each figure in `OVERLAID` that a run has numbers for, and a line for each run.

    Raises:
        UserError: no run has a finite number of any of them.
    """
    keys = [k for k in OVERLAID if any(series(rows, k) for rows in runs.values())]
    if not keys:
        raise UserError("expected runs with finite metrics to draw; got none in any of them; look at metrics.jsonl")
    columns = min(2, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(5.4 * columns, 2.7 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(lines, columns, squeeze=False).flat, keys, strict=False):
        for i, (name, rows) in enumerate(runs.items()):
            if points := series(rows, key):
                colour = COLOURS[i % len(COLOURS)]
                if key.startswith("eval/"):
                    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=name)
                else:
                    _plot_smoothed(axes, points, colour, name)
        _label_axes(axes, (), OVERLAID[key], "")
        if key.startswith("grad_norm/"):
            axes.set_yscale("log")
        elif not key.startswith("loss/"):
            _percent_axis(axes)
        axes.title.set_fontsize(9.5)
        axes.grid(axis="y", alpha=0.25)
    for axes in list(figure.axes)[len(keys) :]:
        axes.remove()
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label() in runs}
    names = [str(name) for name in drawn]
    figure.legend(list(drawn.values()), names, loc="outside upper center", ncols=min(5, len(runs)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def plot_points(across: str, up: str, points: Sequence[tuple[str, float, Mean]]) -> bytes:
    """A PNG of named points (name, x, mean and 95 % interval) with the axes' names."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for k, (name, x, (value, ci)) in enumerate(points):
        colour = COLOURS[k % len(COLOURS)]
        axes.plot((x, x), ci or (value, value), color=colour, linewidth=2.2)
        axes.plot(x, value, "o", color=colour)
        axes.annotate(name, (x, value), xytext=(6, 4), textcoords="offset points", fontsize=8.5)
    axes.margins(x=0.15)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- drawing


LIGHT_PAGE_INK, DARK_PAGE_INK = "#1c2330", "#e8eaee"


def _render_light_and_dark(
    title: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> Drawn:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    _style_figure(figure, title, LIGHT_PAGE_INK)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is computed once for both pages
    light = _encode_png(figure)
    _style_figure(figure, title, DARK_PAGE_INK)
    return title, caption, light, _encode_png(figure)


def _style_figure(figure: Figure, title: str, ink: str) -> None:
    """Draw titles, labels, axes and grid in this colour."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=ink)
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(ink)
            axes.spines[side].set_alpha(0.4)
        axes.tick_params(colors=ink, labelsize=8.5)
        axes.grid(axis="y", color=ink, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        for words in (axes.xaxis.label, axes.yaxis.label):
            words.set_color(ink)
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=9.5, color=ink)
        if legend := axes.get_legend():
            for words in legend.get_texts():
                words.set_color(ink)


def _encode_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    return buffer.getvalue()


def _plot_smoothed(
    axes: Axes, points: Sequence[tuple[int, float]], colour: str, label: str = "", faint: bool = False
) -> None:
    x, y = (np.array(v) for v in zip(*points, strict=True))
    if faint:
        axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(x, running_mean(y), color=colour, linewidth=1.8, label=label)


def _label_axes(axes: Axes, rows: Rows, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("update", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    stages = [(r["step"], r["stage"]) for r in rows if "stage" in r]
    for (_, before), (step, after) in zip(stages, stages[1:], strict=False):
        if before != after:
            axes.axvline(step, color="#888888", linestyle=":", linewidth=1)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _add_legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)


def _plot_success(figure: Figure, rows: Rows, n: int) -> None:
    left, right = figure.subplots(1, 2)
    both = series(rows, "eval/both")
    x = [s for s, _ in both]
    bands = [wilson_interval(round(v * n), n)["ci95"] for _, v in both]
    left.fill_between(x, [b[0] for b in bands], [b[1] for b in bands], color=COLOURS[0], alpha=0.2, linewidth=0)
    for key, colour, style in (
        ("applied", COLOURS[1], "--"),
        ("preserved", COLOURS[2], "--"),
        ("both", COLOURS[0], "-"),
    ):
        points = series(rows, f"eval/{key}")
        if points:
            width = 2.4 if key == "both" else 1.4
            left.plot(
                *zip(*points, strict=True), style, color=colour, linewidth=width, marker="o", markersize=3, label=key
            )
    _label_axes(left, rows, "all edit types", "share of scenes")
    _percent_axis(left)
    _add_legend(left)
    kinds = [k for k in sorted({k for r in rows for k in r if k.startswith("eval/by_type/")}) if series(rows, k)]
    for i, key in enumerate(kinds):
        points = series(rows, key)
        right.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], linewidth=1.5, label=key.split("/")[-1])
    _label_axes(right, rows, "both, by edit type", "share of scenes")
    _percent_axis(right)
    if kinds:
        _add_legend(right)


def _plot_critic_answers(figure: Figure, rows: Rows, keys: Sequence[str]) -> None:
    axes = figure.subplots()
    for i, key in enumerate(keys):
        _plot_smoothed(axes, series(rows, key), COLOURS[i % len(COLOURS)], key.removeprefix("critic/p_yes/"))
    _label_axes(axes, rows, "was the edit done?", "P(wanted answer)")
    _percent_axis(axes)
    _add_legend(axes)


def _plot_held_out(
    figure: Figure, rows: Rows, critic: list[tuple[int, float]], alarms: Sequence[RewardHackingAlarm]
) -> None:
    axes = figure.subplots()
    axes.plot(*zip(*critic, strict=True), color=COLOURS[3], linewidth=2, marker="o", markersize=3, label="critic")
    for i, (name, keys) in enumerate(HELD_OUT_KEYS.items()):
        both = [dict(series(rows, k)) for k in keys]
        points = [(n, (both[0][n] + both[1][n]) / 2) for n in both[0] if n in both[1]]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[i], linewidth=2, marker="o", markersize=3, label=name)
    crosses = [(alarm.step, alarm.held_out[1]) for alarm in alarms]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color="#b3402f", markersize=9, markeredgewidth=2.5, label="alarm")
    _label_axes(axes, rows, "", "score")
    _percent_axis(axes)
    _add_legend(axes)


def _plot_losses(figure: Figure, rows: Rows, keys: Sequence[str]) -> None:
    grid = list(figure.subplots(-(-len(keys) // 2), 2, squeeze=False).flat)
    for i, (axes, key) in enumerate(zip(grid, keys, strict=False)):
        points = series(rows, key)
        _plot_smoothed(axes, points, COLOURS[i], faint=True)
        top = float(np.quantile([v for _, v in points], 0.995))
        axes.set_ylim(0, 1.1 * top if top > 0 else 1)
        _label_axes(axes, rows, LOSSES[key], "loss")
    for axes in grid[len(keys) :]:
        axes.remove()


def _plot_gradient_norms(figure: Figure, rows: Rows, keys: Sequence[str]) -> None:
    axes = figure.subplots()
    for i, key in enumerate(keys):
        points = [(s, max(v, 1e-12)) for s, v in series(rows, key)]
        _plot_smoothed(axes, points, COLOURS[i], NORMS[key])
    axes.set_yscale("log")
    _label_axes(axes, rows, "", "norm")
    _add_legend(axes)
