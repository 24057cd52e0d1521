"""`npedit prepare SET --captions`: the captions that the rows of an existing set lack."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from npedit.cli.json_output import print_json, text_on_stderr
from npedit.errors import UserError, npedit_command

if TYPE_CHECKING:
    from npedit.cli.prepare import Job
    from npedit.prepare.prepare import ReportProgress

out = Console(highlight=False, soft_wrap=True)
Display = Callable[[bool], AbstractContextManager["ReportProgress"]]


def run_captions(job: Job, unused: Sequence[str], display: Display, as_json: bool) -> None:
    """Make the set and print what was filled; with `as_json` the facts as they are in prepare.json. `unused` are
    options that were given and have no meaning here; `display` shows the progress.

    Raises:
        UserError: such options, bad input, a model that cannot be reached, or the cost ceiling.
    """
    from npedit.prepare.asking import Meter
    from npedit.prepare.caption_set import caption_set
    from npedit.prepare.prepare import PrepareSettings

    if unused:
        raise UserError(f"--captions: expected no {', '.join(unused)}, which concern new edits; leave them out")
    settings, meter = PrepareSettings(**job.settings), Meter(*job.prices)
    with display(any(job.prices)) as report:
        facts = caption_set(job.photos, job.target, settings, job.prompts, *job.models, meter, report, job.engine)
    if as_json:
        print_json({"folder": job.target} | facts)
    with text_on_stderr(as_json):
        print_captions(job.target, facts)
    if facts["stopped"]:
        raise UserError(
            f"expected to complete all rows; stopped: {facts['stopped']}. The set holds the rows that are complete. To "
            "go on, raise the ceiling and run the same command: no answered question is asked again"
        )


def print_captions(folder: Path, facts: dict[str, Any]) -> None:
    """How many rows are complete, what was rejected, and what it cost."""
    out.print(
        f"{facts['rows']} of {facts['read']} rows are complete; {facts['complete_before']} were before. "
        f"{facts['rejected']} rows rejected"
    )
    for reason, count in list(facts["reasons"].items())[:5]:
        out.print(escape(f"  {count} {reason}"))
    usage, cost = facts["usage"], facts["cost"]
    tokens = f"{usage.get('prompt_tokens', 0):,} prompt tokens, {usage.get('completion_tokens', 0):,} answer tokens"
    priced = f"; cost {cost:.4g}" if cost else ""
    out.print(f"{sum(facts['requests'].values())} requests in this run; of all answers {tokens}{priced}")
    words = f"{npedit_command()} train RECIPE data.path={shlex.quote(str(folder))}"
    out.print(f"Set: [bold]{escape(str(folder))}[/]. Train on it: {escape(words)}")
