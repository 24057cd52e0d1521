"""Time of commands that read a whole run or whole results, for a generated long run at two lengths.

    python -m benchmarks.long_run [--updates 100000] [--items 100000]

A command whose time is linear takes four times as long for four times the length.
No model is trained or opened: metrics and scores are random numbers under the keys of a real run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.measure import table
from npedit.cli.compare import compare
from npedit.recipe.config import Recipe, load_recipe
from npedit.recipe.packaged import recipe_path
from npedit.report.plots import plot_runs
from npedit.report.report import write_report
from npedit.runs import checkpoint
from npedit.scoring.results import Results, Row, write_results
from npedit.scoring.reward_hacking import RewardHackingMonitor, monitor_rows

EVALUATE_EVERY, EVALUATE_ITEMS = 100, 90
EDIT_TYPES = ("add", "background", "move", "none", "recolour", "remove", "replace", "resize", "style")
UPDATE_KEYS = (
    "loss/critic_edit", "loss/critic_identity", "loss/dmd", "loss/copy", "loss/fake", "critic/p_edit",
    "critic/p_identity", *(f"critic/p_yes/{kind}" for kind in EDIT_TYPES), "grad_norm/student", "grad_norm/fake",
    "grad_norm/from_critic", "grad_norm/from_dmd", "lr/student", "lr/fake", "time/encode", "time/unroll", "time/dmd",
    "time/critic", "time/student", "time/fake", "time/data", "time/update", "mem/peak_gb", "skipped_steps",
    "data/bad_rows",
)  # fmt: skip
EVALUATION_KEYS = ("eval/both", "eval/applied", "eval/preserved", *(f"eval/by_type/{kind}" for kind in EDIT_TYPES))
TASKS, METRICS = 11, ("l1", "ssim", "dino_vits16")


def long_run(updates: int = 100_000, items: int = 100_000) -> str:
    """The table of seconds for a run of `updates` and results of `items`, beside those for a quarter of each."""
    short, long = _seconds(updates // 4, items // 4), _seconds(updates, items)
    rows = [(name, f"{short[name]:.2f}", f"{long[name]:.2f}", f"{long[name] / short[name]:.1f}") for name in long]
    head = ("what", f"s, {updates // 4} updates or {items // 4} items", f"s, {updates} or {items}", "ratio (linear: 4)")
    return table(head, rows)


def _seconds(updates: int, items: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        run, results = Path(place) / "run", [Path(place) / name for name in ("a", "b")]
        recipe = generate_run(run, updates)
        rows = checkpoint.read_rows(run / checkpoint.METRICS)
        scores = [generate_rows(items, seed) for seed in (0, 1)]
        calls: dict[str, Callable[[], object]] = {
            "training: alarms of all evaluations": lambda: _add_all(rows),
            "resume: read and cut the metrics": lambda: _resume(run, updates),
            "report": lambda: write_report(run),
            "curves of two runs": lambda: plot_runs({"a": rows, "b": rows}),
            "results: summarise and write": lambda: [write_results(*pair) for pair in zip(results, scores)],
            "results: read": lambda: [Results.read(folder) for folder in results],
            "compare two results": lambda: _compare(results, Path(place) / "compare.png"),
        }
        checkpoint.write_run_metadata(run, recipe, checkpoint.make_manifest(recipe, "none", torch.device("cpu")))
        return {name: _time(call) for name, call in calls.items()}


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def generate_run(run: Path, updates: int) -> Recipe:
    """Write `metrics.jsonl` of so many updates, one row an update, with an evaluation every 100; returns the recipe."""
    changes = [f"stages.1.updates={updates}", f"trainer.evaluate_items={EVALUATE_ITEMS}"]
    numbers = random.Random(0)
    run.mkdir(parents=True)
    with open(run / checkpoint.METRICS, "w", encoding="utf-8") as file:
        for step in range(updates + 1):
            keys = (*UPDATE_KEYS, *EVALUATION_KEYS) if step % EVALUATE_EVERY == 0 else UPDATE_KEYS
            row = {"step": step, "stage": 1, "stage_name": "np_edit", **{key: numbers.random() for key in keys}}
            file.write(json.dumps(row) + "\n")
    return load_recipe(recipe_path("toy"), changes)


def generate_rows(items: int, seed: int) -> list[Row]:
    """Random scores of so many items in 11 tasks."""
    numbers = random.Random(seed)
    return [
        Row(f"item-{i}", f"task-{i % TASKS}", {name: numbers.random() for name in METRICS}, {}) for i in range(items)
    ]


def _add_all(rows: list[Mapping]) -> None:
    monitor = RewardHackingMonitor(EVALUATE_ITEMS)
    for row in rows:
        monitor.add(dict(row))


def _compare(results: list[Path], plot: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        compare(results, ["l1"], plot=plot)


def _resume(run: Path, updates: int) -> None:
    checkpoint.drop_metrics_after(run, updates)
    monitor_rows(checkpoint.read_rows(run / checkpoint.METRICS), EVALUATE_ITEMS)


def main() -> None:
    """See the module's head."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run")
    parser.add_argument("--updates", type=int, default=100_000, help="updates of the generated run")
    parser.add_argument("--items", type=int, default=100_000, help="items of the generated results")
    chosen = parser.parse_args()
    Console(soft_wrap=True).print(long_run(chosen.updates, chosen.items), markup=False, highlight=False)


if __name__ == "__main__":
    main()
