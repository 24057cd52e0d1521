"""Scores of an editor that were measured and written to files: by `npedit evaluate` and at the end of a training. Only
scores with an interval count; nothing is computed from pictures here.

Read are folders of results (summary.json and settings.json), files of `npedit evaluate toy --json`, and the last
evaluation in a run's metrics.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.recipe.config import Recipe
from npedit.runs.checkpoint import METRICS, read_rows
from npedit.runs.files import read_json_object
from npedit.runs.final import public_name
from npedit.runs.resolve import EditorSource, resolve_editor
from npedit.scoring.results import SETTINGS, SUMMARY

SHARES = ("both", "applied", "preserved")  # the toy benchmark's headlines


@dataclass(frozen=True)
class MeasuredScore:
    """One score: `benchmark` in words, with the judge if there is one; the metric; its value; the 95 % interval; the
    number of items."""

    benchmark: str
    metric: str
    value: float
    low: float
    high: float
    items: int

    @classmethod
    def from_interval(cls, benchmark: str, metric: str, found: Mapping[str, Any], items: int) -> Self:
        """A score from {"value", "ci95"}, as benchmarks write it."""
        low, high = found["ci95"]
        return cls(benchmark, metric, float(found["value"]), float(low), float(high), items)

    def interval(self) -> str:
        """The interval in words."""
        return f"{self.low:.3f} to {self.high:.3f}"


def read_scores(paths: Sequence[Path]) -> list[MeasuredScore]:
    """The scores with intervals in these folders of results and files of the toy benchmark.

    Raises:
        UserError: a path is neither.
    """
    return [score for path in paths for score in _read_path(path)]


def find_scores(source: EditorSource) -> list[Path]:
    """The folders of results and files of the toy benchmark in the run's folder of an editor, at any depth, that name
    this very editor as the one that was scored."""
    if source.run is None:
        return []
    folders = [path.parent for path in sorted(source.run.rglob(SUMMARY)) if (path.parent / SETTINGS).is_file()]
    files = [path for path in sorted(source.run.rglob("*.json")) if _is_toy_file(path)]
    return [path for path in folders + files if _is_same_editor(source, _scored_editor(path))]


def _scored_editor(path: Path) -> str:
    """The name of the editor that was scored, as `npedit evaluate` wrote it; "" if there is none."""
    found = read_json_object(path / SETTINGS if path.is_dir() else path)
    facts = found.get("editor") or found.get("source") or found  # of a judged benchmark, of `own`, of the toy benchmark
    return str(facts.get("editor") or facts.get("model") or "") if isinstance(facts, dict) else ""


def _is_same_editor(source: EditorSource, name: str) -> bool:
    try:
        return bool(name) and resolve_editor(name).folder.resolve() == source.folder.resolve()
    except UserError:
        return False


def last_evaluation(run: Path, recipe: Recipe, update: int | None = None) -> list[MeasuredScore]:
    """The scores of the toy benchmark that training logged at its last update, or at the update `update`."""
    rows = [row for row in read_rows(run / METRICS) if "eval/both" in row]
    wanted = recipe.total_updates() if update is None else update
    found = next((row for row in reversed(rows) if row.get("step") == wanted), None)
    if found is None or recipe.trainer.benchmark != "toy":
        return []
    title, n = f"toy benchmark, logged in training after update {wanted}", recipe.trainer.evaluate_items
    rates = {name: wilson_interval(float(found[f"eval/{name}"]) * n, n) for name in SHARES if f"eval/{name}" in found}
    return [MeasuredScore.from_interval(title, name, rate, n) for name, rate in rates.items()]


def _read_path(path: Path) -> Iterator[MeasuredScore]:
    if _is_toy_file(path):
        yield from _read_toy(path)
    elif (path / SUMMARY).is_file():
        yield from _read_results(path)
    else:
        raise UserError(
            f"expected a folder of results (with {SUMMARY}) or a file of 'npedit evaluate toy --json'; got {path}; "
            "run npedit evaluate first"
        )


def _is_toy_file(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        found = read_json_object(path)
    except ValueError:
        return False
    return isinstance(found.get("n"), int) and all(isinstance(found.get(name), dict) for name in SHARES)


def _read_toy(path: Path) -> Iterator[MeasuredScore]:
    found = read_json_object(path)
    for name in SHARES:
        yield MeasuredScore.from_interval("toy benchmark", name, found[name], found["n"])


def _read_results(folder: Path) -> Iterator[MeasuredScore]:
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    settings = read_json_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    title, prefix = _title(settings, folder), _judged_prefix(settings)
    for name, score in summary.items():
        metric = name.removeprefix(prefix)
        is_headline = not metric.endswith("_micro") if prefix else "/" not in metric
        if is_headline and isinstance(score, dict) and score.get("value") is not None and score.get("ci95"):
            yield MeasuredScore.from_interval(title, metric, score, score["n"])


def _judged_prefix(settings: dict[str, Any]) -> str:
    """What the names of a judged benchmark's scores begin with, "PROTOCOL/"; "" for another benchmark."""
    protocol = settings.get("protocol")
    name = protocol.get("name", "") if isinstance(protocol, dict) and "judge" in settings else ""
    return f"{name}/" if name else ""


def _title(settings: dict[str, Any], folder: Path) -> str:
    """The benchmark and the judge of a folder of results, in words."""
    protocol, judge = settings.get("protocol"), settings.get("judge")
    named = protocol if isinstance(protocol, dict) else {}
    name = str(named.get("benchmark") or named.get("name") or folder.name)
    judge = judge.get("name", "") if isinstance(judge, dict) else judge
    return name + (f", judge {public_name(str(judge))}" if judge else "")
