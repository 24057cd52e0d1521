"""The command line. Each command imports what it needs when it runs, so that `--help` is quick.

Whatever a user can put right ends with one message and exit code 2; Ctrl-C ends with 130 and the command that goes on.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from npedit import __version__
from npedit.cli.compare import compare
from npedit.cli.evaluate import HELD_OUT_SEED, score_toy
from npedit.cli.evaluate import app as evaluate_app
from npedit.cli.options import ModelOption, SeedOption, StepsOption
from npedit.cli.own import BENCHMARKS
from npedit.cli.train import move_aside
from npedit.errors import UserError, explain_write_errors, npedit_command, resume_command
from npedit.recipe.packaged import recipe_path

app = typer.Typer(
    name="npedit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a few-step image editor without pairs, and edit pictures with it.\n\nBegin with: npedit demo",
)
toy_app = typer.Typer(no_args_is_help=True, help="The toy world: its pictures, its data, its models.")
app.add_typer(toy_app, name="toy")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}  # of other packages
DEMO_ITEMS = 504  # held-out scenes; a multiple of the nine edit types
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: stages.0.updates=100")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew; what is there is moved aside, not deleted.")]


def exit_on_user_error(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command end with a message and exit code 2 on a user's error, and with 130 on Ctrl-C."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            err.print(f"[bold red]error[/] {escape(str(error))}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print(f"\nStopped. Go on with: [bold]{escape(resume_command())}[/]")
            raise typer.Exit(130) from None

    return wrapped


for name, command in BENCHMARKS.items():
    evaluate_app.command(name)(command)
for registered in evaluate_app.registered_commands:
    registered.callback = exit_on_user_error(registered.callback)
app.add_typer(evaluate_app, name="evaluate")
app.command()(exit_on_user_error(compare))


def main() -> None:
    """The entry point of the command `npedit`."""
    app()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if version:
        out.print(f"npedit {__version__}")
        raise typer.Exit()


# ---------------------------------------------------------------------------------------------------- demo and train


@app.command()
@exit_on_user_error
def demo(
    folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/demo"),
    minutes: Annotated[
        float, typer.Option(help="Length of training: the updates grow in proportion; 10 is meant for two CPU cores.")
    ] = 10.0,
    items: Annotated[int, typer.Option(help="Held-out scenes for the table at the end.", min=1)] = DEMO_ITEMS,
    fresh: FreshOption = False,
) -> None:
    """Train a tiny editor without pairs on this computer and show what it learnt.

    Stop it at any time: the same command goes on. A finished demo shows its result again.
    """
    if not 0 < minutes <= 10_000:
        raise UserError(f"expected --minutes above 0; got {minutes}; 10 is usual")
    from npedit.recipe import config
    from npedit.training import trainer

    path = recipe_path("demo")
    base = config.load_recipe(path)
    long = {f"stages.{i}.updates": stage.updates for i, stage in enumerate(base.stages)}
    long |= {f"trainer.{k}": getattr(base.trainer, k) for k in ("evaluate_every", "sample_every")}
    long["stages.1.settings.ramp_updates"] = base.stages[1].settings.ramp_updates
    recipe = config.load_recipe(path, [f"{k}={max(1, round(v * minutes / 10))}" for k, v in long.items()])
    if fresh:
        move_aside(folder)
    out.print(f"Training without pairs in [bold]{escape(str(folder))}[/]: {recipe.total_updates()} updates.")
    trainer.train(recipe, folder)
    before, after = score_before_and_after(folder, recipe, items)
    show_demo_result(folder, before, after)


def score_before_and_after(run: Path, recipe: Any, items: int) -> tuple[Any, Any]:
    """Score the untrained start and the finished editor of a toy run on held-out scenes; kept in `evaluation.json`."""
    kept = run / "evaluation.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["after"]["n"] == items:
            return found["before"], found["after"]
    from npedit.editor import Editor
    from npedit.runs.checkpoint import write_text

    trained = Editor.open(run)
    start = Editor(trained.family, trained.family.trainable_net(), trained.steps, trained.sizes, trained.tile)
    before = score_toy(start, items, HELD_OUT_SEED, "the start")
    after = score_toy(trained, items, HELD_OUT_SEED, "the result", save_to=run / "evaluation")
    write_text(kept, json.dumps({"before": before, "after": after}, indent=1) + "\n")
    return before, after


def show_demo_result(run: Path, before: Any, after: Any) -> None:
    """The table, where the report is, and what to type next."""
    from npedit.benchmarks import toy
    from npedit.report.report import write_report

    report = write_report(run)
    out.print(toy.table(after, before))
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
    from npedit.toy.world import render

    edit = next(e for e in toy.sample_items(18, seed=7)[9:] if e.edit_type == "recolour")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        toy.to_pil(render([edit.reference])[0]).resize((256, 256), Image.Resampling.NEAREST).save(path)
    return edit.instruction


@app.command()
@exit_on_user_error
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe in the package (demo, toy).")],
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option("--out", help="The run's folder; runs/NAME if not given.")] = None,
    fresh: FreshOption = False,
    processes: Annotated[
        int, typer.Option(help="Processes on this machine; 0: one per visible GPU. They share each batch.", min=0)
    ] = 0,
) -> None:
    """Train a recipe. The same command goes on where an earlier one stopped.

    All visible GPUs are used. For several machines: torchrun ... -m npedit train RECIPE, see docs/clusters.md.
    """
    from npedit.cli.train import run_train

    raise typer.Exit(run_train(recipe, overrides or [], folder, fresh, processes))


# ------------------------------------------------------------------------------------------------------------- edit


@app.command()
@exit_on_user_error
def edit(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... INSTRUCTION", help="Pictures, then what to change.")],
    instructions: Annotated[
        list[str] | None,
        typer.Option("--instruction", "-i", help="What to change; repeat it for one instruction a picture, in order."),
    ] = None,
    target: Annotated[
        str, typer.Option("--out", "-o", help="A .png, .jpg or .webp file, or a folder. If not given: IMAGE-edited.png")
    ] = "",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    model: ModelOption = "embedded",
    tile: Annotated[
        int | None,
        typer.Option(
            min=0, help="Decode in tiles of so many pixels, to save memory; 0: whole; if not given: as trained."
        ),
    ] = None,
) -> None:
    """Edit pictures of any size.

    npedit edit picture.png "paint the circle red" -o out.png

    npedit edit a.png b.png -i "remove the cross" -i "make it night" -o out/
    """
    from npedit.cli.edit import run_edit

    for line in run_edit(words, instructions or [], target, seed, steps, model, err, tile):
        out.print(escape(line))


# ------------------------------------------------------------------------------------------ report, export


@app.command()
@exit_on_user_error
def study(
    path: Annotated[str, typer.Argument(metavar="STUDY", help="A study's YAML file, or 'study-toy' in the package.")],
    folder: Annotated[Path | None, typer.Option("--out", help="The study's folder; runs/NAME if not given.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A 25th of the updates, one seed: to see that all runs through.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--publish", help="A copy of the page; its plots go beside it.")] = None,
    only: Annotated[str, typer.Option(help="Train these alone, 'A,B': several processes can fill one folder.")] = "",
) -> None:
    """Train and score the variants that a study's file names, and write results.md. The same command goes on."""
    from npedit.study.file import load_study
    from npedit.study.page import publish_results
    from npedit.study.study import run_study

    loaded = load_study(recipe_path(path))
    folder = folder or Path("runs") / (loaded.name + ("-quick" if quick else ""))
    names = [name.strip() for name in only.split(",") if name.strip()]
    results = run_study(loaded, folder, recipe_path, lambda line: out.print(f"[bold]{escape(line)}[/]"), quick, names)
    if page is not None:
        results = publish_results(results, page)
    out.print(f"Results: [bold]{escape(str(results.resolve()))}[/]")


@app.command()
@exit_on_user_error
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write report.html of a run, finished or not: curves, pictures, tables."""
    from npedit.report.report import write_report
    from npedit.runs.checkpoint import require_run

    out.print(f"Report: {escape(str(write_report(require_run(run)).resolve()))}")


@app.command()
@exit_on_user_error
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")],
    picture: Annotated[Path, typer.Option("--out", "-o", help="A PNG.")] = Path("curves.png"),
) -> None:
    """Draw the curves of several runs over each other: what went another way, and when."""
    from npedit.report.plots import plot_runs
    from npedit.runs.checkpoint import METRICS, read_rows, require_run

    same = len({run.resolve().name for run in runs}) < len(runs)  # names; then only the whole paths tell them apart
    rows = {str(run) if same else run.resolve().name: read_rows(require_run(run) / METRICS) for run in runs}
    if empty := [name for name, logged in rows.items() if len(logged) < 2]:
        raise UserError(f"expected runs that have logged updates; got {', '.join(empty)}; leave out, or train first")
    with explain_write_errors(picture):
        picture.write_bytes(plot_runs(rows))
    out.print(f"Curves: {escape(str(picture.resolve()))}")


@app.command()
@exit_on_user_error
def export(
    run: Annotated[str, typer.Argument(help="A run, or 'embedded'.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Copy a finished editor to a folder of its own: weights, scheduler, model card."""
    from npedit.cli.edit import run_export

    for line in run_export(run, folder):
        out.print(escape(line))


# ------------------------------------------------------------------------------------------------ estimate, convert


@app.command("estimate")
@exit_on_user_error
def estimate_memory(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe in the package.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Say whether it fits a GPU of this size, such as 24GB.")] = "",
    processes: Annotated[
        int, typer.Option(help="Processes that share each batch and, with shard, the nets.", min=1)
    ] = 1,
) -> None:
    """Say what a recipe will hold in memory and on disk, without its weights and without a GPU."""
    from npedit.recipe.config import load_recipe
    from npedit.training.estimate import estimate, table, verdict

    found = estimate(load_recipe(recipe, overrides or []), processes)
    for line in [*table(found), *([verdict(found, gpu)] if gpu else [])]:
        out.print(escape(line))


@app.command("convert")
@exit_on_user_error
def convert_released(
    file: Annotated[Path, typer.Argument(help="The checkpoint that NP-Edit's public reimplementation released (.pt).")],
    run: Annotated[Path, typer.Argument(help="A new folder.")],
    base: Annotated[str, typer.Option(help="The Z-Image that it was trained from.")] = "Tongyi-MAI/Z-Image",
) -> None:
    """Make a run that `npedit edit --run` opens from a checkpoint of NP-Edit's public reimplementation."""
    from npedit.interop.convert import convert

    made = convert(file, run, base)
    out.print(escape(f"Use it: {npedit_command()} edit PICTURE INSTRUCTION --run {shlex.quote(str(made))}"))


@app.command()
@exit_on_user_error
def doctor() -> None:
    """Look at this installation: versions, device, embedded weights, one edit."""
    from npedit.cli.doctor import run_checks

    bad = 0
    for name, fine, words in run_checks():
        bad += not fine
        out.print(f"{'[green]ok     [/]' if fine else '[bold red]problem[/]'} {name:<18} {escape(words)}")
    if bad:
        raise UserError(f"{bad} of the checks above failed; each says what to do")


# -------------------------------------------------------------------------------------------------------------- toy


@toy_app.command("data")
@exit_on_user_error
def toy_data(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    items: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    seed: SeedOption = 0,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also draw the edited pictures, for baselines.")] = False,
) -> None:
    """Write toy scenes as an ordinary data set: images and metadata.jsonl, no edited pictures."""
    from npedit.toy.dataset import write_dataset

    out.print(f"{items} items: {escape(str(write_dataset(folder, items, seed, pairs)))}")


@toy_app.command("build")
@exit_on_user_error
def toy_build(folder: Annotated[Path, typer.Argument(help="Where to work.")], fresh: FreshOption = False) -> None:
    """Teach the toy's VAE, text-to-image model and critic from nothing. The same command goes on after a stop."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder to work in; {folder} is a file; choose another")
    from npedit.toy_models import build as models

    if fresh:
        move_aside(folder)
    models.build_toy_models(folder)


@toy_app.command("sheet")
@exit_on_user_error
def toy_sheet(
    picture: Annotated[Path, typer.Argument(help="The picture to write (.png).")],
    seed: SeedOption = 0,
) -> None:
    """Draw one random scene of every edit type, its instruction and the true result."""
    from npedit.cli.edit import save_pictures
    from npedit.report.report import draw_toy_sheet

    save_pictures([(draw_toy_sheet(seed), picture)])
    out.print(f"Sheet: {escape(str(picture))}")
