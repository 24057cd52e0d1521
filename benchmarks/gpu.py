"""Rehearse all recipes of real models on this machine's GPUs, at full size with random weights, and print one table.

    make bench-gpu                 the same as: python -m benchmarks.gpu
    python -m benchmarks.gpu --recipes sana-24gb z-image-80gb --layers 2

A recipe whose estimate is larger than a GPU's memory is listed and not run. Every other one needs free disk for its
random weights (`npedit rehearse`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import print_plain
from benchmarks.measure import describe_machine
from npedit.nets.device import accelerator_count, is_accelerator, pick_device
from npedit.recipe.config import EMBEDDED, load_recipe
from npedit.recipe.packaged import FOLDER
from npedit.training.estimate import GIB, estimate

HEAD = (
    "| recipe | GPUs | s an update | TFLOP an update | share of a matrix product's speed | peak, GiB | estimate, GiB |"
)
USABLE = 0.95  # of a GPU's memory


def real_recipes() -> list[str]:
    """The packaged recipes whose base model is a published one."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("study"))
    return [name for name in names if load_recipe(name).family.weights != EMBEDDED]


def gpu_memory() -> float:
    """GiB of the current GPU."""
    return torch.accelerator.get_memory_info()[1] / GIB


def measure_recipe(name: str, processes: int, layers: int | None) -> str:
    """A row of the table: what `npedit rehearse` measures, or why the recipe was not run."""
    planned = estimate(load_recipe(name), processes).peak.total / GIB
    if layers is None and planned > USABLE * gpu_memory():
        return f"| {name} | {processes} | does not fit: {gpu_memory():.0f} GiB | | | | {planned:.1f} |"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        place = Path(folder) / "rehearsal"
        depth = [] if layers is None else ["--layers", str(layers)]
        command = [sys.executable, "-m", "npedit", "rehearse", name, "--processes", str(processes), *depth]
        done = subprocess.run([*command, "--out", str(place)], capture_output=True, text=True)
        if done.returncode:
            return f"| {name} | {processes} | failed: {last_line(done.stderr + done.stdout)} | | | | {planned:.1f} |"
        return table_row(json.loads((place / "rehearsal.json").read_text()))


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def table_row(values: dict[str, Any]) -> str:
    """One rehearsal's row, for its last stage."""
    stage, update = list(values["updates"].items())[-1]
    size = f"{update['seconds']:.1f} | {update['flops'] / 1e12:.0f}"
    peak = max(values["peak_gib"].values())
    planned = max(phase["estimate_gib"] for phase in values["estimate"].values())
    return (
        f"| {values['recipe']}: {stage} | {values['processes']} | {size} "
        f"| {update['share']:.0%} | {peak:.1f} | {planned:.1f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's head. Returns the exit code: 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument(
        "--recipes", nargs="*", default=[], help="names of packaged recipes; all of real models if none"
    )
    parser.add_argument("--layers", type=int, default=None, help="at most so many blocks in each model")
    chosen = parser.parse_args(arguments)
    if not is_accelerator(pick_device()):
        print_plain("expected a GPU; got none; on a CPU run: npedit rehearse RECIPE --layers 1 --size 256 256")
        return 2
    print_plain(f"Measured on: {describe_machine()}, {accelerator_count()} GPUs of {gpu_memory():.0f} GiB")
    print_plain("\n".join([HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]))
    for name in chosen.recipes or real_recipes():
        print_plain(measure_recipe(name, accelerator_count(), chosen.layers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
