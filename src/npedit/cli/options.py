"""Options that several commands share, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

ModelOption = Annotated[
    str, typer.Option("--model", "--run", "-m", help="RUN, RUN/final, RUN/checkpoint-N, or 'embedded': the toy editor.")
]
BaseOption = Annotated[
    str,
    typer.Option("--base", help="Base model, if it is not where the editor's npedit.json says: a folder or Hub id."),
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="The same seed gives the same result.", min=0)]
StepsOption = Annotated[int | None, typer.Option(help="Steps of the editor; as trained if not given.", min=1, max=64)]

# What measures without a judge.
DinoOption = Annotated[
    str,
    typer.Option(help="DINO: a folder or Hub id, or 'none'. If not given, facebook/dino-vits16 if it is to be had."),
]
ClipOption = Annotated[
    str,
    typer.Option(
        help="CLIP: a folder or Hub id, or 'none'. If not given, openai/clip-vit-base-patch32 in the same way."
    ),
]
LpipsOption = Annotated[
    Path | None,
    typer.Option(help="LPIPS: a folder with its two files of weights (docs/metrics.md); else left out."),
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
JudgeModelOption = Annotated[str, typer.Option("--judge-model", help="The model's name at the server.")]
JudgeRevisionOption = Annotated[
    str, typer.Option("--judge-revision", help="Which version of it the server runs; recorded.")
]
WorkersOption = Annotated[int, typer.Option(help="Questions to the server at once.", min=1, max=256)]
EditedOption = Annotated[
    Path | None, typer.Option(help="Score these pictures, in the official layout, and not an editor's.", exists=True)
]
ScoresOption = Annotated[
    Path | None, typer.Option("--scores", help="Take scores that the official scripts wrote; no judge.", exists=True)
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Folder with the official texts, for official protocols.", exists=True)
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The result's folder. The same command goes on in it.")]
ItemsOption = Annotated[
    int | None, typer.Option("--items", help="Only so many, tasks in turn: a trial, no headline.", min=1)
]
RepeatsOption = Annotated[int, typer.Option(help="How often each question is asked; the mean counts.", min=1)]
SwapOption = Annotated[bool, typer.Option("--swap", help="Ask also with the two pictures exchanged; the mean counts.")]
CoverageOption = Annotated[
    float, typer.Option("--min-coverage", help="Least share of items with a score for a headline.", min=0, max=1)
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew; what is there is moved aside, not deleted.")]


ReportProgress = Callable[[int, int], None]  # called with (number done, total)


class ProgressBar:
    """A progress bar on standard error, removed at the end. `with ProgressBar(...) as report_progress` gives the
    function (number done, total) that moves the bar."""

    def __init__(self, words: str, total: int | None = None):
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True, highlight=False, soft_wrap=True), transient=True)
        self.task = self.progress.add_task(escape(words), total=total)

    def __enter__(self) -> ReportProgress:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
