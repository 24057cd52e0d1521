"""`npedit evaluate`: one command a benchmark. `cli` gives them their plain errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.editor_source import open_editor
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.judged import EvaluationRequest, evaluate_with_judge
from npedit.cli.options import (
    BaseOption,
    ClipOption,
    CoverageOption,
    DinoOption,
    EditedOption,
    FreshOption,
    ItemsOption,
    JudgedModelOption,
    JudgeModelOption,
    JudgeOption,
    JudgeRevisionOption,
    LpipsOption,
    ModelOption,
    OutOption,
    ProgressBar,
    PromptsOption,
    RepeatsOption,
    ScoresOption,
    SeedOption,
    StepsOption,
    SwapOption,
    WorkersOption,
)  # fmt: skip
from npedit.errors import UserError
from npedit.scoring.tables import rich_table

app = typer.Typer(no_args_is_help=True, help="Score an editor on a benchmark.")

STDOUT = Path("-")
HELD_OUT_SEED = 1  # other scenes than those that training logs, whose seed is the recipe's
ParametersOption = Annotated[
    str,
    typer.Option(
        "--judge-parameters",
        help='Parameters of the request to a server, as JSON; null leaves one out. Example: {"max_tokens": null, '
        '"max_completion_tokens": 2048, "temperature": null, "reasoning_effort": "low"}',
    ),
]
ScenesOption = Annotated[
    int, typer.Option("--seed", "-s", help="Which held-out scenes. Training watches those of its recipe's seed.", min=0)
]


# -------------------------------------------------------------------------------------------------------------- toy


@app.command()
def toy(
    model: ModelOption = "embedded",
    base: BaseOption = "",
    items: Annotated[int, typer.Option(help="How many held-out items.", min=1)] = 900,
    seed: ScenesOption = HELD_OUT_SEED,
    steps: StepsOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file; - is standard output.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--sheet", help="Draw the first 18 results into this PNG.")] = None,
    edit_types: Annotated[
        list[str] | None,
        typer.Option("--edit-type", help="Score items of this edit type alone, such as scene; may be repeated."),
    ] = None,
) -> None:
    """The toy world's held-out scenes, judged by its exact oracle, with 95 % intervals."""
    import tempfile

    from npedit.benchmarks import toy as bench
    from npedit.benchmarks._outputs import hash_editor
    from npedit.output_pictures import check_writable, save_picture
    from npedit.report.toy_sheets import draw_results_sheet
    from npedit.runs.checkpoint import write_text
    from npedit.toy.edits import EDIT_TYPES

    _check_edit_types(edit_types or ())
    as_json = json_file == STDOUT
    for path in (None if as_json else json_file, picture):
        if path:
            check_writable(path)
    with text_on_stderr(as_json):
        editor = open_editor(model, base, out)
        with tempfile.TemporaryDirectory() as kept:
            kept_in = Path(kept) if picture else None
            scores = score_toy(editor, items, seed, str(model), steps, kept_in, 18, edit_types or ())
            if picture:
                save_picture(draw_results_sheet(Path(kept)), picture)
        out.print(rich_table(bench.results_table(scores)))
    if json_file is None:
        return
    facts: dict[str, Any] = {"benchmark": "toy", "model": str(model), "weights": hash_editor(model)}
    facts |= {"base": base} if base else {}
    facts |= {"seed": seed, "steps": steps or editor.steps, "edit_types": list(edit_types or EDIT_TYPES), **scores}
    if as_json:
        print_json(facts)
    else:
        write_text(json_file, json.dumps(facts, indent=1) + "\n")
        out.print(f"Scores: {escape(str(json_file))}")


def _check_edit_types(edit_types: Sequence[str]) -> None:
    from npedit.toy.scene_edits import ALL_EDIT_TYPES

    if unknown := [kind for kind in edit_types if kind not in ALL_EDIT_TYPES]:
        known = ", ".join(ALL_EDIT_TYPES)
        raise UserError(f"--edit-type: expected one of {known}; got {', '.join(unknown)}; correct it")


def score_toy(
    editor: Any,
    items: int,
    seed: int,
    name: str,
    steps: int | None = None,
    save_to: Path | None = None,
    save: int = 36,
    edit_types: Sequence[str] = (),
) -> Any:
    """The toy benchmark for one editor, behind a bar; item k is edited with the noise of seed k."""
    from npedit.benchmarks import toy
    from npedit.toy.edits import EDIT_TYPES

    with ProgressBar(f"scoring {name}", items) as report_progress:
        return toy.evaluate(editor, items, seed, steps, report_progress, save_to, save, edit_types or EDIT_TYPES)


# ------------------------------------------------------------------------------------------------- judged benchmarks


@app.command()
def gedit(
    data: Annotated[Path, typer.Option(help="GEdit-Bench's parquet file, or the folder of them.")],
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = "",
    judge_revision: JudgeRevisionOption = "",
    judge_parameters: ParametersOption = "",
    model: JudgedModelOption = "embedded",
    base: BaseOption = "",
    edited: EditedOption = None,
    scores: ScoresOption = None,
    protocol: Annotated[str, typer.Option(help="How it is judged.")] = "npedit-edit-v1",
    prompts: PromptsOption = None,
    language: Annotated[str, typer.Option(help="en, cn or both.")] = "en",
    folder: OutOption = None,
    first: ItemsOption = None,
    repeats: RepeatsOption = 1,
    swap: SwapOption = False,
    coverage: CoverageOption = 0.99,
    workers: WorkersOption = 4,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    fresh: FreshOption = False,
    dino: DinoOption = "",
    clip: ClipOption = "",
    lpips: LpipsOption = None,
    as_json: JsonOption = False,
) -> None:
    """GEdit-Bench: SC, PQ and O from 0 to 10, by task; macro as the official code, micro beside it."""
    from npedit.benchmarks import gedit as bench

    if language not in (*bench.LANGUAGES, "both"):
        raise UserError(f"--language: expected en, cn or both; got {language!r}; correct it")
    language = bench.LANGUAGES.get(language, language)
    spoken = ("en", "cn") if language == "both" else (language,)
    request = EvaluationRequest(
        model, seed, steps, edited, scores, judge, judge_model, judge_revision, workers, protocol, prompts, folder,
        first, repeats, swap, coverage, fresh, (dino, clip), lpips, judge_parameters, base,
        as_json, language,
    )  # fmt: skip
    evaluate_with_judge(bench, request, lambda pictures: bench.read_items(data, spoken, pictures))


@app.command()
def imgedit(
    data: Annotated[Path, typer.Option(help="ImgEdit-Bench's basic_edit.json (singleturn.json), or its folder.")],
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = "",
    judge_revision: JudgeRevisionOption = "",
    judge_parameters: ParametersOption = "",
    model: JudgedModelOption = "embedded",
    base: BaseOption = "",
    edited: EditedOption = None,
    scores: ScoresOption = None,
    protocol: Annotated[str, typer.Option(help="How it is judged.")] = "npedit-imgedit-v1",
    prompts: PromptsOption = None,
    folder: OutOption = None,
    first: ItemsOption = None,
    repeats: RepeatsOption = 1,
    swap: SwapOption = False,
    coverage: CoverageOption = 0.99,
    workers: WorkersOption = 4,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    fresh: FreshOption = False,
    dino: DinoOption = "",
    clip: ClipOption = "",
    lpips: LpipsOption = None,
    as_json: JsonOption = False,
) -> None:
    """ImgEdit-Bench (Basic): three criteria from 1 to 5 and their mean, by edit type."""
    from npedit.benchmarks import imgedit as bench

    request = EvaluationRequest(
        model, seed, steps, edited, scores, judge, judge_model, judge_revision, workers, protocol, prompts, folder,
        first, repeats, swap, coverage, fresh, (dino, clip), lpips, judge_parameters, base,
        as_json,
    )  # fmt: skip
    evaluate_with_judge(bench, request, lambda pictures: bench.read_items(data, pictures))
