"""Scores of an editor that were measured and written to files: by `npedit evaluate` and at the end of a training. Only
scores with an interval count; nothing is computed from pictures here.

Read are folders of results (summary.json and settings.json), files of `npedit evaluate toy --json`, and the last
evaluation in a run's metrics.jsonl.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from npedit.benchmarks._outputs import hash_editor
from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.recipe.config import Recipe
from npedit.runs.checkpoint import METRICS, read_rows
from npedit.runs.files import read_json_object
from npedit.runs.final import public_name
from npedit.runs.resolve import EditorSource
from npedit.scoring.results import SETTINGS, SUMMARY
from npedit.toy.edits import EDIT_TYPES

log = logging.getLogger(__name__)

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


def read_scores(paths: Sequence[Path], steps: int | None = None) -> list[MeasuredScore]:
    """The scores with intervals in these folders of results and files of the toy benchmark. `steps` is the editor's own
    number of steps: the title of results of another number states it.

    Raises:
        UserError: a path is neither, or a file is damaged.
    """
    found: list[MeasuredScore] = []
    for path in paths:
        try:
            found += _read_path(path, steps)
        except ValueError as error:
            raise UserError(
                f"expected scores in {path}; got a damaged file ({error}); run npedit evaluate again"
            ) from None
    return found


def find_scores(source: EditorSource) -> list[Path]:
    """The folders of results and files of the toy benchmark in the run's folder of an editor, at any depth, that are of
    the weights of this very editor."""
    if source.run is None:
        return []
    folders = [path.parent for path in sorted(source.run.rglob(SUMMARY)) if (path.parent / SETTINGS).is_file()]
    files = [path for path in sorted(source.run.rglob("*.json")) if _is_toy_file(path)]
    scored = {path: _hash_of_scored(path) for path in folders + files}
    wanted = hash_editor(source.folder) if any(scored.values()) else ""  # reads all weights
    return [path for path, found in scored.items() if found and found == wanted]


def _hash_of_scored(path: Path) -> str:
    """The hash of the editor whose pictures were scored, as `npedit evaluate` wrote it; "" if these are not pictures of
    an editor, no hash is there, or the file is damaged: that must not keep an editor from being exported."""
    file = path / SETTINGS if path.is_dir() else path
    try:
        facts = _editor_facts(read_json_object(file))
        if path.is_dir():
            read_json_object(path / SUMMARY)
    except ValueError as error:
        log.warning("the scores in %s are left out of the model card: %s", path, error)
        return ""
    return "" if facts.get("text_only") else str(facts.get("weights") or facts.get("files") or "")


def _editor_facts(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a settings.json or a file of the toy benchmark says of the editor that was scored."""
    facts = found.get("editor") or found.get("source") or found  # of a judged benchmark, of `own`, of the toy benchmark
    return facts if isinstance(facts, dict) else {}


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


def _read_path(path: Path, steps: int | None) -> Iterator[MeasuredScore]:
    if _is_toy_file(path):
        yield from _read_toy(path, steps)
    elif (path / SUMMARY).is_file():
        yield from _read_results(path, steps)
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


def _read_toy(path: Path, steps: int | None) -> Iterator[MeasuredScore]:
    found = read_json_object(path)
    title = "toy benchmark" + _changed_settings(found, steps)
    for name in SHARES:
        yield MeasuredScore.from_interval(title, name, found[name], found["n"])


def _read_results(folder: Path, steps: int | None) -> Iterator[MeasuredScore]:
    summary = read_json_object(folder / SUMMARY)
    settings = read_json_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    title = _title(settings, folder) + _changed_settings(_editor_facts(settings), steps)
    prefix = _judged_prefix(settings)
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


def _changed_settings(facts: Mapping[str, Any], steps: int | None) -> str:
    """The settings of an evaluation that are not the default, in words that follow a title: edit types of the toy
    benchmark, steps, base model."""
    kinds, count, base = facts.get("edit_types") or EDIT_TYPES, facts.get("steps"), facts.get("base")
    words = [f"edit types {', '.join(kinds)}"] if set(kinds) != set(EDIT_TYPES) else []
    words += [f"steps {count}"] if count not in (None, steps) else []
    words += [f"base model {public_name(str(base))}"] if base else []
    return "".join(f"; {each}" for each in words)
