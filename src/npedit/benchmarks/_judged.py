"""What the judged benchmarks share: pictures of the edits, questions to the judge, rows, headlines, files.

A result is a folder:

    rows.jsonl      {"id", "task", "scores": {name: number or null}, "why": {name: outcome where null}, ...} an item
    summary.json    {headline: {"value": number or null, "n", "coverage", "bounds"}}
    settings.json   protocol, judge, editor, counts of outcomes: what the numbers depend on
    answers.jsonl   every answer in full (judges/cache.py); a run that goes on asks nothing twice
    official/       pictures and scores in the layout of the benchmark's own scripts

`coverage` is the share of the benchmark's items that have the score; below the least one wanted `value` is null. The
`bounds` are what it would be if every missing score were the lowest, and the highest, of the scale.
"""

from __future__ import annotations

import json
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from PIL import Image
from rich.table import Table

from npedit.benchmarks._answers import parse_scores
from npedit.benchmarks._headlines import Row
from npedit.benchmarks._outputs import edit_cache_key, find_picture_any_format, has_cache_key, make_opener, save_png
from npedit.benchmarks._protocol import Protocol, Question
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError, explain_write_errors
from npedit.judges.base import (
    MISSING_IMAGE,
    OK,
    REFUSED,
    REJECTED,
    TRANSPORT_ERROR,
    JudgeModel,
    JudgeUnavailable,
    Reply,
)
from npedit.judges.cache import AnswerCache, answer_cache_key
from npedit.runs.checkpoint import write_text
from npedit.scoring import results
from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from npedit.scoring.lpips import Lpips
from npedit.scoring.metrics import feature_metrics, perceptual_metrics, pixel_metrics

ROWS, SUMMARY, FACTS, ANSWERS = "rows.jsonl", "summary.json", "settings.json", "answers.jsonl"
# in a row: calls without an answer, requests refused alike; and answers without a score where none had one before
MAX_FAILURES_IN_A_ROW, MAX_REJECTIONS_IN_A_ROW, MAX_UNREADABLE_ANSWERS = 8, 5, 10
STOP_SECONDS = 2.0  # for questions under way when a run is stopped
CHUNK = 16  # pictures edited at a time
ProgressCallback = Callable[[int, int], None]  # done, of all
EditFn = Callable[[list[Image.Image], list[str]], list[Image.Image]]  # RGB pictures and instructions -> results


@dataclass(frozen=True)
class Item:
    """One edit asked for. `task` is the group that headlines average over; `kind` the edit type in the protocol's
    texts; `source` opens the picture (RGB); `edited` is where the result lies; `more` goes into the row."""

    id: str
    task: str
    kind: str
    instruction: str
    source: Callable[[], Image.Image]
    edited: Path
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RepeatSettings:
    """How often each question is asked: `repeats` times, and in `swap` also with the two pictures exchanged."""

    repeats: int = 1
    swap: bool = False

    def passes_of(self, question: Question) -> list[tuple[bool, int]]:
        """(exchanged, number) of each pass."""
        orders = [False, True] if self.swap and len(question.pictures) > 1 else [False]
        return [(order, k) for order in orders for k in range(self.repeats)]


class Scorer:
    """Asks a judge about items under a protocol. `combine` makes one score of a question's numbers (min, mean)."""

    def __init__(
        self,
        judge: JudgeModel,
        protocol: Protocol,
        cache: AnswerCache,
        repeats: RepeatSettings,
        combine: Callable[[Sequence[float]], float],
    ):
        judge.check_supported(protocol.request_settings)
        if repeats.swap and not any(q.swapped for q in protocol.questions):
            raise UserError(
                f"--swap: expected a protocol with texts for both orders; {protocol.name} has one; leave it"
            )
        if repeats.repeats > 1 and judge.identity["kind"] == "local":
            raise UserError("--repeats: expected 1 for a local judge, which is greedy: it would answer the same again")
        self.judge, self.protocol, self.cache, self.repeats, self.combine = judge, protocol, cache, repeats, combine
        self._failures, self._lock = 0, threading.Lock()
        self._rejections: list[str] = []  # the same message, in a row
        self._readable, self._unreadable = 0, 0

    def judge_item(self, item: Item) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
        """Question -> for each pass its outcome, and its numbers if that is ok.

        Raises:
            JudgeUnavailable: no further question makes sense. What has been answered is kept.
        """
        source = item.source()
        try:
            edited = read_photo(find_picture_any_format(item.edited))
        except BadImage:  # none there, or broken
            return {q.name: [(MISSING_IMAGE, ())] for q in self.protocol.questions}
        if self.protocol.resize == "source" and edited.size != source.size:
            edited = edited.resize(source.size)  # bicubic, Pillow's own choice, as in the official code
        shown = {"source": source, "edited": edited}
        return {
            q.name: [self._judge_pass(item, q, shown, *which) for which in self.repeats.passes_of(q)]
            for q in self.protocol.questions
        }

    def _judge_pass(
        self, item: Item, question: Question, shown: Mapping[str, Image.Image], exchanged: bool, number: int
    ) -> tuple[str, tuple[float, ...]]:
        images = [shown[name] for name in question.pictures]
        numbers: tuple[float, ...] = ()
        for part, prompt in enumerate(question.prompts(item.kind, item.instruction, exchanged)):
            place = {"item": item.id, "question": question.name, "exchanged": exchanged, "pass": number, "part": part}
            outcome, found = self._ask_until_readable(
                prompt, images[::-1] if exchanged else images, question.criteria, place
            )
            if outcome != OK:
                return outcome, ()
            numbers += found
        return OK, numbers

    def _ask_until_readable(
        self, prompt: str, images: Sequence[Image.Image], count: int, place: Mapping[str, Any]
    ) -> tuple[str, tuple[float, ...]]:
        """Ask until an answer can be read, at most the protocol's number of tries."""
        p, outcome = self.protocol, ""
        numbers: tuple[float, ...] = ()
        for attempt in range(p.tries):
            text = f"{prompt}\n\n{p.reminder}" if attempt and p.reminder else prompt
            if attempt and text == prompt and self.judge.identity["kind"] == "local":
                break  # greedy: it would say the same
            record = self._ask_or_reuse(text, images, {**place, "attempt": attempt})
            outcome = record["outcome"]
            if outcome == OK:
                outcome, numbers = parse_scores(p.answer, record["text"], count, p.low, p.high)
                self._check_readable(outcome == OK, record)
            if outcome in (OK, REFUSED, REJECTED, TRANSPORT_ERROR):
                break
        return outcome, numbers

    def _ask_or_reuse(self, prompt: str, images: Sequence[Image.Image], place: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record of one call, from the cache if it is there."""
        nth = {"pass": place["pass"], "attempt": place["attempt"]}
        key = answer_cache_key(images, protocol=self.protocol.hash, judge=self.judge.identity, prompt=prompt, **nth)
        kept = self.cache.get(key)
        if kept is not None:
            return kept
        start = time.monotonic()
        reply = self.judge.ask(prompt, images, self.protocol.request_settings)
        record = {
            "key": key, **place, "outcome": reply.outcome, "text": reply.text, "detail": reply.detail,
            "usage": dict(reply.usage), "seconds": round(time.monotonic() - start, 2), "judge": self.judge.name,
            "served_by": reply.served_by, "address": self.judge.address,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        self.cache.put(record)
        with self._lock:
            self._check_rejections(reply)
            self._failures = self._failures + 1 if reply.outcome == TRANSPORT_ERROR else 0
            if self._failures >= MAX_FAILURES_IN_A_ROW:
                raise JudgeUnavailable(
                    f"expected answers from {self.judge.name}; {self._failures} calls in a row got none, the last for: "
                    f"{reply.detail}; see to the server and run the same command: {len(self.cache)} answers are kept"
                )
        return record

    def _check_rejections(self, reply: Reply) -> None:
        """Stop the run where the server refuses every request alike: all others would end so too."""
        message = re.sub(r"[0-9a-f-]{12,}|\d+", "#", reply.detail)  # without the request's number
        same = reply.outcome == REJECTED and self._rejections[-1:] in ([], [message])
        self._rejections = [*self._rejections, message] if same else [message] if reply.outcome == REJECTED else []
        if len(self._rejections) >= MAX_REJECTIONS_IN_A_ROW:
            raise JudgeUnavailable(
                f"expected answers from {self.judge.name}; it refused {len(self._rejections)} requests in a row with "
                f"{reply.detail}; change the request with --judge-parameters, or choose another --judge or --protocol; "
                f"{len(self.cache)} answers are kept"
            )

    def _check_readable(self, is_readable: bool, record: Mapping[str, Any]) -> None:
        """Stop the run where no answer so far has scores."""
        with self._lock:
            self._readable += is_readable
            self._unreadable += not is_readable
            if self._readable or self._unreadable < MAX_UNREADABLE_ANSWERS:
                return
        cut, server = "length" in record["detail"], self.judge.identity["kind"] == "server"
        advice = "its answers are cut off by the token limit: raise it" if cut else "change the request's parameters"
        advice += " with --judge-parameters" if server else ""
        raise JudgeUnavailable(
            f"expected scores from {self.judge.name}; got {self._unreadable} answers and can read none; the last one "
            f"({record['detail']}) begins: {record['text'][:200]!r}; "
            f"{advice}, or choose another --judge or --protocol"
        )

    def score_item(self, item: Item) -> Row:
        """An item's row without its overall score, which is the benchmark's to add (`set_score`)."""
        row: Row = {"id": item.id, "task": item.task, **item.more, "scores": {}, "why": {}, "numbers": {}}
        for name, passes in self.judge_item(item).items():
            failed = [outcome for outcome, _ in passes if outcome != OK]
            each = [self.combine(numbers) for outcome, numbers in passes if outcome == OK]
            whole = len(each) and not (self.repeats.swap and failed)  # half of a pair of orders would be one-sided
            row["numbers"][name] = [list(numbers) for outcome, numbers in passes if outcome == OK]
            set_score(row, name, sum(each) / len(each) if whole else None, failed[0] if failed else OK)
        return row


@dataclass(frozen=True)
class SourceImage:
    """A source picture, opened when it is needed.

    Raises:
        UserError: it cannot be opened.
    """

    file: Path | bytes
    name: str

    def __call__(self) -> Image.Image:
        try:
            return read_photo(self.file)
        except BadImage as error:
            raise UserError(f"expected the source picture of {self.name}; got: {error}; fetch the data again") from None


def set_score(row: Row, name: str, value: float | None, why: str) -> None:
    """Put a score into a row; without a value, the outcome that explains it."""
    row["scores"][name] = value
    if value is None:
        row["why"][name] = why


def score_items(
    scorer: Scorer, items: Sequence[Item], finish: Callable[[Row], Row], on_progress: ProgressCallback
) -> list[Row]:
    """The rows of all items, in their order; `finish` adds what follows from a row's scores.

    Raises:
        JudgeUnavailable: see `Scorer.judge_item`. Other errors, and Ctrl-C, pass too; the answers so far are kept.
    """
    rows: dict[int, Row] = {}
    waiting: SimpleQueue[Any] = SimpleQueue()
    done: SimpleQueue[Any] = SimpleQueue()
    for place in enumerate(items):
        waiting.put(place)
    stopping = threading.Event()
    threads = [
        threading.Thread(target=_score_waiting, args=(scorer, waiting, done, stopping), name="judge", daemon=True)
        for _ in range(min(scorer.judge.workers, len(items)))
    ]
    try:
        for thread in threads:
            thread.start()
        while len(rows) < len(items):
            number, result = done.get()
            if isinstance(result, BaseException):
                raise result
            rows[number] = finish(result)
            on_progress(len(rows), len(items))
    except BaseException:
        stopping.set()
        scorer.judge.stop_retrying()
        raise
    finally:
        end = time.monotonic() + STOP_SECONDS
        for thread in threads:
            if thread.ident is not None:  # a question without an answer ends with the process
                thread.join(max(0.0, end - time.monotonic()))
    return [rows[i] for i in range(len(items))]


def _score_waiting(scorer: Scorer, waiting: Any, done: Any, stopping: threading.Event) -> None:
    """One worker: score items until none waits. A daemon thread, so that a server that never answers cannot hold the
    process."""
    while not stopping.is_set():
        try:
            number, item = waiting.get_nowait()
        except Empty:
            return
        try:
            done.put((number, scorer.score_item(item)))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            stopping.set()
            done.put((number, error))


def sample_across_tasks(items: Sequence[Item], n: int | None) -> list[Item]:
    """The first `n` items when tasks take turns; all without `n`."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    turns = (
        sorted((k, i, item) for i, group in enumerate(by_task.values()) for k, item in enumerate(group)) if n else ()
    )
    return [item for _, _, item in turns][:n] if n else list(items)


def results_table(
    title: str, rows: Sequence[Row], found: Sequence[Item], summary: Mapping[str, Mapping[str, Any]]
) -> Table:
    """For people: each task's means over its scored items, then the headlines, macro and micro."""
    shown, names = Table(title=title), list(rows[0]["scores"])
    for column in ("", "items", "scored", *names):
        shown.add_column(column, justify="right" if column else "left")
    for task, size in Counter(i.task for i in found).items():
        part = [r["scores"] for r in rows if r["task"] == task]
        values = [[s[n] for s in part if s[n] is not None] for n in names]
        cells = [f"{statistics.fmean(v):.3f}" if v else "-" for v in values]
        shown.add_row(task, str(size), str(len(values[-1])), *cells)
    for place in dict.fromkeys(p.rpartition("/")[0] for p in summary):
        shown.add_section()
        for ending, style in (("", "bold"), ("_micro", "")):
            figures = [summary[f"{place}/{n}{ending}"] for n in names]
            n, coverage = figures[-1]["n"], figures[-1]["coverage"]
            cells = ["none" if f["value"] is None else f"{f['value']:.3f}" for f in figures]
            label = f"{place} {ending.strip('_') or 'macro'}"
            shown.add_row(label, str(round(n / coverage)) if n else "-", f"{n} = {coverage:.1%}", *cells, style=style)
    return shown


# ------------------------------------------------------------------------------------------------------------- files


def write_initial_settings(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note in a result's folder what it will depend on.

    Raises:
        UserError: it holds a result, finished or not, that depends on other things.
    """
    path = folder / FACTS
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{k} {old.get(k)!r}" for k, v in json.loads(json.dumps(facts)).items() if old.get(k) != v]
        if other:
            raise UserError(
                f"expected a new folder, or one of the same evaluation; {folder} is of another: {'; '.join(other)}; "
                "choose another --out, or give --fresh"
            )
        return
    write_text(path, json.dumps({"state": "under way", **facts}, indent=1, ensure_ascii=False) + "\n")


def edit_items(edit: EditFn, items: Sequence[Item], on_progress: ProgressCallback, editor: Mapping[str, Any]) -> None:
    """Edit every item whose picture is not there yet, or was made from another source, instruction or `editor` (facts:
    weights, seed, steps)."""
    keys = {item.id: edit_cache_key(item.source(), item.instruction, editor) for item in items}
    todo = [item for item in items if not has_cache_key(item.edited, keys[item.id])]
    on_progress(len(items) - len(todo), len(items))
    for start in range(0, len(todo), CHUNK):
        part = todo[start : start + CHUNK]
        edited = edit([item.source() for item in part], [item.instruction for item in part])
        for item, picture in zip(part, edited):
            save_png(picture, item.edited, keys[item.id])
        on_progress(len(items) - len(todo) + start + len(part), len(items))


def score_preservation(
    items: Sequence[Item],
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    lpips: Lpips | None,
    on_progress: ProgressCallback,
) -> list[results.Row]:
    """How much of each source its edited picture has kept, without a judge. Without a picture: no score."""
    rows = []
    for item in items:
        source, edited = cache(item.source), make_opener(find_picture_any_format(item.edited), "edited picture")
        measures = {**pixel_metrics(source, edited), **feature_metrics(source, edited, dino, clip)}
        measures |= perceptual_metrics(source, edited, lpips) if lpips else {}
        rows.append(results.Row.from_metrics(item.id, item.task, measures))
        on_progress(len(rows), len(items))
    return rows


def write_results(folder: Path, rows: Iterable[Row], summary: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Rows, summary and facts of a result (see the module's head)."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ROWS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def count_outcomes(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Score -> outcome -> number of items."""
    return {n: dict(Counter(r["why"].get(n, OK) for r in rows)) for n in (rows[0]["scores"] if rows else ())}
