"""`npedit evaluate own|dreambench`: edit, measure without a judge, leave a folder of results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from npedit import __version__
from npedit.cli.options import ClipOption, DinoOption, LpipsOption, ModelOption, ProgressBar, SeedOption, StepsOption
from npedit.errors import UserError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

MEASURES = 1  # raised whenever a measure changes its meaning
LONGEST = 1024  # pixels of the longer side of a photo of DreamBench as an editor gets it; the nets look at 224
OutOption = Annotated[Path, typer.Option("--out", "-o", help="A new folder for the results, or one to go on with.")]
EditedOption = Annotated[
    Path | None, typer.Option("--edited", help="Measure the pictures in this folder, which another editor made.")
]
CopyOption = Annotated[bool, typer.Option("--copy", help="Measure the editor that does nothing.")]


def own(
    data: Annotated[str, typer.Argument(help="A folder of photos with metadata.jsonl, as for training.")],
    folder: OutOption,
    model: ModelOption = "embedded",
    edited: EditedOption = None,
    copy: CopyOption = False,
    items: Annotated[int | None, typer.Option(help="Only the first so many.", min=1)] = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    dino: DinoOption = "",
    clip: ClipOption = "",
    lpips: LpipsOption = None,
) -> None:
    """Your own photos and instructions: how much of the reference is kept, and with targets how near they are.

    Optional columns: mask_file_name (white is the edit) and edited_file_name (the wanted result). Pictures of another
    editor (--edited) are named ID.png.
    """
    from npedit.benchmarks import own as bench
    from npedit.runs.lock import hold

    rows, digest = bench.read_items(data)
    rows = rows[:items]
    near = open_lpips(lpips)
    with hold(folder, "evaluate own"):
        run = _Run.begin("own", folder, {"data": digest}, model, edited, copy, seed, steps, (dino, clip), near)
        run.make(bench.edit_jobs(rows, seed))
        scored = run.watch(
            "measuring", lambda told: bench.score_pictures(rows, run.pictures, *run.encoders, told, near)
        )
        run.finish(scored, {})
        out.print(bench.task_table(scored))


def dreambench(
    data: Annotated[str, typer.Argument(help="The folder 'dataset' of github.com/google/dreambooth.")],
    folder: OutOption,
    model: ModelOption = "embedded",
    edited: EditedOption = None,
    copy: CopyOption = False,
    pictures: Annotated[int, typer.Option(help="How many pictures a prompt; 4 in the literature.", min=1)] = 4,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    dino: DinoOption = "",
    clip: ClipOption = "",
) -> None:
    """DreamBench: is the subject of a photo kept in new scenes? 30 subjects, 25 prompts, 4 pictures each.

    Pictures of another editor (--edited) are named SUBJECT/PP-K.png, both counted from 0: cat/07-0.png.
    """
    from npedit.benchmarks import dreambench as bench
    from npedit.runs.lock import hold

    subjects, digest = bench.read_subjects(data)
    facts = {"data": digest, "subjects": len(subjects), "pictures": pictures}
    with hold(folder, "evaluate dreambench"):
        run = _Run.begin("dreambench", folder, facts, model, edited, copy, seed, steps, (dino, clip))
        _dreambench_in(run, subjects, seed, pictures)


def _dreambench_in(run: _Run, subjects: Sequence[Any], seed: int, pictures: int) -> None:
    """`dreambench` in a folder that this process holds."""
    from npedit.benchmarks import dreambench as bench

    real = bench.real_image_baseline(subjects, *run.encoders)
    official = bench.is_official_data(subjects)
    wrong = bench.check_real_image_baseline(real) if official else ["these are not the official subjects and photos"]
    for words in wrong:
        err.print(f"[yellow]note[/] not to be compared with the literature: {escape(words)}")
    run.make(bench.edit_jobs(subjects, seed, pictures), LONGEST)
    scored = run.watch(
        "measuring", lambda told: bench.score_pictures(subjects, run.pictures, *run.encoders, told, pictures)
    )
    run.finish(scored, real)


BENCHMARKS: dict[str, Callable[..., None]] = {"own": own, "dreambench": dreambench}


@dataclass(frozen=True)
class _Run:
    """One evaluation: where its pictures lie and what measures them."""

    name: str
    folder: Path
    pictures: Path
    source: dict[str, Any]
    encoders: tuple[Any, Any]

    @classmethod
    def begin(
        cls,
        name: str,
        folder: Path,
        facts: dict[str, Any],
        model: str,
        edited: Path | None,
        copy: bool,
        seed: int,
        steps: int | None,
        weights: tuple[str, str],
        lpips: Any = None,
    ) -> _Run:
        """Check everything before work is spent, and write settings.json."""
        from npedit.benchmarks._outputs import EDITED
        from npedit.scoring import results

        if bool(edited) + copy + (model != "embedded") > 1:
            raise UserError("expected one of --model, --edited and --copy; got several; leave all but one out")
        if edited and not edited.is_dir():
            raise UserError(f"expected a folder of edited pictures; {edited} is none; correct --edited")
        encoders, used = open_encoders(weights, lpips)
        source: dict[str, Any] = {"edited": str(edited.resolve())} if edited else {"copy": True}
        if not edited and not copy:
            source = {"model": model, "files": fingerprint(model), "seed": seed, "steps": steps}
        settings = {"npedit": __version__, "source": source, "encoders": used}
        results.prepare_folder(folder, {**settings, "protocol": {"benchmark": name, "measures": MEASURES, **facts}})
        return cls(name, folder, edited or folder / EDITED, source, encoders)

    def make(self, jobs: Sequence[Any], longest: int = 0) -> None:
        """Edit what is not there yet; nothing for pictures of another editor."""
        from npedit.benchmarks._outputs import edit_missing
        from npedit.editor import Editor

        if "edited" in self.source:
            return
        facts = {k: v for k, v in self.source.items() if k not in ("model", "seed")}
        if "copy" in self.source:
            edit = lambda pictures, instructions, seed: list(pictures)  # noqa: E731
        else:
            editor, steps = Editor.open(self.source["model"]), self.source["steps"]
            edit = lambda pictures, instructions, seed: editor.edit(pictures, instructions, seed, steps)  # noqa: E731
        self.watch("editing", lambda told: edit_missing(jobs, edit, self.pictures, told, longest, facts))

    def watch(self, words: str, work: Callable[[Callable[[int, int], None]], Any]) -> Any:
        """Do `work(told)` behind a bar."""
        with ProgressBar(words) as told:
            return work(told)

    def finish(self, rows: Sequence[Any], extra: dict[str, Any]) -> None:
        """Write the results and print the headlines."""
        from npedit.benchmarks._outputs import results_table
        from npedit.scoring.results import write_results

        out.print(results_table(write_results(self.folder, rows, extra), f"{self.name}: {len(rows)} rows"))
        print_reasons(rows)
        out.print(f"Results: {escape(str(self.folder))}")
        if rows and not any(value is not None for row in rows for value in row.scores.values()):
            raise UserError(f"expected scores; got none for any of {len(rows)} rows; see the reasons above")


def print_reasons(rows: Sequence[Any]) -> None:
    """Say why scores are missing: each kind of reason once, with the number of rows and one example."""
    from npedit.scoring.results import UNDEFINED_PREFIX

    found: dict[str, list[str]] = {}
    for row in rows:
        for reason in dict.fromkeys(why for why in row.why.values() if not why.startswith(UNDEFINED_PREFIX)):
            kind = re.sub(r"\d+", "#", reason.split(":")[0]) if row.id not in reason else reason.split(row.id)[0]
            found.setdefault(kind[:24], []).append(f"{row.id}: {reason}")
    for reasons in found.values():
        err.print(f"[yellow]note[/] scores are missing in {len(reasons)} of {len(rows)} rows; {escape(reasons[0])}")


def open_encoders(weights: tuple[str, str], lpips: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """DINO and CLIP, or why they are missing, which is said; and what to note of them all."""
    from npedit.scoring.encoders import Clip, Dino, MissingEncoder, open_encoder

    encoders = open_encoder(Dino, weights[0]), open_encoder(Clip, weights[1])
    for encoder in encoders:
        if isinstance(encoder, MissingEncoder):
            err.print(f"[yellow]note[/] measures are missing: {escape(encoder.reason)}")
    used = {"dino": weights[0] or Dino.default_weights, "clip": weights[1] or Clip.default_weights, "dtype": "float32"}
    return encoders, used | ({"lpips": lpips.tag} if lpips else {})


def open_lpips(folder: Path | None) -> Any:
    """LPIPS, if its folder is given."""
    from npedit.nets.device import pick_device
    from npedit.scoring.lpips import Lpips

    return Lpips.load(folder, pick_device()) if folder else None


def fingerprint(model: str) -> str:
    """A hash of the names and contents of an editor's files."""
    from npedit.judges.local import hash_folder as folder_digest
    from npedit.runs.resolve import resolve_editor

    return folder_digest(resolve_editor(model).folder)
