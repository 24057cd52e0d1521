"""`npedit evaluate`: one command a benchmark. `cli` gives them their plain errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from npedit import __version__
from npedit.cli.options import (
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
from npedit.cli.own import MEASURES, open_encoders, open_lpips
from npedit.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Score an editor on a benchmark.")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

HELD_OUT_SEED = 1  # other scenes than those that training logs, whose seed is the recipe's
COPY = "copy"  # the editor that returns its input: what a judge must not like
ScenesOption = Annotated[
    int, typer.Option("--seed", "-s", help="Which held-out scenes. Training watches those of its recipe's seed.", min=0)
]


# -------------------------------------------------------------------------------------------------------------- toy


@app.command()
def toy(
    model: ModelOption = "embedded",
    items: Annotated[int, typer.Option(help="How many held-out items.", min=1)] = 900,
    seed: ScenesOption = HELD_OUT_SEED,
    steps: StepsOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    picture: Annotated[Path | None, typer.Option("--sheet", help="Draw the first 18 results into this PNG.")] = None,
) -> None:
    """The toy world's held-out scenes, judged by its exact oracle, with 95 % intervals."""
    import tempfile

    from npedit.benchmarks import toy as bench
    from npedit.cli.pictures import check_writable, save_picture
    from npedit.editor import Editor
    from npedit.report.report import draw_results_sheet
    from npedit.runs.checkpoint import write_text

    for path in (json_file, picture):
        if path:
            check_writable(path)
    editor = Editor.open(model)
    with tempfile.TemporaryDirectory() as kept:
        scores = score_toy(editor, items, seed, str(model), steps, Path(kept) if picture else None, save=18)
        if picture:
            save_picture(draw_results_sheet(Path(kept)), picture)
    out.print(bench.table(scores))
    if json_file:
        facts = {"benchmark": "toy", "model": str(model), "seed": seed, "steps": steps or editor.steps}
        write_text(json_file, json.dumps({**facts, **scores}, indent=1) + "\n")
        out.print(f"Scores: {escape(str(json_file))}")


def score_toy(
    editor: Any, items: int, seed: int, name: str, steps: int | None = None, save_to: Path | None = None, save: int = 36
) -> Any:
    """The toy benchmark for one editor, behind a bar; item k is edited with the noise of seed k."""
    from npedit.benchmarks import toy

    with ProgressBar(f"scoring {name}", items) as told:
        return toy.evaluate(editor, items, seed, steps, on_progress=told, save_to=save_to, save=save)


# ------------------------------------------------------------------------------------------------- judged benchmarks


@dataclass(frozen=True)
class Wish:
    """What the user asked for, beside the data; see the options above."""

    model: str
    seed: int
    steps: int | None
    edited: Path | None
    scores: Path | None
    judge: str
    judge_model: str
    judge_revision: str
    workers: int
    protocol: str
    prompts: Path | None
    out: Path | None
    first: int | None
    repeats: int
    swap: bool
    coverage: float
    fresh: bool
    encoders: tuple[str, str]
    lpips: Path | None


@app.command()
def gedit(
    data: Annotated[Path, typer.Option(help="GEdit-Bench's parquet file, or the folder of them.")],
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = "",
    judge_revision: JudgeRevisionOption = "",
    model: JudgedModelOption = "embedded",
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
) -> None:
    """GEdit-Bench: SC, PQ and O from 0 to 10, by task; macro as the official code, micro beside it."""
    from npedit.benchmarks import gedit as bench

    if language not in (*bench.LANGUAGES, "both"):
        raise UserError(f"--language: expected en, cn or both; got {language!r}; correct it")
    spoken = ("en", "cn") if language == "both" else (bench.LANGUAGES[language],)
    wish = Wish(
        model, seed, steps, edited, scores, judge, judge_model, judge_revision, workers, protocol, prompts, folder,
        first, repeats, swap, coverage, fresh, (dino, clip), lpips,
    )  # fmt: skip
    judged(bench, wish, lambda pictures: bench.items(data, spoken, pictures))


@app.command()
def imgedit(
    data: Annotated[Path, typer.Option(help="ImgEdit-Bench's basic_edit.json (singleturn.json), or its folder.")],
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = "",
    judge_revision: JudgeRevisionOption = "",
    model: JudgedModelOption = "embedded",
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
) -> None:
    """ImgEdit-Bench (Basic): three criteria from 1 to 5 and their mean, by edit type."""
    from npedit.benchmarks import imgedit as bench

    wish = Wish(
        model, seed, steps, edited, scores, judge, judge_model, judge_revision, workers, protocol, prompts, folder,
        first, repeats, swap, coverage, fresh, (dino, clip), lpips,
    )  # fmt: skip
    judged(bench, wish, lambda pictures: bench.items(data, pictures))


def judged(bench: ModuleType, wish: Wish, items: Callable[[Path], list[Any]]) -> None:
    """One judged benchmark, from pictures to files. `items` finds the benchmark's items for a folder of pictures.

    Raises:
        UserError: whatever the user can put right. Pictures and answers so far are kept.
    """
    from npedit.benchmarks import _judged
    from npedit.cli.train import move_aside

    name, label = bench.__name__.rpartition(".")[2], check_wish(wish)
    judge = plain(wish.judge_model or Path(wish.judge).name or "imported")
    folder = wish.out or Path("runs") / f"{name}-{label}-{judge}"
    if wish.fresh:
        move_aside(folder)
    pictures = folder / "official" / label
    found = items(wish.edited or pictures)
    if lacking := bench.incomplete(found):
        err.print(f"[yellow]note[/] {escape(lacking)}: the figures are not those of the whole benchmark.")
    if wish.scores:
        facts: dict[str, Any] = {"scores": str(wish.scores)}
        protocol, rows = "imported", bench.imported(wish.scores, found)
    else:
        todo, near = _judged.spread_over(found, wish.first), open_lpips(wish.lpips)
        encoders, used = open_encoders(wish.encoders, near)
        facts, protocol, rows = asked(bench, wish, todo, folder, pictures)
    summary = bench.summarise(rows, found, wish.coverage, protocol)
    facts |= {"items": len(found), "asked": len(rows), "min_coverage": wish.coverage, "outcomes": _judged.counts(rows)}
    facts |= {"benchmark": name, "npedit": __version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    _judged.write_result(folder, rows, summary, facts)
    bench.export(rows, found, pictures, judge)
    out.print(_judged.table(f"{name}: {label} under {protocol}, judged by {judge}", rows, found, summary))
    tell_missing(summary, facts)
    if not wish.scores:
        settings = {"npedit": __version__, "source": facts["editor"], "encoders": used}
        preserved(name, folder / "preservation", todo, (*encoders, near), settings)
    out.print(f"Result: {escape(str(folder))}")


def preserved(name: str, folder: Path, items: list[Any], measuring: tuple[Any, Any, Any], settings: Any) -> None:
    """How much of the references was kept, without a judge, as a folder of results of its own."""
    from npedit.benchmarks import _judged
    from npedit.benchmarks._outputs import table
    from npedit.scoring import results

    results.prepare_folder(
        folder, {**settings, "protocol": {"benchmark": f"{name} preservation", "measures": MEASURES}}
    )
    with ProgressBar("measuring what was kept", len(items)) as told:
        rows = _judged.preserved(items, *measuring, told)
    out.print(table(results.write_results(folder, rows), f"{name}: what was kept of the references, without a judge"))


def asked(
    bench: ModuleType, wish: Wish, todo: list[Any], folder: Path, pictures: Path
) -> tuple[dict[str, Any], str, Any]:
    """Make the pictures and ask the judge: facts, the protocol's name and rows."""
    from npedit.benchmarks import _judged
    from npedit.benchmarks._protocol import Protocol
    from npedit.judges.cache import Cache

    protocol = Protocol.load(wish.protocol, wish.prompts)
    if (protocol.low, protocol.high, len(protocol.questions)) != (*bench.SCALE, bench.QUESTIONS):
        raise UserError(
            f"--protocol: {wish.protocol} belongs to another benchmark; leave the option out, or see --help"
        )
    judge, passes = open_judge(wish), _judged.Passes(wish.repeats, wish.swap)
    if words := kinship(judge, wish):
        err.print(f"[yellow]note[/] {escape(words)}")
    edit, editor = (None, {"pictures": str(wish.edited)}) if wish.edited else open_editor(wish)
    facts: dict[str, Any] = {
        "protocol": protocol.record(),
        "judge": {"name": judge.name, **judge.identity},
        "editor": editor,
    }
    facts |= {"repeats": wish.repeats, "swap": wish.swap}
    with Cache(folder / _judged.ANSWERS) as cache:
        scorer = _judged.Scorer(judge, protocol, cache, passes, bench.combine)
        _judged.begin(folder, facts)
        if edit:
            with ProgressBar(f"editing with {wish.model}", len(todo)) as told:
                _judged.make_pictures(edit, todo, told)
        kept = len(cache)
        with ProgressBar(f"asking {judge.name}", len(todo)) as told:
            rows = _judged.score_all(scorer, todo, lambda row: bench.finish(row, protocol.overall), told)
        out.print(escape(f"{len(cache) - kept} answers came from {judge.name}; {kept} were there already."))
        facts |= {"usage": cache.usage(), "noise": _judged.noise(rows, passes, bench.combine)}
    return facts, protocol.name, rows


def check_wish(wish: Wish) -> str:
    """What is scored, as a file name.

    Raises:
        UserError: options that do not go together.
    """
    if bool(wish.scores) == bool(wish.judge):
        raise UserError(
            "expected --judge (a model's folder, a Hub id, a server's address) or --scores; give one of them"
        )
    if wish.scores and (wish.repeats > 1 or wish.swap or wish.edited or wish.first):
        raise UserError("--scores: expected no --repeats, --swap, --edited or --items beside it: nothing is asked")
    return plain(wish.scores.stem if wish.scores else Path(wish.edited or wish.model).resolve().name)


def open_judge(wish: Wish) -> Any:
    """The judge: a server for an address, else a model in this process."""
    if wish.judge.startswith(("http://", "https://")):
        from npedit.judges.server import ServerJudge

        return ServerJudge(wish.judge, wish.judge_model, wish.judge_revision, wish.workers)
    if wish.judge_model or wish.judge_revision:
        raise UserError(
            f"--judge-model and --judge-revision are for servers; got the local {wish.judge}; write a Hub id's "
            "revision as ID@REVISION"
        )
    from npedit.judges.local import LocalJudge

    return LocalJudge.open(wish.judge)


def open_editor(wish: Wish) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What edits pictures, and what its pictures depend on."""
    if wish.model == COPY:
        return (lambda pictures, _: pictures), {"editor": COPY}
    from npedit.editor import Editor
    from npedit.judges.local import fingerprint
    from npedit.runs.resolve import resolve_editor

    editor = Editor.open(wish.model)
    facts = {"editor": wish.model, "weights": fingerprint(resolve_editor(wish.model).folder)}
    return (
        lambda pictures, words: editor.edit(pictures, words, wish.seed, wish.steps),
        facts | {"seed": wish.seed, "steps": wish.steps or editor.steps},
    )


def kinship(judge: Any, wish: Wish) -> str:
    """A warning if the judge is of the family of a critic that taught the editor, or if that cannot be told."""
    from npedit.judges.base import family_of

    if wish.edited or wish.model == COPY:
        return ""
    critics = critics_of(wish.model)
    family = getattr(judge, "family", "") or family_of(judge.name)
    if not critics or not family:
        unknown = f"the critic of {wish.model}" if not critics else f"the family of {judge.name}"
        return f"{unknown} is not known here: make sure that the judge is of another family than the critic."
    if family not in critics:
        return ""
    return (
        f"the judge is of the critic's family, {family}: it may overlook what the editor learnt to hide from its "
        "critic. Judge with another family."
    )


def critics_of(model: str) -> set[str]:
    """The families of the critics that a run's editor was trained with; empty if there is no record."""
    import yaml

    from npedit.runs.resolve import resolve_editor

    if model == "embedded":
        return {"llava_onevision"}
    run = resolve_editor(model).run
    critic = (yaml.safe_load((run / "config.resolved.yaml").read_text()) if run else {}).get("critic") or {}
    if critic.get("name") == "ensemble" and Path(critic["weights"]).is_file():
        return {member["name"] for member in yaml.safe_load(Path(critic["weights"]).read_text())}
    return {critic["name"]} if critic else set()


def tell_missing(summary: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say what is missing, why, and between which bounds the headlines lie because of it."""
    for score, found in facts["outcomes"].items():
        lost = [f"{n} {why}" for why, n in found.items() if why != "ok"]
        if lost:
            out.print(f"{score} is missing for {', '.join(lost)}")
    for name, figure in summary.items():
        if figure["value"] is None and not name.endswith("_micro"):
            low, high = figure["bounds"]
            reason = (
                f"{figure['coverage']:.1%} of the items have it; {facts['min_coverage']:.0%} are wanted, of every task"
            )
            out.print(f"No headline {escape(name)}: {reason}. It lies between {low:.2f} and {high:.2f}.")


def plain(name: str) -> str:
    """A name that can be a file's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "judge"
