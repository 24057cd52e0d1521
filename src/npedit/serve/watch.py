"""The runs of a folder as they are now: what each has done, whether it trains, and how long it still takes.

No model is opened, and nothing is written. A look reads what was appended to each metrics.jsonl since the last look.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npedit.errors import UserError
from npedit.runs.checkpoint import CONFIG, METRICS, is_run, read_config
from npedit.serve.curve_svg import Panel, draw_panel
from npedit.serve.metrics_file import MetricsFile
from npedit.serve.run_figures import RunFigures
from npedit.serve.run_state import HolderWatch, RunState, find_state

log = logging.getLogger(__name__)

MOST_BYTES = 32 * 2**20  # of metrics that one look reads, so that the first look at long runs does not take minutes
LEAST_SECONDS = 1.0  # between two looks


@dataclass(frozen=True)
class RunPlan:
    """What a run's recipe says: its name, (step, updates) of each stage, and the pictures of each evaluation."""

    recipe: str = ""
    stages: tuple[tuple[str, int], ...] = ()
    evaluate_items: int = 1

    @property
    def total(self) -> int | None:
        """The updates of all stages; None if the recipe cannot be read."""
        return sum(updates for _, updates in self.stages) or None

    def updates_until_end_of(self, stage: int) -> int:
        """The updates of this stage and those before it."""
        return sum(updates for _, updates in self.stages[: stage + 1])


@dataclass(frozen=True)
class RunStatus:
    """A run as it is now. Times are in seconds. A figure is None where it is not known (yet).

    `seconds_left` is the time to the end of the training; it is known in the last stage only, as an update of another
    stage takes another time. `seconds_left_in_stage` is that of the current stage. `samples` is the update of the
    newest samples, and `samples_version` changes with their picture. `is_behind`: older metrics are still being read.
    """

    name: str
    folder: Path
    state: RunState
    recipe: str
    stage: int
    stages: int
    stage_name: str
    update: int
    total: int | None
    share: float | None
    seconds_per_update: float | None
    seconds_left: float | None
    seconds_left_in_stage: float | None
    evaluation: dict[str, float]
    evaluated_at: int | None
    alarms: list[str]
    samples: int | None
    samples_version: str
    written_at: float
    damaged_lines: int
    is_behind: bool
    figures: RunFigures = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON has them, without the curves."""
        return {key: value for key, value in vars(self).items() if key not in ("figures", "folder", "samples_version")}


class WatchedRun:
    """One run, with what was read of it so far."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.metrics = MetricsFile(folder / METRICS)
        self._holder = HolderWatch(folder)
        self._plan, self._plan_time = RunPlan(), -1
        self._figures = RunFigures(1)

    def look(self, most_bytes: int) -> RunStatus:
        """The run as it is now, after at most so many bytes of metrics more."""
        is_held = self._holder.is_held()
        plan = self._read_plan()
        is_rewritten, rows = self.metrics.read_new(most_bytes)
        if is_rewritten or self._figures.update < 0:
            self._figures = RunFigures(plan.evaluate_items)
        for row in rows:
            self._figures.add(row)
        last_update = self._figures.update if self.metrics.is_at_end else -1  # not known yet
        state = find_state(self.folder, is_held, last_update, plan.total)
        return self._describe(state, plan)

    def _read_plan(self) -> RunPlan:
        """The recipe's plan, which is read again when the file has changed, as when a run resumes."""
        try:
            changed_at = (self.folder / CONFIG).stat().st_mtime_ns
        except OSError:
            changed_at = 0
        if changed_at != self._plan_time:
            self._plan, self._plan_time = read_plan(self.folder), changed_at
        return self._plan

    def _describe(self, state: RunState, plan: RunPlan) -> RunStatus:
        figures, total = self._figures, plan.total
        samples, version = newest_samples(self.folder) or (None, "")
        left_in_stage = (
            self._seconds_left(plan.updates_until_end_of(figures.stage)) if state == RunState.TRAINING else None
        )
        is_last_stage = figures.stage + 1 == len(plan.stages)
        return RunStatus(
            name=self.name,
            folder=self.folder,
            state=state,
            recipe=plan.recipe,
            stage=figures.stage,
            stages=len(plan.stages),
            stage_name=figures.stage_name,
            update=max(0, figures.update),
            total=total,
            share=min(1.0, max(0, figures.update) / total) if total else None,
            seconds_per_update=figures.seconds_per_update,
            seconds_left=left_in_stage if is_last_stage else None,
            seconds_left_in_stage=left_in_stage,
            evaluation=dict(figures.evaluation),
            evaluated_at=figures.evaluated_at if figures.evaluation else None,
            alarms=[alarm.message() for alarm in figures.alarms],
            samples=samples,
            samples_version=version,
            written_at=figures.time,
            damaged_lines=self.metrics.damaged,
            is_behind=not self.metrics.is_at_end,
            figures=figures,
        )

    def _seconds_left(self, last_update: int) -> float | None:
        """From now until this update, if the training goes on as in the last updates."""
        seconds = self._figures.seconds_for(max(0, last_update - self._figures.update))
        if seconds is None:
            return None
        since = time.time() - self._figures.time if self._figures.time else 0.0
        return max(0.0, seconds - max(0.0, since))


class Watch:
    """All runs in `folder`; the folder may also be one run. Use it from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, WatchedRun] = {}
        self._found: list[RunStatus] = []
        self._looked_at = float("-inf")
        self._lock = threading.RLock()

    def look(self) -> list[RunStatus]:
        """Each run as it is now: those that train first, then the others, the last one that wrote first."""
        with self._lock:
            if time.monotonic() - self._looked_at >= LEAST_SECONDS:
                self._found = sorted(self._look(), key=lambda s: (s.state != RunState.TRAINING, -s.written_at, s.name))
                self._looked_at = time.monotonic()
            return self._found

    def find(self, name: str) -> RunStatus:
        """The run of this name as it is now.

        Raises:
            UserError: there is none.
        """
        found = {status.name: status for status in self.look()}
        if name not in found:
            raise UserError(f"expected one of the runs {', '.join(found) or '(none)'}; got {name[:80]!r}")
        return found[name]

    def draw_panel(self, name: str, panel: Panel) -> str:
        """A run's curves as an SVG picture. Errors are those of `find`."""
        with self._lock:  # no row is added meanwhile
            return draw_panel(panel, self.find(name).figures)

    def _look(self) -> Iterator[RunStatus]:
        folders = find_run_folders(self.folder)
        self._runs = {name: self._runs.get(name) or WatchedRun(folder, name) for name, folder in folders.items()}
        left = MOST_BYTES
        for run in self._runs.values():
            before = run.metrics.bytes_read
            try:
                status = run.look(left)
            except OSError as error:  # the run was deleted just now, or its file system has failed
                log.warning("%s is left out: %s", run.folder, error)
                continue
            left -= run.metrics.bytes_read - before
            yield status


def find_run_folders(folder: Path) -> dict[str, Path]:
    """The runs in a folder by their name, or the folder itself if it is a run. Left out are names that are no Unicode,
    and runs that cannot be read now."""
    try:
        if is_run(folder):
            return {folder.resolve().name: folder}
        paths = sorted(folder.iterdir())
    except OSError:
        return {}
    return {path.name: path for path in paths if _can_be_shown(path)}


def _can_be_shown(path: Path) -> bool:
    """Whether a folder is a run that can be read, and has a name that a page can show."""
    try:
        path.name.encode()
        return path.is_dir() and is_run(path)
    except (OSError, UnicodeEncodeError):
        return False


def read_plan(run: Path) -> RunPlan:
    """What a run's recipe says; an empty plan if it cannot be read."""
    try:
        config = read_config(run)
        stages = tuple((str(stage["step"]), max(0, int(stage["updates"]))) for stage in config["stages"])
        return RunPlan(str(config.get("name", "")), stages, int(config["trainer"].get("evaluate_items", 1)))
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return RunPlan()


def newest_samples(run: Path) -> tuple[int, str] | None:
    """The update of the newest samples with a picture of all of them, and a text that changes with this picture; None
    if there are none."""
    for update, picture in sample_pictures(run):
        try:
            stat = picture.stat()
        except OSError:
            continue
        return update, f"{update}-{stat.st_mtime_ns}"
    return None


def sample_pictures(run: Path) -> list[tuple[int, Path]]:
    """(update, picture of all samples after it) of a run, the newest first. A picture may be missing still."""
    try:
        names = [path.name for path in (run / "samples").iterdir()]
    except OSError:
        return []
    updates = [(int(name[5:]), name) for name in names if name.startswith("step-") and name[5:].isdecimal()]
    return [(update, run / "samples" / name / "grid.png") for update, name in sorted(updates, reverse=True)]
