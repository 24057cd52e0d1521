"""Run all benchmarks, some minutes, and write their tables into docs/benchmarks.md, between its markers.

    python -m benchmarks [--recipe recipes/toy.yaml] [--repeats 8] [--write docs/benchmarks.md]

A recipe of real models works the same, where its weights and data are. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.inference import inference
from benchmarks.processes import processes
from benchmarks.train_step import Bench, arithmetic, by_part, exchanges, savings
from npedit.nets.device import device_name, is_accelerator, pick_device
from npedit.recipe.config import load_recipe


def machine() -> str:
    """What it was measured on."""
    if is_accelerator(pick_device()):
        return f"{device_name(pick_device())}, torch {torch.__version__}"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = model.group(1) if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its two markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, text in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)"
        if not re.search(pattern, page, re.DOTALL):
            raise ValueError(f"expected the markers of {name} in the page; got none")
        page = re.sub(pattern, lambda m, text=text: m[1] + text + m[2], page, flags=re.DOTALL)
    return page


def say(words: str) -> None:
    """Print as it is."""
    Console(soft_wrap=True).print(words, markup=False, highlight=False)


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--recipe", default="recipes/toy.yaml", help="whose np_edit stage is measured")
    parser.add_argument("--repeats", type=int, default=8, help="how often each is timed; medians are shown")
    parser.add_argument("--write", default="", help="a page to write the tables into")
    chosen = parser.parse_args()
    bench = Bench(load_recipe(chosen.recipe))
    tables = {"machine": f"Measured on: {machine()}; `{chosen.recipe}`, {bench.pictures} pictures an update."}
    say(tables["machine"])
    makers = {
        "parts": lambda: by_part(bench, chosen.repeats),
        "savings": lambda: _with_difference(*savings(bench, chosen.repeats)),
        "exchanges": lambda: exchanges(bench, chosen.repeats),
        "arithmetic": lambda: arithmetic(bench, chosen.repeats),
        "inference": lambda: inference(chosen.repeats),
    }
    if not is_accelerator(pick_device()):
        makers["processes"] = lambda: processes(chosen.recipe, bench.pictures, 3 + chosen.repeats)
    for name, make in makers.items():
        tables[name] = make()
        say(f"\n{name}\n\n{tables[name]}")
    if chosen.write:
        page = Path(chosen.write)
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        say(f"\nWritten: {page}")


def _with_difference(text: str, apart: float) -> str:
    return f"{text}\n\nThe losses of all versions are the same: they differ by at most {apart:.0e} of their size."


if __name__ == "__main__":
    main()
