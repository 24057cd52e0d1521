"""Options that several commands share, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import err

ModelOption = Annotated[
    str, typer.Option("--model", "--run", "-m", help="RUN, RUN/final, RUN/checkpoint-N, or 'embedded': the toy editor.")
]
BaseOption = Annotated[
    str,
    typer.Option("--base", help="Base model, if it is not where the editor's npedit.json says: a folder or Hub id."),
]
SeedOption = Annotated[
    int, typer.Option("--seed", "-s", help="The same seed gives the same result.", min=0, max=2**64 - 1)
]
TileOption = Annotated[
    int | None,
    typer.Option(
        min=0, help="Decode in tiles of this many pixels to save memory; 0: whole. If not given: as in training."
    ),
]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="Keep each model in the CPU's memory while it does not work.")
]
BitsOption = Annotated[int, typer.Option(help="Hold weights in 8 or 4 bits to save memory; 0: as trained.")]
ProvenanceOption = Annotated[
    str,
    typer.Option(
        help="What the files' metadata say: 'editor': edited by an AI model, and by which; 'instruction': also the "
        "instruction; 'none': nothing."
    ),
]
StepsOption = Annotated[int | None, typer.Option(help="Sampling steps; as in training if not given.", min=1, max=64)]

# The encoders of metrics that need no judge.
DinoOption = Annotated[
    str,
    typer.Option(help="DINO: a folder or Hub id, or 'none'. If not given, facebook/dino-vits16 if it can be opened."),
]
ClipOption = Annotated[
    str,
    typer.Option(
        help="CLIP: a folder or Hub id, or 'none'. If not given, openai/clip-vit-base-patch32 if it can be opened."
    ),
]
LpipsOption = Annotated[
    Path | None,
    typer.Option(help="LPIPS: a folder with its two weight files (docs/metrics.md). If not given, LPIPS is left out."),
]

# Of judged benchmarks.
JudgedModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "--run",
        "-m",
        help="RUN, RUN/final, RUN/checkpoint-N, 'embedded', or 'copy': the input unchanged, a baseline.",
    ),
]
JudgeOption = Annotated[
    str,
    typer.Option(
        help="A vision-language model's folder or Hub id (@REVISION), or the address of an OpenAI-compatible server "
        "(http://localhost:8000/v1; its key in NPEDIT_JUDGE_KEY)."
    ),
]
JudgeModelOption = Annotated[str, typer.Option("--judge-model", help="The model's name on the server.")]
JudgeRevisionOption = Annotated[
    str, typer.Option("--judge-revision", help="Which version of it the server runs; recorded.")
]
WorkersOption = Annotated[int, typer.Option(help="Concurrent requests to the server.", min=1, max=256)]
EditedOption = Annotated[
    Path | None, typer.Option(help="Score the pictures in this folder (official layout).", exists=True)
]
ScoresOption = Annotated[
    Path | None, typer.Option("--scores", help="Import scores of the official scripts; no judge.", exists=True)
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Folder with the official texts, for official protocols.", exists=True)
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The results' folder. The same command resumes in it.")]
ItemsOption = Annotated[
    int | None, typer.Option("--items", help="Score only so many items, from all tasks: a trial.", min=1)
]
RepeatsOption = Annotated[int, typer.Option(help="How often each question is asked; scores are means.", min=1)]
SwapOption = Annotated[bool, typer.Option("--swap", help="Also ask with the pictures exchanged; scores are means.")]
CoverageOption = Annotated[
    float, typer.Option("--min-coverage", help="Share of scored items that a headline score needs.", min=0, max=1)
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start again; an existing folder is renamed, not deleted.")]


ReportProgress = Callable[[int, int], None]  # called with (number done, total)


class ProgressBar:
    """A progress bar on standard error, removed at the end. `with ProgressBar(...) as report_progress` gives the
    function (number done, total) that moves the bar."""

    def __init__(self, words: str, total: int | None = None):
        from rich.progress import Progress

        self.progress = Progress(console=err, transient=True)
        self.task = self.progress.add_task(escape(words), total=total)

    def __enter__(self) -> ReportProgress:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
