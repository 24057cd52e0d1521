"""`npedit toy`: the toy world's pictures, data, models, and the server that writes training rows for its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.json_output import JsonOption, print_json
from npedit.cli.options import FreshOption, SeedOption
from npedit.cli.train import move_aside
from npedit.errors import UserError

app = typer.Typer(no_args_is_help=True, help="The toy world: pictures, data and models.")

LESSONS = ("all", "scene", "rubric")


@app.command("data")
def toy_data(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    items: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    seed: SeedOption = 0,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also write the edited pictures.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Write the pictures alone, without any words.")] = False,
    side: Annotated[int, typer.Option(help="Pixels a side, a multiple of 32: scenes are enlarged in blocks.")] = 32,
) -> None:
    """Write toy scenes as a data set: images and metadata.jsonl; no edited pictures without --pairs."""
    from npedit.toy.dataset import write_dataset

    folder = write_dataset(folder, items, seed, pairs, bare, side)
    out.print(f"{items} {'pictures' if bare else 'items'}: {escape(str(folder))}")


@app.command("build")
def toy_build(
    folder: Annotated[Path, typer.Argument(help="Where to work.")],
    lessons: Annotated[
        str,
        typer.Option(
            help="all: every part from scratch. scene: the embedded critic, trained further with questions about "
            "scene edits, for recipes/toy-scene.yaml; some twenty minutes on one CPU core. rubric: the same with "
            "rubrics and grades, for the settings rubric and grade."
        ),
    ] = "all",
    fresh: FreshOption = False,
) -> None:
    """Train the toy's VAE, text-to-image model and critic from scratch. The same command resumes after a stop."""
    if lessons not in LESSONS:
        raise UserError(f"--lessons: expected one of {', '.join(LESSONS)}; got {lessons!r}; correct it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder to work in; {folder} is a file; choose another")
    from npedit.toy_models import build as models

    if fresh:
        move_aside(folder)
    if lessons in models.LESSONS:
        _print_right_shares(models.train_critic_on(folder, lessons))
        out.print(f"Critic: {escape(str(folder / 'critic'))}")
    else:
        models.build_toy_models(folder)


def _print_right_shares(measured: dict[str, Any]) -> None:
    """A line per question: the shares of right answers about clean and about damaged pictures."""
    clean, damaged = measured["critic_right_clean"], measured["critic_right_damaged"]
    for name in clean:
        out.print(f"{name:<16} {clean[name]:.3f} clean  {damaged[name]:.3f} damaged")


@app.command("sheet")
def toy_sheet(
    picture: Annotated[Path, typer.Argument(help="The picture to write (.png).")],
    seed: SeedOption = 0,
) -> None:
    """Write a picture with one random scene of every edit type, its instruction and the true result."""
    from npedit.output_pictures import save_picture
    from npedit.report.toy_sheets import draw_toy_sheet

    save_picture(draw_toy_sheet(seed), picture)
    out.print(f"Sheet: {escape(str(picture))}")


@app.command("writer")
def toy_writer(
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 8100,
    mistakes: Annotated[
        float,
        typer.Option(
            help="Share of proposals with a wrong object, a wrong caption or an impossible edit.", min=0, max=1
        ),
    ] = 0.0,
    broken: Annotated[float, typer.Option(help="Share of answers that are broken JSON.", min=0, max=1)] = 0.0,
    verifier_mistakes: Annotated[
        float,
        typer.Option(
            "--verifier-mistakes", help="Share of proposals that the verifying pass judges wrongly.", min=0, max=1
        ),
    ] = 0.0,
    seed: SeedOption = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Refuse response_format, as servers without it do.")] = False,
) -> None:
    """Serve a writer for `npedit prepare` that knows the toy world, with OpenAI's API. Ctrl-C stops it.

    npedit prepare photos/ --out set/ --writer http://127.0.0.1:8100/v1
    """
    from npedit.toy.writer import ErrorRates
    from npedit.toy.writer_server import Writer, make_server

    writer = Writer(ErrorRates(mistakes, broken, verifier_mistakes), seed, structured=not plain)
    server = make_server(writer, port)
    out.print(f"Serving at http://127.0.0.1:{server.server_port}/v1 . Stop: Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(writer.counts.items()))
        out.print(f"\nStopped. Answers: {counts or 'none'}")
    finally:
        server.server_close()


@app.command("grade")
def toy_grade(
    folder: Annotated[Path, typer.Argument(help="A data set of toy pictures: a folder with metadata.jsonl.")],
    as_json: JsonOption = False,
) -> None:
    """Count the rows of a data set of toy pictures whose words are wrong: object, edit, captions."""
    from npedit.toy.grade import grade_dataset

    rows, wrong, faults = grade_dataset(folder)
    if as_json:
        print_json({"rows": rows, "wrong": wrong, "faults": faults})
        return
    out.print(f"{rows} rows, {wrong} wrong ({wrong / rows:.1%})")
    for fault, count in sorted(faults.items()):
        out.print(f"  {fault}: {count}")
