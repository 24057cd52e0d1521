"""Run all benchmarks, some minutes, and write their tables into docs/benchmarks.md, between its markers.

    python -m benchmarks [--recipe recipes/toy.yaml] [--repeats 8] [--write docs/benchmarks.md]

A recipe of real models works the same where its weights and data are. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.critic_packing import critic_table, update_table
from benchmarks.inference import inference_table
from benchmarks.isolated_reference import isolation_table
from benchmarks.measure import describe_machine, fill_tables
from benchmarks.processes import processes_table
from benchmarks.train_step import Bench, arithmetic_table, memory_settings_table, parts_table, savings_table
from npedit.nets.device import is_accelerator, pick_device
from npedit.recipe.config import load_recipe


def print_plain(words: str) -> None:
    """Print words without markup or line breaks."""
    Console(soft_wrap=True).print(words, markup=False, highlight=False)


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--recipe", default="recipes/toy.yaml", help="whose np_edit stage is measured")
    parser.add_argument("--repeats", type=int, default=8, help="how often each is timed; medians are shown")
    parser.add_argument("--write", default="", help="a page to write the tables into")
    chosen = parser.parse_args()
    bench = Bench(load_recipe(chosen.recipe))
    tables = {"machine": f"Measured on: {describe_machine()}; `{chosen.recipe}`, {bench.pictures} pictures an update."}
    print_plain(tables["machine"])
    makers = {
        "parts": lambda: parts_table(bench, chosen.repeats),
        "savings": lambda: _with_difference(*savings_table(bench, chosen.repeats)),
        "exchanges": lambda: memory_settings_table(bench, chosen.repeats),
        "arithmetic": lambda: arithmetic_table(bench, chosen.repeats),
        "inference": lambda: inference_table(chosen.repeats),
        "critic": lambda: critic_table(min(3, chosen.repeats)),
        "small models": lambda: update_table(min(3, chosen.repeats)),
        "isolated references": lambda: isolation_table(min(5, chosen.repeats)),
    }
    if not is_accelerator(pick_device()):
        makers["processes"] = lambda: processes_table(chosen.recipe, bench.pictures, 3 + chosen.repeats)
    for name, make in makers.items():
        tables[name] = make()
        print_plain(f"\n{name}\n\n{tables[name]}")
    if chosen.write:
        page = Path(chosen.write)
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print_plain(f"\nWritten: {page}")


def _with_difference(text: str, largest: float) -> str:
    return f"{text}\n\nThe losses of all versions are the same: they differ by at most {largest:.0e} of their size."


if __name__ == "__main__":
    main()
