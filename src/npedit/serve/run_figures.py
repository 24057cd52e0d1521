"""What the rows of a run's metrics say of its progress. Rows are read one by one, in bounded memory."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from npedit.report.curves import LARGEST, LOSSES
from npedit.scoring.reward_hacking import CRITIC_KEYS, HELD_OUT_KEYS, RewardHackingAlarm, RewardHackingMonitor
from npedit.serve.thinned_curve import ThinnedCurve

SUCCESS = "eval/both"
EVALUATION_KEYS = (SUCCESS, *(key for keys in HELD_OUT_KEYS.values() for key in keys))
CURVE_KEYS = (*EVALUATION_KEYS, *CRITIC_KEYS, *LOSSES)
RECENT = 50  # updates, over which the seconds of an update are taken
MOST_STEP = 2**53


class RunFigures:
    """The figures of one run after the rows so far. `evaluate_items` is the number of pictures of each evaluation.

    Attributes:
        update: the last update, -1 before the first row.
        stage: the number of the last update's stage, and `stage_name` its step; "" before the first update.
        time: when the last row was written, in seconds since 1970; 0 if the row does not say.
        evaluation: the figures of the last evaluation, by key; `evaluated_at` is its update.
        curves: each drawn figure as a curve, by key.
    """

    def __init__(self, evaluate_items: int) -> None:
        self.update, self.stage, self.stage_name, self.time = -1, 0, "", 0.0
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = 0
        self.curves: dict[str, ThinnedCurve] = {}
        self._monitor = RewardHackingMonitor(max(1, evaluate_items))
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._updates_of_stage, self._pauses = 0, 0.0

    @property
    def alarms(self) -> list[RewardHackingAlarm]:
        """The alarms of reward hacking, by update."""
        return sorted(self._monitor.alarms, key=lambda alarm: alarm.step)

    @property
    def seconds_per_update(self) -> float | None:
        """The median time of the last updates, without evaluations; None before the first."""
        return statistics.median(self._seconds) if self._seconds else None

    def seconds_for(self, updates: int) -> float | None:
        """How long so many further updates of the last stage take, with samples and evaluations as often as so far;
        None before its first update."""
        if not self._seconds:
            return None
        return updates * (statistics.fmean(self._seconds) + self._pauses / self._updates_of_stage)

    def add(self, row: dict[str, Any]) -> None:
        """Read the next row. Values that are no finite numbers are left out."""
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MOST_STEP:
            return
        numbers = {key: value for key, value in row.items() if _is_finite(value)}
        self._begin_stage(row)
        self.update, self.time = step, float(numbers.get("time", 0.0))
        if "time/update" in numbers:
            self._seconds.append(numbers["time/update"])
            self._updates_of_stage += 1
            self._pauses += numbers.get("time/look", 0.0)
        if evaluation := {key: float(numbers[key]) for key in EVALUATION_KEYS if key in numbers}:
            self.evaluation, self.evaluated_at = evaluation, step
        for key in CURVE_KEYS:
            if key in numbers:
                self.curves.setdefault(key, ThinnedCurve()).add(step, float(numbers[key]))
        self._monitor.add({"step": step, **numbers})

    def _begin_stage(self, row: dict[str, Any]) -> None:
        stage, name = row.get("stage"), row.get("stage_name")
        if not isinstance(stage, int) or not isinstance(name, str):
            return
        if (stage, name) != (self.stage, self.stage_name):
            self.stage, self.stage_name = stage, name
            self._seconds.clear()
            self._updates_of_stage, self._pauses = 0, 0.0


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST and math.isfinite(value)
