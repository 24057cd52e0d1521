"""Judged benchmarks from the command line: make the pictures, ask the judge, write a folder of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape

from npedit import __version__
from npedit.cli.options import ProgressBar
from npedit.cli.own import MEASURES, open_encoders, open_lpips
from npedit.errors import UserError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

COPY = "copy"  # the editor that returns its input: what a judge must not like


@dataclass(frozen=True)
class EvaluationRequest:
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
    parameters: str = ""


def evaluate_with_judge(bench: ModuleType, request: EvaluationRequest, items: Callable[[Path], list[Any]]) -> None:
    """One judged benchmark, from pictures to files. `items` finds the benchmark's items for a folder of pictures.

    Raises:
        UserError: whatever the user can put right. Pictures and answers so far are kept.
    """
    from npedit.cli.train import move_aside
    from npedit.runs.lock import hold

    name, label = bench.__name__.rpartition(".")[2], check_request(request)
    judge = file_safe_name(request.judge_model or Path(request.judge).name or "imported")
    folder = request.out or Path("runs") / f"{name}-{label}-{judge}"
    if request.fresh:
        move_aside(folder)
    with hold(folder, f"evaluate {name}"):
        _evaluate_in(folder, bench, request, items, (name, label, judge))


def _evaluate_in(
    folder: Path,
    bench: ModuleType,
    request: EvaluationRequest,
    items: Callable[[Path], list[Any]],
    names: tuple[str, str, str],
) -> None:
    """`evaluate_with_judge` in a folder that this process holds. `names` are the benchmark's, editor's and judge's."""
    from npedit.benchmarks import _judged

    name, label, judge = names
    pictures = folder / "official" / label
    found = items(request.edited or pictures)
    if lacking := bench.missing_items_message(found):
        err.print(f"[yellow]note[/] {escape(lacking)}: the figures are not those of the whole benchmark.")
    if request.scores:
        facts: dict[str, Any] = {"scores": str(request.scores)}
        protocol, rows = "imported", bench.read_official_scores(request.scores, found)
    else:
        todo, near = _judged.sample_across_tasks(found, request.first), open_lpips(request.lpips)
        encoders, used = open_encoders(request.encoders, near)
        facts, protocol, rows = edit_and_judge(bench, request, todo, folder, pictures)
    summary = bench.summarise(rows, found, request.coverage, protocol)
    facts |= {
        "items": len(found),
        "asked": len(rows),
        "min_coverage": request.coverage,
        "outcomes": _judged.count_outcomes(rows),
    }
    facts |= {"benchmark": name, "npedit": __version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    _judged.write_results(folder, rows, summary, facts)
    bench.write_official_files(rows, found, pictures, judge)
    out.print(_judged.results_table(f"{name}: {label} under {protocol}, judged by {judge}", rows, found, summary))
    print_missing(summary, facts)
    if not request.scores:
        settings = {"npedit": __version__, "source": facts["editor"], "encoders": used}
        measure_preservation(name, folder / "preservation", todo, (*encoders, near), settings)
    out.print(f"Result: {escape(str(folder))}")
    if rows and all(value is None for row in rows for value in row["scores"].values()):
        raise UserError(f"expected scores; got none of {len(rows)} items; see the reasons above")


def measure_preservation(
    name: str, folder: Path, items: list[Any], measuring: tuple[Any, Any, Any], settings: Any
) -> None:
    """How much of the references was kept, without a judge, as a folder of results of its own."""
    from npedit.benchmarks import _judged
    from npedit.benchmarks._outputs import results_table
    from npedit.scoring import results

    results.prepare_folder(
        folder, {**settings, "protocol": {"benchmark": f"{name} preservation", "measures": MEASURES}}
    )
    with ProgressBar("measuring what was kept", len(items)) as told:
        rows = _judged.score_preservation(items, *measuring, told)
    title = f"{name}: what was kept of the references, without a judge"
    out.print(results_table(results.write_results(folder, rows), title))


def edit_and_judge(
    bench: ModuleType, request: EvaluationRequest, todo: list[Any], folder: Path, pictures: Path
) -> tuple[dict[str, Any], str, Any]:
    """Make the pictures and ask the judge: facts, the protocol's name and rows."""
    from npedit.benchmarks import _judged
    from npedit.benchmarks._headlines import judge_noise
    from npedit.benchmarks._protocol import Protocol
    from npedit.judges.cache import AnswerCache

    protocol = Protocol.load(request.protocol, request.prompts)
    if (protocol.low, protocol.high, len(protocol.questions)) != (*bench.SCALE, bench.QUESTIONS):
        raise UserError(
            f"--protocol: {request.protocol} belongs to another benchmark; leave the option out, or see --help"
        )
    judge, passes = open_judge(request), _judged.RepeatSettings(request.repeats, request.swap)
    if words := shared_origin_warning(judge, request):
        err.print(f"[yellow]note[/] {escape(words)}")
    edit, editor = (None, {"pictures": str(request.edited)}) if request.edited else open_editor(request)
    facts: dict[str, Any] = {
        "protocol": protocol.to_record(),
        "judge": {"name": judge.name, **judge.identity},
        "editor": editor,
    }
    facts |= {"repeats": request.repeats, "swap": request.swap}
    with AnswerCache(folder / _judged.ANSWERS) as cache:
        scorer = _judged.Scorer(judge, protocol, cache, passes, bench.combine_numbers)
        _judged.write_initial_settings(folder, facts)
        if edit:
            with ProgressBar(f"editing with {request.model}", len(todo)) as told:
                _judged.edit_items(edit, todo, told, _picture_facts(editor))
        kept = len(cache)
        with ProgressBar(f"asking {judge.name}", len(todo)) as told:
            rows = _judged.score_items(scorer, todo, lambda row: bench.add_overall_score(row, protocol.overall), told)
        out.print(escape(f"{len(cache) - kept} answers came from {judge.name}; {kept} were there already."))
        if addresses := cache.count_answers_by_address():
            facts["addresses"] = addresses
        noise = judge_noise(rows, request.repeats, request.swap, bench.combine_numbers)
        facts |= {"usage": cache.total_token_usage(), "noise": noise}
    return facts, protocol.name, rows


def check_request(request: EvaluationRequest) -> str:
    """What is scored, as a file name.

    Raises:
        UserError: options that do not go together.
    """
    if bool(request.scores) == bool(request.judge):
        raise UserError(
            "expected --judge (a model's folder, a Hub id, a server's address) or --scores; give one of them"
        )
    if request.scores and (request.repeats > 1 or request.swap or request.edited or request.first):
        raise UserError("--scores: expected no --repeats, --swap, --edited or --items beside it: nothing is asked")
    return file_safe_name(
        request.scores.stem if request.scores else Path(request.edited or request.model).resolve().name
    )


def open_judge(request: EvaluationRequest) -> Any:
    """The judge: a server for an address, else a model in this process."""
    if request.judge.startswith(("http://", "https://")):
        from npedit.judges.server import ServerJudge

        return ServerJudge(
            request.judge,
            request.judge_model,
            request.judge_revision,
            request.workers,
            parameters=read_parameters(request.parameters),
            on_retry=lambda line: err.print(f"[yellow]note[/] {escape(line)}"),
        )
    if request.judge_model or request.judge_revision or request.parameters:
        raise UserError(
            f"--judge-model, --judge-revision and --judge-parameters are for servers; got the local "
            f"{request.judge}; write a Hub id's revision as ID@REVISION"
        )
    from npedit.judges.local import LocalJudge

    return LocalJudge.open(request.judge)


def read_parameters(text: str) -> dict[str, Any]:
    """The parameters of --judge-parameters.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--judge-parameters: expected a JSON object; got {text!r} ({error}); correct it") from None
    if not isinstance(found, dict):
        raise UserError(f"--judge-parameters: expected a JSON object; got {text!r}; correct it")
    return found


def _picture_facts(editor: dict[str, Any]) -> dict[str, Any]:
    """What the edited pictures depend on: of a model its weights, seed and steps, wherever it lies."""
    return {k: v for k, v in editor.items() if k != "editor"} if "weights" in editor else editor


def open_editor(request: EvaluationRequest) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What edits pictures, and what its pictures depend on."""
    if request.model == COPY:
        return (lambda pictures, _: pictures), {"editor": COPY}
    from npedit.editor import Editor
    from npedit.judges.local import hash_folder
    from npedit.runs.resolve import resolve_editor

    editor = Editor.open(request.model)
    facts = {"editor": request.model, "weights": hash_folder(resolve_editor(request.model).folder)}
    return (
        lambda pictures, words: editor.edit(pictures, words, request.seed, request.steps),
        facts | {"seed": request.seed, "steps": request.steps or editor.steps},
    )


def shared_origin_warning(judge: Any, request: EvaluationRequest) -> str:
    """A warning if the judge is of the family of a critic that taught the editor, or if that cannot be told."""
    from npedit.judges.base import guess_critic_family

    if request.edited or request.model == COPY:
        return ""
    critics = critic_families(request.model)
    family = getattr(judge, "family", "") or guess_critic_family(judge.name)
    if not critics or not family:
        unknown = f"the critic of {request.model}" if not critics else f"the family of {judge.name}"
        return f"{unknown} is not known here: make sure that the judge is of another family than the critic."
    if family not in critics:
        return ""
    return (
        f"the judge is of the critic's family, {family}: it may overlook what the editor learnt to hide from its "
        "critic. Judge with another family."
    )


def critic_families(model: str) -> set[str]:
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


def print_missing(summary: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say what is missing, why, and between which bounds the headlines lie because of it."""
    for score, found in facts["outcomes"].items():
        lost = [f"{n} {why}" for why, n in found.items() if why != "ok"]
        if lost:
            out.print(f"{score} is missing for {', '.join(lost)}")
        if found.get("missing_image"):
            out.print("missing_image: the edited picture is not there under the benchmark's name, or cannot be read.")
    for name, figure in summary.items():
        if figure["value"] is None and not name.endswith("_micro"):
            low, high = figure["bounds"]
            reason = (
                f"{figure['coverage']:.1%} of the items have it; {facts['min_coverage']:.0%} are wanted, of every task"
            )
            out.print(f"No headline {escape(name)}: {reason}. It lies between {low:.2f} and {high:.2f}.")


def file_safe_name(name: str) -> str:
    """A name that can be a file's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "judge"
