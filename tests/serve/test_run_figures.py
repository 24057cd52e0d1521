"""What the rows of a run say: progress, time, evaluations, alarms, and curves in bounded memory."""

import random

import pytest
from watched_runs import make_row

from npedit.scoring.reward_hacking import reward_hacking_alarms
from npedit.serve.curve_svg import PANELS, draw_panel
from npedit.serve.run_figures import RunFigures
from npedit.serve.thinned_curve import MOST_PARTS, ThinnedCurve


def figures_of(rows, items=90):
    figures = RunFigures(items)
    for row in rows:
        figures.add(row)
    return figures


def test_a_long_curve_keeps_its_mean_and_its_extremes():
    curve, values = ThinnedCurve(), random.Random(0).choices(range(1000), k=100_000)
    for step, value in enumerate(values):
        curve.add(step, value)
    parts = curve.parts
    assert MOST_PARTS // 2 <= len(parts) <= MOST_PARTS
    assert sum(part.count for part in parts) == len(values)
    assert sum(part.total for part in parts) == pytest.approx(sum(values))
    assert (min(part.low for part in parts), max(part.high for part in parts)) == (min(values), max(values))
    for part in parts[:3]:  # each part is what it says of its own points
        own = values[part.step : part.step + part.count]
        assert (part.low, part.high) == (min(own), max(own)) and part.mean == pytest.approx(sum(own) / len(own))
    assert curve.last == values[-1]


def test_the_time_of_further_updates_has_evaluations_in_it():
    """Ten updates of 0.5 s, and after one of them 4 s of evaluation: 0.9 s each."""
    rows = [make_row(step) for step in range(1, 31)]
    rows[24]["time/look"] = 4.0
    figures = figures_of(rows)
    assert figures.stage == 1 and figures.seconds_per_update == 0.5
    assert figures.seconds_for(90) == pytest.approx(90 * (0.5 + 4.0 / 10))
    assert figures_of(rows[:0]).seconds_for(5) is None


def test_alarms_are_those_of_the_log():
    rows = []
    for step in range(1, 101):
        row = {"step": step, "critic/p_edit": step / 100, "critic/p_identity": 0.9}
        rows.append(row | ({"eval/applied": 1 - step / 100, "eval/preserved": 0.9} if step % 20 == 0 else {}))
    found = figures_of(rows).alarms
    assert found and found == reward_hacking_alarms(rows, 90)


def test_odd_values_are_left_out():
    odd = [float("nan"), float("inf"), 10**400, "1", None, True, [1], {"a": 1}]
    figures = figures_of([{"step": 1, "loss/dmd": 0.5, "time": 5.0}])
    for value in odd:
        figures.add({"step": 2, "loss/dmd": value, "time/update": value, "stage": value, "eval/both": value})
        figures.add({"step": value, "loss/dmd": 7.0})
    assert figures.curves["loss/dmd"].last == 0.5 and figures.evaluation == {} and figures.update == 2
    assert figures.seconds_per_update is None


@pytest.mark.parametrize("updates", [0, 1, 2, 21, 120])
def test_every_panel_can_be_drawn_at_any_time(updates):
    rows = [make_row(step, **{"eval/both": 0.4, "judge/p_edit": 0.3, "judge/p_identity": 1.0, "loss/kl": -1e-12})
            for step in range(1, updates + 1)]  # fmt: skip
    figures = figures_of(rows)
    for panel in PANELS:
        drawn = draw_panel(panel, figures)
        assert drawn.startswith("<svg") and "nan" not in drawn and "inf" not in drawn
        assert ("polyline" in drawn) == bool(panel.keys_in(figures))
