"""Judged benchmarks from the command line: make the pictures, ask the judge, write a folder of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.markup import escape

from npedit import __version__
from npedit.cli.console import err, out
from npedit.cli.json_output import print_json, text_on_stderr
from npedit.cli.options import ProgressBar
from npedit.cli.own import METRICS_VERSION, failure_reasons, open_encoders, open_lpips, print_reasons
from npedit.errors import UserError
from npedit.scoring.tables import rich_table

DEFAULT_LANGUAGE = "en"  # of a benchmark in several languages
COPY = "copy"  # the editor that returns its input: what a judge must not like


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of a judged benchmark, except its data; `npedit evaluate gedit --help` describes each."""

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
    base: str = ""
    as_json: bool = False
    language: str = ""  # of the items; "" where a benchmark has one alone


def evaluate_with_judge(bench: ModuleType, request: EvaluationRequest, items: Callable[[Path], list[Any]]) -> None:
    """Run one judged benchmark: edit the pictures, ask the judge, write a folder of results.

    `items` returns the benchmark's items for a folder of edited pictures.

    Raises:
        UserError: options, data, editor or judge are wrong. Pictures and answers so far are kept.
    """
    from npedit.cli.train import move_aside
    from npedit.runs.lock import hold

    name, label = bench.__name__.rpartition(".")[2], check_request(request)
    judge = file_safe_name(request.judge_model or Path(request.judge).name or "imported")
    ending = f"-{request.language}" if request.language not in ("", DEFAULT_LANGUAGE) else ""
    folder = request.out or Path("runs") / f"{name}-{label}-{judge}{ending}"
    with text_on_stderr(request.as_json):
        if request.fresh:
            move_aside(folder)
        with hold(folder, f"evaluate {name}"):
            values = _evaluate_in_folder(folder, bench, request, items, (name, label, judge))
    if request.as_json:
        print_json(values)


def _evaluate_in_folder(
    folder: Path,
    bench: ModuleType,
    request: EvaluationRequest,
    items: Callable[[Path], list[Any]],
    names: tuple[str, str, str],
) -> dict[str, Any]:
    """Run a judged benchmark in a folder that this process holds; returns its scores. `names` are (benchmark, editor,
    judge)."""
    from npedit.benchmarks import _judged

    name, label, judge = names
    pictures = folder / "official" / label
    found = items(request.edited or pictures)
    if lacking := bench.missing_items_message(found):
        err.print(f"[yellow]note[/] {escape(lacking)}: the figures are not those of the whole benchmark.")
    data_facts: dict[str, Any] = {"data_hash": _judged.hash_items(found)} | (
        {"language": request.language} if request.language else {}
    )
    if request.scores:
        facts, protocol, rows = read_scores(bench, request.scores, found, folder, data_facts)
    else:
        todo, lpips = _judged.sample_across_tasks(found, request.first), open_lpips(request.lpips)
        encoders, used = open_encoders(request.encoders, lpips)
        facts, protocol, rows = edit_and_judge(bench, request, todo, folder, pictures, data_facts)
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
    title = f"{name}: {label} under {protocol}, judged by {judge}"
    out.print(rich_table(_judged.results_table(title, rows, found, summary)))
    print_missing(summary, facts)
    print_reasons([(row["id"], row["reason"]) for row in rows if "reason" in row], len(rows))
    preservation = None
    if not request.scores:
        settings = {"npedit": __version__, "source": facts["editor"], "encoders": used}
        preservation = measure_preservation(name, folder / "preservation", todo, (*encoders, lpips), settings)
    out.print(f"Result: {escape(str(folder))}")
    if rows and all(value is None for row in rows for value in row["scores"].values()):
        raise UserError(f"expected scores; got none of {len(rows)} items; correct what the notes above name")
    return {"benchmark": name, "folder": folder, "items": len(rows), "scores": summary, "preservation": preservation}


def measure_preservation(
    name: str, folder: Path, items: list[Any], measuring: tuple[Any, Any, Any], settings: Any
) -> dict[str, Any]:
    """The summary of the preservation metrics (pixel metrics, DINO, CLIP, LPIPS; no judge), written into a separate
    folder of results. `measuring` is (DINO, CLIP, LPIPS or None)."""
    from npedit.benchmarks import _judged
    from npedit.benchmarks._outputs import results_table
    from npedit.scoring import results

    results.prepare_folder(
        folder, {**settings, "protocol": {"benchmark": f"{name} preservation", "measures": METRICS_VERSION}}
    )
    with ProgressBar("preservation metrics", len(items)) as report_progress:
        rows = _judged.score_preservation(items, *measuring, report_progress)
    title = f"{name}: preservation of the references (no judge)"
    summary = results.write_results(folder, rows)
    out.print(rich_table(results_table(summary, title)))
    unnamed = [(name, why) for name, why in failure_reasons(rows) if not why.startswith("no edited picture")]
    print_reasons(unnamed, len(rows))  # a picture that is missing was named with the judge's scores
    return summary


def read_scores(
    bench: ModuleType, scores: Path, found: list[Any], folder: Path, data_facts: dict[str, Any]
) -> tuple[dict[str, Any], str, Any]:
    """Read a file of the official scripts; returns what `edit_and_judge` returns. The file does not say who judged."""
    from npedit.benchmarks import _judged

    rows = bench.read_official_scores(scores, found)
    facts = data_facts | {"scores": str(scores), "scores_hash": _judged.hash_file(scores), "judge": None}
    _judged.write_initial_settings(folder, facts, found)
    return facts, "imported", rows


def edit_and_judge(
    bench: ModuleType,
    request: EvaluationRequest,
    todo: list[Any],
    folder: Path,
    pictures: Path,
    data_facts: dict[str, Any],
) -> tuple[dict[str, Any], str, Any]:
    """Edit the pictures and ask the judge; returns facts for settings.json, the protocol's name, and rows of scores.
    `data_facts` are facts about the data."""
    from npedit.benchmarks import _judged, _scorer
    from npedit.benchmarks._headlines import measure_judge_noise
    from npedit.benchmarks._protocol import Protocol
    from npedit.judges.cache import AnswerCache

    protocol = Protocol.load(request.protocol, request.prompts)
    if (protocol.low, protocol.high, len(protocol.questions)) != (*bench.SCALE, bench.QUESTIONS):
        raise UserError(
            f"--protocol: {request.protocol} belongs to another benchmark; leave the option out, or see --help"
        )
    judge, passes = open_judge(request), _scorer.RepeatSettings(request.repeats, request.swap)
    if words := shared_origin_warning(judge, request):
        err.print(f"[yellow]note[/] {escape(words)}")
    edit, editor = (None, {"pictures": str(request.edited)}) if request.edited else open_edit_function(request)
    facts: dict[str, Any] = data_facts | {
        "protocol": protocol.to_record(),
        "judge": {"name": judge.name, **judge.identity},
        "editor": editor,
    }
    facts |= {"repeats": request.repeats, "swap": request.swap}
    with AnswerCache(folder / _judged.ANSWERS) as cache:
        scorer = _scorer.Scorer(judge, protocol, cache, passes, bench.combine_numbers)
        _judged.write_initial_settings(folder, facts, todo)
        if edit:
            with ProgressBar(f"editing with {request.model}", len(todo)) as report_progress:
                _judged.edit_missing_items(edit, todo, report_progress, _picture_facts(editor))
        kept = len(cache)
        with ProgressBar(f"asking {judge.name}", len(todo)) as report_progress:
            rows = _scorer.score_items(
                scorer, todo, lambda row: bench.add_overall_score(row, protocol.overall), report_progress
            )
        out.print(escape(f"{len(cache) - kept} answers came from {judge.name}; {kept} were there already."))
        if addresses := cache.count_answers_by_address():
            facts["addresses"] = addresses
        noise = measure_judge_noise(rows, request.repeats, request.swap, bench.combine_numbers)
        facts |= {"usage": cache.total_token_usage(), "noise": noise}
    return facts, protocol.name, rows


def check_request(request: EvaluationRequest) -> str:
    """Check that the options fit together; returns a file name for the editor that is scored.

    Raises:
        UserError: options that do not go together.
    """
    if bool(request.scores) == bool(request.judge):
        raise UserError(
            "expected --judge (a model's folder, a Hub id, a server's address) or --scores; give one of them"
        )
    if request.base and (request.scores or request.edited or request.model == COPY):
        raise UserError("expected --base together with --model; got no editor that is opened; leave --base out")
    if request.scores and (request.repeats > 1 or request.swap or request.edited or request.first):
        raise UserError(
            "--scores: expected no --repeats, --swap, --edited or --items beside it: nothing is asked; leave them out"
        )
    return file_safe_name(
        request.scores.stem if request.scores else Path(request.edited or request.model).resolve().name
    )


def open_judge(request: EvaluationRequest) -> Any:
    """The judge: a server if `--judge` is an address, otherwise a model in this process."""
    if request.judge.startswith(("http://", "https://")):
        from npedit.judges.server import ServerJudge

        return ServerJudge(
            request.judge,
            request.judge_model,
            request.judge_revision,
            request.workers,
            parameters=read_parameters(request.parameters, "--judge-parameters"),
            on_retry=lambda line: err.print(f"[yellow]note[/] {escape(line)}"),
        )
    if request.judge_model or request.judge_revision or request.parameters:
        raise UserError(
            f"--judge-model, --judge-revision and --judge-parameters are for servers; got the local "
            f"{request.judge}; write a Hub id's revision as ID@REVISION"
        )
    from npedit.judges.local import LocalJudge

    return LocalJudge.open(request.judge)


def read_parameters(text: str, option: str) -> dict[str, Any]:
    """The parameters of a request, as given to `option`.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{option}: expected a JSON object; got {text!r} ({error}); correct it") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}: expected a JSON object; got {text!r}; correct it")
    return found


def _picture_facts(editor: dict[str, Any]) -> dict[str, Any]:
    """What the edited pictures depend on: of a model its weights, seed and steps, wherever it lies."""
    return {k: v for k, v in editor.items() if k != "editor"} if "weights" in editor else editor


def open_edit_function(request: EvaluationRequest) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function (pictures, instructions) -> edited pictures, and the facts that these pictures depend on."""
    if request.model == COPY:
        return (lambda pictures, _: pictures), {"editor": COPY}
    from npedit.benchmarks._outputs import hash_editor
    from npedit.cli.editor_source import open_editor

    editor = open_editor(request.model, request.base, out)
    facts = {"editor": request.model, "weights": hash_editor(request.model)}
    facts |= {"base": request.base} if request.base else {}
    return (
        lambda pictures, words: editor.edit(pictures, words, request.seed, request.steps),
        facts | {"seed": request.seed, "steps": request.steps or editor.steps},
    )


def shared_origin_warning(judge: Any, request: EvaluationRequest) -> str:
    """A warning if the judge is of the family of a critic that the editor was trained with, or if this is unknown; ""
    otherwise."""
    from npedit.judges.base import guess_critic_family

    if request.edited or request.model == COPY:
        return ""
    critics = critic_families(request.model)
    family = getattr(judge, "family", "") or guess_critic_family(judge.name)
    if not critics or not family:
        unknown = f"the critic of {request.model}" if not critics else f"the family of {judge.name}"
        return f"{unknown} is unknown: make sure that judge and critic are of different families."
    if family not in critics:
        return ""
    return (
        f"judge and critic are of the same family, {family}: the judge may miss errors that the editor has learnt to "
        "hide from the critic. Use a judge of another family."
    )


def critic_families(model: str) -> set[str]:
    """The families of the critics that a run's editor was trained with; empty if there is no record.

    Raises:
        UserError: the run's recipe, or the list of an ensemble's critics, is damaged.
    """
    from npedit.critics.ensemble import read_members
    from npedit.runs.checkpoint import read_config
    from npedit.runs.resolve import resolve_editor

    if model == "embedded":
        return {"llava_onevision"}
    run = resolve_editor(model).run
    critic = (read_config(run) if run else {}).get("critic") or {}
    if critic.get("name") == "ensemble" and Path(critic["weights"]).is_file():
        return {member.name for member in read_members(critic["weights"])}
    return {critic["name"]} if critic else set()


def print_missing(summary: dict[str, Any], facts: dict[str, Any]) -> None:
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


def file_safe_name(name: str) -> str:
    """A name that can be a file's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "judge"
