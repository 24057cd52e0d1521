"""The end of `npedit demo`: score the trained editor against its start, and show what to type next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.evaluate import HELD_OUT_SEED, score_toy
from npedit.errors import explain_write_errors, npedit_command
from npedit.scoring.tables import rich_table


def score_before_and_after(run: Path, recipe: Any, items: int) -> tuple[Any, Any]:
    """Score the untrained start and the finished editor of a toy run on held-out scenes; kept in `evaluation.json`."""
    kept = run / "evaluation.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["after"]["n"] == items:
            return found["before"], found["after"]
    from npedit.editor import Editor
    from npedit.runs.checkpoint import write_text

    trained, start = Editor.open(run), Editor.open_untrained(run)
    before = score_toy(start, items, HELD_OUT_SEED, "the start")
    after = score_toy(trained, items, HELD_OUT_SEED, "the result", save_to=run / "evaluation")
    write_text(kept, json.dumps({"before": before, "after": after}, indent=1) + "\n")
    return before, after


def show_demo_result(run: Path, before: Any, after: Any) -> None:
    """The table, where the report is, and what to type next."""
    from npedit.benchmarks import toy
    from npedit.report.report import write_report

    report = write_report(run)
    out.print(rich_table(toy.results_table(after, before)))
    picture = run / "try" / "picture.png"
    words = write_example_picture(picture)
    out.print(f"\nReport, with curves and pictures: [bold]{escape(str(report.resolve()))}[/]\n\nTry next:")
    there, given = shlex.quote(str(run)), shlex.join([str(picture), words])
    mine, embedded = (shlex.quote(str(run / "try" / name)) for name in ("out.png", "out-embedded.png"))
    for line in (
        f"edit {given} --model {there} -o {mine}",
        f"edit {given} -o {embedded}   # the one that ships",
        f"evaluate toy --run {there} --items 900 --seed 2",
        f"export {there} my-editor",
        "train toy   # the full recipe",
    ):
        out.print(f"  {escape(f'{npedit_command()} {line}')}")


def write_example_picture(path: Path) -> str:
    """Leave one held-out scene, enlarged to 256 x 256, for the user's own first edit; returns an instruction for it."""
    from PIL import Image

    from npedit.benchmarks import toy
    from npedit.data._photos import to_pil
    from npedit.toy.world import render

    edit = next(e for e in toy.sample_items(18, seed=7)[9:] if e.edit_type == "background")  # learnt first
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(render([edit.reference])[0]).resize((256, 256), Image.Resampling.NEAREST).save(path)
    return edit.instruction
