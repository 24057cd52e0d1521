"""The curves of a report. Each figure is drawn twice, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.report.curves import COLOURS, LARGEST, LOSSES, Curves, Rows, running_mean, thin_out
from npedit.scoring.reward_hacking import HELD_OUT_KEYS, RewardHackingAlarm, monitor_rows

Mean = tuple[float, tuple[float, float] | None]  # and its interval
Panel = tuple[str, Sequence[Mean]]  # title; for each editor its mean and 95 % interval, or None for no interval
Drawn = tuple[str, str, bytes, bytes]  # title, caption, light PNG, dark PNG

DPI = 130  # pixels of an inch of a figure
COMPARISON_COLUMNS = 3  # panels side by side
NORMS = {
    "grad_norm/student": "student",
    "grad_norm/fake": "fake score",
    "grad_norm/from_critic": "at x0, from the critic",
    "grad_norm/from_dmd": "at x0, from distribution matching",
}


def draw_figures(rows: Rows, evaluate_items: int) -> list[Drawn]:
    """Every figure that the metrics have numbers for. `evaluate_items` is the n behind each evaluation."""
    curves, out = Curves(rows), list[Drawn]()
    if curves.points("eval/both"):
        out.append(
            _render_light_and_dark(
                "Success on held-out scenes",
                "Success rates on held-out scenes during training, by the toy world's oracle. 'both': the edit is "
                "applied and the rest is preserved. The band is the 95 % Wilson interval of 'both' for the "
                f"{evaluate_items} scenes of each evaluation. Right: 'both' by edit type.",
                (11, 3.9),
                lambda figure: _plot_success(figure, curves, evaluate_items),
            )
        )
    answers = curves.keys_with("critic/p_yes/")
    if answers:
        out.append(
            _render_light_and_dark(
                "The critic's probability of the wanted answer",
                "The critic's probability of the wanted answer to the question about the edit, by edit type (running "
                "mean). The wanted answer is Yes; for removals, whose question is 'is it still there?', it is No.",
                (11, 3.9),
                lambda figure: _plot_critic_answers(figure, curves, answers),
            )
        )
    out += _held_out_section(rows, curves, evaluate_items)
    losses = [k for k in LOSSES if curves.points(k)]
    if losses:
        out.append(
            _render_light_and_dark(
                "Losses",
                "Faint: each update. Strong: running mean. Dotted lines: a new stage begins.",
                (11, 2.6 * -(-len(losses) // 2)),
                lambda figure: _plot_losses(figure, curves, losses),
            )
        )
    norms = [k for k in NORMS if curves.points(k)]
    if norms:
        out.append(
            _render_light_and_dark(
                "Gradient norms",
                "Before clipping, on a logarithmic scale (running mean). x0 is the student's output. The norms from "
                "critic and distribution matching should be of similar size.",
                (11, 3.4),
                lambda figure: _plot_gradient_norms(figure, curves, norms),
            )
        )
    return out


def _held_out_section(rows: Rows, curves: Curves, evaluate_items: int) -> list[Drawn]:
    monitor = monitor_rows(rows, evaluate_items)
    critic = [(step, score) for step, score in monitor.critic_scores() if abs(score) <= LARGEST]
    if not critic:
        return []
    caption = (
        "A score is the mean of 'is the edit applied?' and 'is the rest preserved?'. Shown are the scores of the "
        "training critic and of judges that are held out from training. An alarm (cross) means: since the best earlier "
        "evaluation the critic's score has risen and the held-out score has fallen by more than two standard errors."
    )
    return [
        _render_light_and_dark(
            "Critic and held-out scores", caption, (11, 3.4),
            lambda figure: _plot_held_out(figure, curves, critic, monitor.alarms),
        )
    ]  # fmt: skip


def plot_comparison(editors: Sequence[str], panels: Sequence[Panel], dots: Sequence[Sequence[float]] = ()) -> bytes:
    """A PNG with a panel for each metric. `dots` are single values of each editor beneath their mean, drawn small in
    every panel."""
    figure = new_figure(_comparison_size(editors, panels))
    _plot_means(figure, editors, panels, dots)
    return encode_figure(figure)


def draw_comparison(editors: Sequence[str], panels: Sequence[Panel]) -> Drawn:
    """The figure of `plot_comparison` for light and for dark pages."""
    caption = "The means of the editors, with 95 % intervals, on the items that all results have."
    return _render_light_and_dark(
        "", caption, _comparison_size(editors, panels), lambda figure: _plot_means(figure, editors, panels)
    )


def _comparison_size(editors: Sequence[str], panels: Sequence[Panel]) -> tuple[float, float]:
    columns = min(COMPARISON_COLUMNS, len(panels))
    return 4.2 * columns, (0.9 + 0.32 * len(editors)) * -(-len(panels) // columns)


def _plot_means(
    figure: Figure, editors: Sequence[str], panels: Sequence[Panel], dots: Sequence[Sequence[float]] = ()
) -> None:
    columns = min(COMPARISON_COLUMNS, len(panels))
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True).flat
    for axes, (title, means) in zip(grid, panels):
        for k, (value, ci) in enumerate(means):
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(ci or (value, value), (k, k), color=colour, linewidth=2.2)
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


OVERLAID = {
    "eval/both": "oracle: applied and preserved",
    "critic/p_edit": "critic: P(wanted answer), is the edit applied?",
    "critic/p_grade": "critic: expected grade, from 0 (grade 1) to 1 (grade 5)",
    "critic/p_rubric": "critic: P(wanted answer), the item's own questions",
    "critic/p_identity": "critic: P(wanted answer), is the rest preserved?",
    **{k: LOSSES[k] for k in ("loss/dmd", "loss/fake")},
    **{k: f"gradient norm: {words}" for k, words in NORMS.items() if k != "grad_norm/fake"},
}


def plot_runs(runs: Mapping[str, Rows]) -> bytes:
    """A PNG with a panel for each figure in `OVERLAID` that a run has numbers for, and a line for each run.

    Raises:
        UserError: no run has a finite number of any of them.
    """
    found = {name: Curves(rows) for name, rows in runs.items()}
    keys = [k for k in OVERLAID if any(curves.points(k) for curves in found.values())]
    if not keys:
        raise UserError("expected runs with finite metrics to draw; got none in any of them; look at metrics.jsonl")
    columns = min(2, len(keys))
    lines = -(-len(keys) // columns)
    figure = new_figure((5.4 * columns, 2.7 * lines + 0.4))
    for axes, key in zip(figure.subplots(lines, columns, squeeze=False).flat, keys, strict=False):
        for i, (name, curves) in enumerate(found.items()):
            if points := curves.points(key):
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
    return encode_figure(figure)


def points_plot_png(across: str, up: str, points: Sequence[tuple[str, float, Mean]]) -> bytes:
    """A PNG of named points (name, x, mean and 95 % interval) with the axes' names."""
    figure = new_figure((6.4, 4.0))
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
    return encode_figure(figure)


# ---------------------------------------------------------------------------------------------------------- drawing


LIGHT_PAGE_INK, DARK_PAGE_INK = "#1c2330", "#e8eaee"


def _render_light_and_dark(
    title: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> Drawn:
    figure = new_figure(size)
    draw(figure)
    _style_figure(figure, title, LIGHT_PAGE_INK)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is computed once for both pages
    light = encode_figure(figure, is_transparent=True)
    _style_figure(figure, title, DARK_PAGE_INK)
    return title, caption, light, encode_figure(figure, is_transparent=True)


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


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode_figure(figure: Figure, is_transparent: bool = False) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=is_transparent)
    return buffer.getvalue()


def _plot_smoothed(
    axes: Axes, points: Sequence[tuple[int, float]], colour: str, label: str = "", faint: bool = False
) -> None:
    x, y = (np.array(v) for v in zip(*points, strict=True))
    if faint:
        axes.plot(*thin_out(x, y), color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(*thin_out(x, running_mean(y)), color=colour, linewidth=1.8, label=label)


def _label_axes(axes: Axes, stage_starts: Sequence[int], title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("update", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    for step in stage_starts:
        axes.axvline(step, color="#888888", linestyle=":", linewidth=1)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _add_legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)


def _plot_success(figure: Figure, curves: Curves, n: int) -> None:
    left, right = figure.subplots(1, 2)
    both = curves.points("eval/both")
    x = [s for s, _ in both]
    bands = [wilson_interval(round(v * n), n)["ci95"] for _, v in both]
    left.fill_between(x, [b[0] for b in bands], [b[1] for b in bands], color=COLOURS[0], alpha=0.2, linewidth=0)
    for key, colour, style in (
        ("applied", COLOURS[1], "--"),
        ("preserved", COLOURS[2], "--"),
        ("both", COLOURS[0], "-"),
    ):
        points = curves.points(f"eval/{key}")
        if points:
            width = 2.4 if key == "both" else 1.4
            left.plot(
                *zip(*points, strict=True), style, color=colour, linewidth=width, marker="o", markersize=3, label=key
            )
    _label_axes(left, curves.stage_starts, "all edit types", "share of scenes")
    _percent_axis(left)
    _add_legend(left)
    kinds = curves.keys_with("eval/by_type/")
    for i, key in enumerate(kinds):
        points = curves.points(key)
        right.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], linewidth=1.5, label=key.split("/")[-1])
    _label_axes(right, curves.stage_starts, "both, by edit type", "share of scenes")
    _percent_axis(right)
    if kinds:
        _add_legend(right)


def _plot_critic_answers(figure: Figure, curves: Curves, keys: Sequence[str]) -> None:
    axes = figure.subplots()
    for i, key in enumerate(keys):
        _plot_smoothed(axes, curves.points(key), COLOURS[i % len(COLOURS)], key.removeprefix("critic/p_yes/"))
    _label_axes(axes, curves.stage_starts, "is the edit applied?", "P(wanted answer)")
    _percent_axis(axes)
    _add_legend(axes)


def _plot_held_out(
    figure: Figure, curves: Curves, critic: list[tuple[int, float]], alarms: Sequence[RewardHackingAlarm]
) -> None:
    axes = figure.subplots()
    axes.plot(*zip(*critic, strict=True), color=COLOURS[3], linewidth=2, marker="o", markersize=3, label="critic")
    for i, (name, keys) in enumerate(HELD_OUT_KEYS.items()):
        both = [dict(curves.points(k)) for k in keys]
        points = [(n, (both[0][n] + both[1][n]) / 2) for n in both[0] if n in both[1]]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[i], linewidth=2, marker="o", markersize=3, label=name)
    crosses = [(alarm.step, alarm.held_out[1]) for alarm in alarms]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color="#b3402f", markersize=9, markeredgewidth=2.5, label="alarm")
    _label_axes(axes, curves.stage_starts, "", "score")
    _percent_axis(axes)
    _add_legend(axes)


def _plot_losses(figure: Figure, curves: Curves, keys: Sequence[str]) -> None:
    grid = list(figure.subplots(-(-len(keys) // 2), 2, squeeze=False).flat)
    for i, (axes, key) in enumerate(zip(grid, keys, strict=False)):
        points = curves.points(key)
        _plot_smoothed(axes, points, COLOURS[i % len(COLOURS)], faint=True)
        top = float(np.quantile([v for _, v in points], 0.995))
        axes.set_ylim(0, 1.1 * top if top > 0 else 1)
        _label_axes(axes, curves.stage_starts, LOSSES[key], "loss")
    for axes in grid[len(keys) :]:
        axes.remove()


def _plot_gradient_norms(figure: Figure, curves: Curves, keys: Sequence[str]) -> None:
    axes = figure.subplots()
    for i, key in enumerate(keys):
        points = [(s, max(v, 1e-12)) for s, v in curves.points(key)]
        _plot_smoothed(axes, points, COLOURS[i], NORMS[key])
    axes.set_yscale("log")
    _label_axes(axes, curves.stage_starts, "", "norm")
    _add_legend(axes)
