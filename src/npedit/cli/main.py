"""The command line. Each command imports what it needs when it runs, so that `--help` is quick.

A `UserError` ends with its message and exit code 2. Ctrl-C ends with the command that resumes and exit code 130.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from npedit import __version__
from npedit.cli.caption import caption
from npedit.cli.check import check
from npedit.cli.compare import compare
from npedit.cli.console import err, out
from npedit.cli.doctor import doctor
from npedit.cli.estimate import estimate_memory
from npedit.cli.evaluate import app as evaluate_app
from npedit.cli.export import export
from npedit.cli.import_set import import_set
from npedit.cli.json_output import JsonOption, print_json
from npedit.cli.options import (
    BaseOption,
    BitsOption,
    ModelOption,
    OffloadOption,
    ProvenanceOption,
    SeedOption,
    StepsOption,
    TileOption,
)
from npedit.cli.own import BENCHMARKS
from npedit.cli.prepare import merge_shards, prepare
from npedit.cli.push import push
from npedit.cli.rehearse import rehearse
from npedit.cli.review import review
from npedit.cli.serve import serve
from npedit.cli.study import study
from npedit.cli.toy import app as toy_app
from npedit.cli.train import move_aside
from npedit.errors import UserError, explain_write_errors, npedit_command, resume_command
from npedit.recipe.packaged import recipe_path

app = typer.Typer(
    name="npedit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a few-step image editor without edited images, and edit pictures with it.\n\nBegin with: npedit demo",
)

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}  # of other packages
DEMO_ITEMS = 504  # held-out scenes; a multiple of the nine edit types
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: stages.0.updates=100")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew; what is there is moved aside, not deleted.")]


def exit_on_user_error(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends with a message and exit code 2 on a `UserError`, and with exit code 130 on Ctrl-C."""

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
for registered in (*evaluate_app.registered_commands, *toy_app.registered_commands):
    if registered.callback:
        registered.callback = exit_on_user_error(registered.callback)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(toy_app, name="toy")
app.command()(exit_on_user_error(check))
app.command()(exit_on_user_error(compare))
app.command()(exit_on_user_error(rehearse))
app.command()(exit_on_user_error(prepare))
app.command()(exit_on_user_error(caption))
app.command()(exit_on_user_error(review))
app.command("merge-shards")(exit_on_user_error(merge_shards))
app.command()(exit_on_user_error(serve))
app.command()(exit_on_user_error(study))
app.command()(exit_on_user_error(doctor))
app.command("estimate")(exit_on_user_error(estimate_memory))
app.command()(exit_on_user_error(export))
app.command()(exit_on_user_error(push))
app.command("import")(exit_on_user_error(import_set))


def main() -> None:
    """The entry point of the command `npedit`."""
    for number, word in enumerate(sys.argv[1:], 1):
        if not _is_unicode(word):
            shown = os.fsencode(word).decode("ascii", "backslashreplace")
            err.print(
                f"[bold red]error[/] expected UTF-8 on the command line; got {escape(shown)} as word {number}. Set the "
                "terminal to UTF-8, or rename the file."
            )
            raise SystemExit(2)
    app()


def _is_unicode(word: str) -> bool:
    """Whether a word can be encoded: Python hands on bytes that are no UTF-8 as lone surrogates."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
        float, typer.Option(help="Length of training: updates are proportional to it; 10 is the recipe's own length.")
    ] = 10.0,
    items: Annotated[int, typer.Option(help="Held-out scenes for the table at the end.", min=1)] = DEMO_ITEMS,
    fresh: FreshOption = False,
) -> None:
    """Train a tiny editor without edited images on this computer and show its scores before and after.

    It can be stopped at any time: the same command resumes. A finished demo shows its result again.
    """
    if not 0 < minutes <= 10_000:
        raise UserError(f"expected --minutes above 0 and at most 10000; got {minutes}; 10 is usual")
    from npedit.cli.demo import score_before_and_after, show_demo_result
    from npedit.recipe import config
    from npedit.training import trainer

    path = recipe_path("demo")
    base = config.load_recipe(path)
    long = {f"stages.{i}.updates": stage.updates for i, stage in enumerate(base.stages)}
    long |= {f"trainer.{k}": getattr(base.trainer, k) for k in ("evaluate_every", "sample_every")}
    editing: Any = base.stages[1].settings
    long["stages.1.settings.ramp_updates"] = editing.ramp_updates
    recipe = config.load_recipe(path, [f"{k}={max(1, round(v * minutes / 10))}" for k, v in long.items()])
    if fresh:
        move_aside(folder)
    out.print(f"Training without pairs in [bold]{escape(str(folder))}[/]: {recipe.total_updates()} updates.")
    trainer.train(recipe, folder)
    before, after = score_before_and_after(folder, recipe, items)
    show_demo_result(folder, before, after)


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
    """Train a recipe. The same command resumes a training that was stopped.

    All visible GPUs are used. For several machines: torchrun ... -m npedit train RECIPE, see docs/clusters.md.
    """
    from npedit.cli.train import run_train

    raise typer.Exit(run_train(recipe, overrides or [], folder, fresh, processes))


# ------------------------------------------------------------------------------------------------------------- edit


@app.command()
@exit_on_user_error
def edit(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... INSTRUCTION", help="Pictures, then one instruction.")],
    instructions: Annotated[
        list[str] | None,
        typer.Option("--instruction", "-i", help="An instruction; repeatable: one for each picture, in order."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A .png, .jpg or .webp file, a folder, or - for a PNG on standard output. "
            "If not given: IMAGE-edited with the ending of the picture, or IMAGE-edited-2 and so on.",
        ),
    ] = "",
    references: Annotated[
        list[str] | None,
        typer.Option("--reference", help="A further picture that the editor sees beside each one; repeatable."),
    ] = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    model: ModelOption = "embedded",
    tile: TileOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
    base: BaseOption = "",
    offload: OffloadOption = False,
    bits: BitsOption = 0,
    provenance: ProvenanceOption = "editor",
    keep_resolution: Annotated[
        bool, typer.Option("--keep-resolution", help="Keep what the edit left unchanged at the picture's full size.")
    ] = False,
    mask: Annotated[
        str, typer.Option(help="With --keep-resolution: a file or folder for pictures that show in white what changed.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Edit pictures of any size.

    npedit edit picture.png "paint the circle red" -o out.png

    npedit edit a.png b.png -i "remove the cross" -i "make it night" -o out/
    """
    from npedit.cli.edit import STDOUT, run_edit

    if as_json and target == STDOUT:
        raise UserError("expected --json or -o -; got both, which write to standard output; name a file or a folder")
    written = []
    for job in run_edit(
        words, instructions or [], target, seed, steps, model, err, tile, overwrite, base, offload, bits,
        references=references or [], provenance=provenance, keep_resolution=keep_resolution, mask=mask,
    ):  # fmt: skip
        written.append(job)
        (err if as_json else out).print(escape(str(job)))
    if as_json:
        edits = [{"picture": j.source, "instruction": j.instruction, "result": j.target} for j in written]
        print_json({"editor": model, "seed": seed, "edits": edits})


# ------------------------------------------------------------------------------------------ report, export


@app.command()
@exit_on_user_error
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write report.html for a run, finished or not: curves, pictures, tables."""
    from npedit.report.report import write_report
    from npedit.runs.checkpoint import require_run

    out.print(f"Report: {escape(str(write_report(require_run(run)).resolve()))}")


@app.command()
@exit_on_user_error
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")],
    picture: Annotated[Path, typer.Option("--out", "-o", help="A PNG.")] = Path("curves.png"),
) -> None:
    """Plot the metrics of several runs in the same axes."""
    from npedit.output_pictures import check_writable
    from npedit.report.plots import plot_runs
    from npedit.runs.checkpoint import METRICS, read_rows, require_run

    check_writable(picture)
    has_duplicate_names = len({run.resolve().name for run in runs}) < len(runs)
    names = [str(run) if has_duplicate_names else run.resolve().name for run in runs]
    rows = {name: read_rows(require_run(run) / METRICS) for name, run in zip(names, runs, strict=True)}
    if empty := [name for name, logged in rows.items() if len(logged) < 2]:
        raise UserError(f"expected runs with two rows of metrics or more; got {', '.join(empty)}; leave them out")
    with explain_write_errors(picture):
        picture.write_bytes(plot_runs(rows))
    out.print(f"Curves: {escape(str(picture.resolve()))}")


# ---------------------------------------------------------------------------------------------------------- convert


@app.command("convert")
@exit_on_user_error
def convert_released(
    file: Annotated[Path, typer.Argument(help="The checkpoint that NP-Edit's public reimplementation released (.pt).")],
    run: Annotated[Path, typer.Argument(help="A new folder.")],
    base: Annotated[str, typer.Option(help="The base model that it was trained from.")] = "Tongyi-MAI/Z-Image",
) -> None:
    """Convert a checkpoint of NP-Edit's public reimplementation to a run that `npedit edit --run` opens."""
    from npedit.interop.convert import convert

    made = convert(file, run, base)
    out.print(escape(f"Use it: {npedit_command()} edit PICTURE INSTRUCTION --run {shlex.quote(str(made))}"))
