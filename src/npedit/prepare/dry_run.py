"""A trial of a few photos: every request and answer, and what all photos would take. The answers are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npedit.prepare.asking import ANSWER_TOKENS, PROMPT_TOKENS, Asker, Meter
from npedit.prepare.engine import LocalEngine
from npedit.prepare.out_folder import PREPARE, begin_set, require_folder
from npedit.prepare.passes import Passes
from npedit.prepare.prepare import (
    PrepareSettings,
    Progress,
    ask_for_edits,
    make_passes,
    scan_folder,
)
from npedit.prepare.prompts import Prompts
from npedit.prepare.set_folder import ANSWERS
from npedit.prepare.writer import Request, Writer
from npedit.runs.lock import hold


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, as texts for people."""

    title: str
    question: str
    answer: str


@dataclass
class DryRun:
    """What a trial of `asked` photos gave. `usage` are the tokens of these photos, `photos` the number of all."""

    asked: int
    photos: int
    meter: Meter
    exchanges: list[Exchange] = field(default_factory=list)
    usage: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    rows: int = 0
    rejected: int = 0
    stopped: str = ""

    def summary_lines(self) -> list[str]:
        """Rows, requests, tokens and cost of the trial, and an estimate for all photos."""
        factor = self.photos / max(1, self.asked)
        per_photo = f"{self.requests / max(1, self.asked):.1f} requests a photo"
        lines = [
            f"{self.asked} photos: {self.rows} edits, {self.rejected} rejected, {per_photo}, {self._words(1)}",
            f"All {self.photos} photos: about {round(self.requests * factor)} requests, {self._words(factor)}",
        ]
        if not self.usage:
            lines.append("The answers have no token counts, so the cost is unknown.")
        return lines + ([f"Stopped: {self.stopped}"] if self.stopped else [])

    def _words(self, factor: float) -> str:
        scaled = {name: round(count * factor) for name, count in self.usage.items()}
        words = f"{scaled.get(PROMPT_TOKENS, 0):,} prompt tokens, {scaled.get(ANSWER_TOKENS, 0):,} answer tokens"
        cost = self.meter.cost_of(scaled)
        return words + (f", cost {cost:.4g}" if cost else "")


def dry_run(
    folder: Path,
    out: Path,
    settings: PrepareSettings,
    prompts: Prompts,
    writer: Writer,
    verifier: Writer | None,
    meter: Meter,
    count: int,
    report: Callable[[Progress], None] = lambda progress: None,
) -> DryRun:
    """Ask for `count` photos, spread over the folder. Nothing but the photos' facts and the answers is written.

    Raises:
        UserError: bad input, or the model cannot be reached.
    """
    require_folder(out, PREPARE, [folder])
    out.mkdir(parents=True, exist_ok=True)
    engine = LocalEngine(max(writer.workers, 2))
    with hold(out, "prepare"), engine.open_answers(out / ANSWERS, meter) as (answers, _):
        begin_set(out, PREPARE, [folder])
        scan = scan_folder(folder, out, settings, {}, engine, report)
        step = max(1, len(scan.chosen) // count)
        photos = scan.chosen[::step][:count]
        found = DryRun(len(photos), len(scan.chosen), meter)
        passes = _listening(make_passes(settings, prompts, writer, verifier, answers, meter), found)
        made, found.stopped = ask_for_edits(photos, replace(settings, rounds=1), passes, engine, report)
    found.rows = sum(len(result["rows"]) for result in made.values())
    found.rejected = sum(row["reason"] != "not offered" for result in made.values() for row in result["rejected"])
    return found


def _listening(passes: Passes, found: DryRun) -> Passes:
    """Passes whose requests and answers are recorded in `found`."""

    def on_answer(request: Request, record: Mapping[str, Any], kept: bool) -> None:
        found.requests += 1
        found.usage.update(record.get("usage", {}))
        width, height = request.image.size
        title = f"{request.name}, a picture of {width} x {height} pixels{' (answered before)' if kept else ''}"
        question = f"{request.system.strip()}\n\n{request.user.strip()}\n\nschema: {json.dumps(request.schema)}"
        answer = record["text"] if record["outcome"] == "ok" else f"{record['outcome']}: {record['detail']}"
        found.exchanges.append(Exchange(title, question, f"answer: {answer}"))

    def listen(asker: Asker) -> Asker:
        return replace(asker, on_answer=on_answer)

    return replace(passes, writer=listen(passes.writer), verifier=listen(passes.verifier) if passes.verifier else None)
