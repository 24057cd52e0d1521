"""`npedit evaluate own|dreambench`: edit, measure without a judge, leave a folder of results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from npedit import __version__
from npedit.cli.console import err, out
from npedit.cli.editor_source import open_editor
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.options import (
    BaseOption,
    ClipOption,
    DinoOption,
    LpipsOption,
    ModelOption,
    ProgressBar,
    SeedOption,
    StepsOption,
)
from npedit.errors import UserError
from npedit.scoring.tables import rich_table

EXAMPLES = 5  # rows that a message about missing scores names
METRICS_VERSION = 1  # raised whenever a metric changes its meaning
DREAMBENCH_LONGEST_SIDE = 1024  # pixels; longer photos are scaled down before the edit (DINO and CLIP see 224)
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="The folder for the results, new or of an earlier run of this command.")
]
EditedOption = Annotated[
    Path | None, typer.Option("--edited", help="Score the pictures in this folder, made by another editor.")
]
CopyOption = Annotated[bool, typer.Option("--copy", help="Score unchanged copies of the references: a baseline.")]


TextOnlyOption = Annotated[
    bool,
    typer.Option(
        "--text-only", help="Score pictures that the editor's base model makes from the prompt alone: a baseline."
    ),
]


def own(
    data: Annotated[str, typer.Argument(help="A folder of photos with metadata.jsonl, as for training.")],
    folder: OutOption,
    model: ModelOption = "embedded",
    edited: EditedOption = None,
    copy: CopyOption = False,
    base: BaseOption = "",
    held_out: Annotated[
        str,
        typer.Option(
            "--held-out",
            help="Score only held-out rows: a file with one row id a line (DATA/held_out.txt), or the run that held "
            "them out.",
        ),
    ] = "",
    items: Annotated[int | None, typer.Option(help="Score only the first so many items.", min=1)] = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    dino: DinoOption = "",
    clip: ClipOption = "",
    lpips: LpipsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Your own photos and instructions: preservation of the reference, and distance to a target where there is one.

    Optional columns: mask_file_name (white marks the edited region) and edited_file_name (the target). With --edited,
    pictures are named ID.png.
    """
    from npedit.benchmarks import own as bench
    from npedit.judges.cache import hash_json
    from npedit.runs.lock import hold

    rows, digest = bench.read_items(data)
    facts = {"data": digest}
    if held_out:
        rows = bench.select_held_out(rows, data, held_out)
        facts["held_out"] = hash_json([row.id for row in rows])
    rows = rows[:items]
    lpips_model, source = open_lpips(lpips), PictureSource(model, edited, copy, base, seed, steps)
    with text_on_stderr(as_json), hold(folder, "evaluate own"):
        evaluation = PictureEvaluation.prepare("own", folder, facts, source, (dino, clip), lpips_model, data)
        evaluation.edit_pictures(bench.edit_jobs(rows, seed))
        with ProgressBar("scoring") as report_progress:
            scored = bench.score_pictures(rows, evaluation.pictures, *evaluation.encoders, report_progress, lpips_model)
        summary = evaluation.write_results(scored, {})
        out.print(rich_table(bench.task_table(scored)))
    if as_json:
        print_json({"benchmark": "own", "folder": folder, "items": len(rows), "scores": summary})


def dreambench(
    data: Annotated[str, typer.Argument(help="The folder 'dataset' of github.com/google/dreambooth.")],
    folder: OutOption,
    model: ModelOption = "embedded",
    edited: EditedOption = None,
    copy: CopyOption = False,
    text_only: TextOnlyOption = False,
    base: BaseOption = "",
    pictures: Annotated[int, typer.Option(help="Pictures for each prompt; 4 in the literature.", min=1)] = 4,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    dino: DinoOption = "",
    clip: ClipOption = "",
    as_json: JsonOption = False,
) -> None:
    """DreamBench: similarity of a photo's subject in new scenes. 30 subjects, 25 prompts, 4 pictures each.

    With --edited, pictures are named SUBJECT/PP-K.png: prompt number PP and picture number K, both from 0, as
    cat/07-0.png.
    """
    from npedit.benchmarks import dreambench as bench
    from npedit.runs.lock import hold

    subjects, digest = bench.read_subjects(data)
    facts = {"data": digest, "subjects": len(subjects), "pictures": pictures}
    source = PictureSource(model, edited, copy, base, seed, steps, text_only)
    with text_on_stderr(as_json), hold(folder, "evaluate dreambench"):
        evaluation = PictureEvaluation.prepare("dreambench", folder, facts, source, (dino, clip))
        items, summary = _score_dreambench(evaluation, subjects, seed, pictures)
    if as_json:
        print_json({"benchmark": "dreambench", "folder": folder, "items": items, "scores": summary})


def _score_dreambench(
    evaluation: PictureEvaluation, subjects: Sequence[Any], seed: int, pictures: int
) -> tuple[int, dict[str, Any]]:
    """Edit and score DreamBench in a folder that this process holds; returns the number of items and the summary."""
    from npedit.benchmarks import dreambench as bench

    baseline = bench.real_image_baseline(subjects, *evaluation.encoders)
    deviations = ["these are not the official subjects and photos"]
    if bench.is_official_data(subjects):
        deviations = bench.real_image_baseline_problems(baseline)
    for deviation in deviations:
        err.print(f"[yellow]note[/] scores cannot be compared with the literature: {escape(deviation)}")
    evaluation.edit_pictures(bench.edit_jobs(subjects, seed, pictures), DREAMBENCH_LONGEST_SIDE)
    with ProgressBar("scoring") as report_progress:
        scored = bench.score_pictures(subjects, evaluation.pictures, *evaluation.encoders, report_progress, pictures)
    return len(scored), evaluation.write_results(scored, baseline)


BENCHMARKS: dict[str, Callable[..., None]] = {"own": own, "dreambench": dreambench}


@dataclass(frozen=True)
class PictureSource:
    """Where the pictures to score come from: the folder `edited`, copies of the references, the editor `model`, or with
    `text_only` its base model, which does not see the references."""

    model: str
    edited: Path | None
    copy: bool
    base: str
    seed: int
    steps: int | None
    text_only: bool = False

    def check(self) -> None:
        """Check that the options fit together.

        Raises:
            UserError: they name several sources, or a folder that is missing.
        """
        if bool(self.edited) + self.copy + (self.model != "embedded") > 1:
            raise UserError("expected one of --model, --edited and --copy; got several; give one of them")
        if self.text_only and (self.edited or self.copy):
            raise UserError("expected --text-only without --edited and --copy; got both; give one of them")
        if self.base and (self.edited or self.copy or self.text_only):
            raise UserError(
                "expected --base together with --model; got --edited, --copy or --text-only; leave --base out"
            )
        if self.edited and not self.edited.is_dir():
            raise UserError(f"expected a folder of edited pictures; {self.edited} is not a folder; correct --edited")

    def facts(self) -> dict[str, Any]:
        """Everything that the pictures depend on, as settings.json records it."""
        from npedit.benchmarks._outputs import hash_editor

        if self.edited:
            return {"edited": str(self.edited.resolve())}
        if self.copy:
            return {"copy": True}
        facts = {"model": self.model, "files": hash_editor(self.model), "seed": self.seed, "steps": self.steps}
        facts |= {"text_only": True} if self.text_only else {}
        return facts | ({"base": self.base} if self.base else {})


@dataclass(frozen=True)
class PictureEvaluation:
    """One evaluation without a judge. `pictures` is the folder of edited pictures, `encoders` are DINO and CLIP."""

    name: str
    folder: Path
    pictures: Path
    source: PictureSource
    source_facts: dict[str, Any]
    encoders: tuple[Any, Any]

    @classmethod
    def prepare(
        cls,
        name: str,
        folder: Path,
        facts: dict[str, Any],
        source: PictureSource,
        encoder_weights: tuple[str, str],
        lpips: Any = None,
        data: str = "",
    ) -> PictureEvaluation:
        """Check all options, open the encoders and write settings.json, before any picture is edited. `data` is where
        the photos lie, for `compare --people`.

        Raises:
            UserError: options do not fit together, or the folder holds results of other settings.
        """
        from npedit.benchmarks._outputs import EDITED
        from npedit.scoring import results

        source.check()
        encoders, used = open_encoders(encoder_weights, lpips)
        source_facts = source.facts()
        protocol = {"benchmark": name, "measures": METRICS_VERSION, **facts}
        settings = {"npedit": __version__, "source": source_facts, "encoders": used, "protocol": protocol}
        results.prepare_folder(folder, settings | ({"data": str(Path(data).expanduser().resolve())} if data else {}))
        return cls(name, folder, source.edited or folder / EDITED, source, source_facts, encoders)

    def edit_pictures(self, jobs: Sequence[Any], longest_side: int = 0) -> None:
        """Edit the pictures that are missing. Pictures of another editor are left as they are."""
        from npedit.benchmarks._outputs import edit_missing_pictures

        source = self.source
        if source.edited:
            return
        facts = {k: v for k, v in self.source_facts.items() if k not in ("model", "seed")}
        edit = _open_source(source)
        with ProgressBar("editing") as report_progress:
            edit_missing_pictures(jobs, edit, self.pictures, report_progress, longest_side, facts)

    def write_results(self, rows: Sequence[Any], extra: dict[str, Any]) -> dict[str, Any]:
        """Write the results, print the headline figures and return them; `extra` holds further headlines.

        Raises:
            UserError: no row has a score.
        """
        from npedit.benchmarks._outputs import results_table
        from npedit.scoring.results import write_results

        summary = write_results(self.folder, rows, extra)
        out.print(rich_table(results_table(summary, f"{self.name}: {len(rows)} rows")))
        print_reasons(failure_reasons(rows), len(rows))
        out.print(f"Results: {escape(str(self.folder))}")
        scores = [value for row in rows for name, value in row.scores.items() if "/" not in name]  # without baselines
        if rows and not any(value is not None for value in scores):
            raise UserError(f"expected scores; got none for any of {len(rows)} rows; correct what the notes above name")
        return summary


def _open_source(source: PictureSource) -> Callable[[Sequence[Any], Sequence[str], int], list[Any]]:
    """The function that makes pictures of references, instructions and a seed. Errors as in `Editor.open`."""
    if source.copy:
        return lambda pictures, instructions, seed: list(pictures)
    if source.text_only:
        from npedit.benchmarks._text_to_image import TextToImage
        from npedit.editor import Editor

        untrained = Editor.open_untrained(source.model)
        return TextToImage(untrained.family, untrained.sizes, source.steps)
    editor = open_editor(source.model, source.base, out)
    return lambda pictures, instructions, seed: editor.edit(pictures, instructions, seed, source.steps)


def failure_reasons(rows: Sequence[Any]) -> list[tuple[str, str]]:
    """(row id, reason) for every different reason why a row has a missing score. Undefined scores are no failures."""
    from npedit.scoring.results import UNDEFINED_PREFIX

    reasons = [(row.id, reason) for row in rows for reason in dict.fromkeys(row.why.values())]
    return [(name, reason) for name, reason in reasons if not reason.startswith(UNDEFINED_PREFIX)]


def print_reasons(reasons: Sequence[tuple[str, str]], total: int) -> None:
    """Print why scores are missing: one line for each kind of reason, with the number of rows and `EXAMPLES` of them.

    `reasons` are (row id, reason); `total` is the number of all rows.
    """
    by_kind: dict[str, list[str]] = {}
    for name, reason in reasons:
        file = re.match(r"no [a-z ]+(?= \S+: )", reason)  # "no edited picture NAME: why"
        kind = file[0] if file else re.sub(r"\d+", "#", reason.replace(name, "").split(":")[0])
        by_kind.setdefault(kind, []).append(f"{name}: {reason}")
    for lines in by_kind.values():
        more = f"; and {len(lines) - EXAMPLES} more, see rows.jsonl" if len(lines) > EXAMPLES else ""
        words = escape("; ".join(lines[:EXAMPLES]) + more)
        err.print(f"[yellow]note[/] scores are missing in {len(lines)} of {total} rows; {words}")


def open_encoders(weights: tuple[str, str], lpips: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """DINO and CLIP, or why they are missing, which is said; and what to note of them all."""
    from npedit.scoring.encoders import Clip, Dino, MissingEncoder, open_encoder

    encoders = open_encoder(Dino, weights[0]), open_encoder(Clip, weights[1])
    for encoder in encoders:
        if isinstance(encoder, MissingEncoder):
            err.print(f"[yellow]note[/] metrics are missing: {escape(encoder.reason)}")
    used = {"dino": weights[0] or Dino.default_weights, "clip": weights[1] or Clip.default_weights, "dtype": "float32"}
    return encoders, used | ({"lpips": lpips.tag} if lpips else {})


def open_lpips(folder: Path | None) -> Any:
    """LPIPS, if its folder is given."""
    from npedit.nets.device import pick_device
    from npedit.scoring.lpips import Lpips

    return Lpips.load(folder, pick_device()) if folder else None
