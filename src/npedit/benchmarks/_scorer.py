"""Ask a judge about the items of a benchmark: items, repeats, retries, and when to stop.

`score_items` is the way in. Each item becomes a row:

    {"id", "task", "scores": {name: number or null}, "why": {name: outcome where null}, "numbers": {question: answers}}

A row without an edited picture also has "reason", the failure in words.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.benchmarks._answers import ParsedScores, parse_scores
from npedit.benchmarks._headlines import Row
from npedit.benchmarks._outputs import ProgressCallback, find_picture_any_format
from npedit.benchmarks._protocol import Protocol, Question
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.judges.base import (
    MAX_FAILURES_IN_A_ROW,
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
from npedit.judges.workers import results_as_finished

MAX_REJECTIONS_IN_A_ROW = 5  # requests that the server refuses with the same message
MAX_UNREADABLE_ANSWERS = 10  # answers without scores, while no answer could be read


@dataclass(frozen=True)
class Item:
    """One edit of a benchmark. `task` is the group that headlines average over. `kind` is the edit type, which selects
    the protocol's text. `source` opens the source picture (RGB). `edited` is the path of the edited picture. `more` are
    further fields of the row."""

    id: str
    task: str
    kind: str
    instruction: str
    source: SourceImage
    edited: Path
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceImage:
    """A source picture, opened when it is called. `file` is a path or the file's bytes.

    Raises:
        UserError: the picture cannot be opened.
    """

    file: Path | bytes
    name: str

    def __call__(self) -> Image.Image:
        try:
            return read_photo(self.file)
        except BadImage as error:
            raise UserError(f"expected the source picture of {self.name}; got: {error}; fetch the data again") from None

    def file_hash(self) -> str:
        """sha256 of the file. Errors as when it is called."""
        try:
            content = self.file if isinstance(self.file, bytes) else self.file.read_bytes()
        except OSError as error:
            raise UserError(f"expected the source picture of {self.name}; got: {error}; fetch the data again") from None
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class RepeatSettings:
    """How often each question is asked: `repeats` times. With `swap`, a question about two pictures is also asked with
    the pictures in the other order."""

    repeats: int = 1
    swap: bool = False

    def passes_of(self, question: Question) -> list[tuple[bool, int]]:
        """(pictures in the other order?, repeat number) of each pass."""
        orders = [False, True] if self.swap and len(question.pictures) > 1 else [False]
        return [(order, k) for order in orders for k in range(self.repeats)]


def set_score(row: Row, name: str, value: float | None, outcome: str) -> None:
    """Write a score into a row. Without a value, `outcome` is written as the reason."""
    row["scores"][name] = value
    if value is None:
        row["why"][name] = outcome


class Scorer:
    """Asks a judge about items under a protocol. `combine` makes one score of a question's numbers (min, mean).

    Raises:
        UserError: the judge does not support the protocol, or the repeats make no sense with them.
    """

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
                f"--swap: expected a protocol with texts for both orders; {protocol.name} has one; leave the option out"
            )
        if repeats.repeats > 1 and judge.identity["kind"] == "local":
            raise UserError(
                "--repeats: expected 1 for a local judge; its decoding is greedy, and every repeat would give the same "
                "answer; leave the option out"
            )
        self.judge, self.protocol, self.cache, self.repeats, self.combine = judge, protocol, cache, repeats, combine
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._rejections_in_a_row: list[str] = []  # messages, all the same
        self._readable, self._unreadable = 0, 0

    def score_item(self, item: Item) -> Row:
        """The row of an item. The benchmark adds the overall score later.

        Raises:
            JudgeUnavailable: no further question makes sense. Finished answers are kept.
        """
        row: Row = {"id": item.id, "task": item.task, **item.more, "scores": {}, "why": {}, "numbers": {}}
        try:
            judged = self._judge_item(item)
        except BadImage as error:
            judged = {q.name: [(MISSING_IMAGE, ())] for q in self.protocol.questions}
            row["reason"] = f"no edited picture {item.edited.name}: {error}"
        for name, passes in judged.items():
            failed = [outcome for outcome, _ in passes if outcome != OK]
            values = [self.combine(numbers) for outcome, numbers in passes if outcome == OK]
            # With --swap both orders must be there: one order alone would keep the judge's position bias.
            has_score = values and not (self.repeats.swap and failed)
            row["numbers"][name] = [list(numbers) for outcome, numbers in passes if outcome == OK]
            set_score(row, name, sum(values) / len(values) if has_score else None, failed[0] if failed else OK)
        return row

    def _judge_item(self, item: Item) -> dict[str, list[ParsedScores]]:
        """Question -> the outcome and numbers of each pass.

        Raises:
            BadImage: the edited picture is missing or broken.
        """
        source, edited = item.source(), read_photo(find_picture_any_format(item.edited))
        if self.protocol.resize == "source" and edited.size != source.size:
            edited = edited.resize(source.size)  # bicubic, Pillow's default, as in the official code
        pictures = {"source": source, "edited": edited}
        return {
            q.name: [self._judge_pass(item, q, pictures, *which) for which in self.repeats.passes_of(q)]
            for q in self.protocol.questions
        }

    def _judge_pass(
        self, item: Item, question: Question, pictures: Mapping[str, Image.Image], is_swapped: bool, number: int
    ) -> ParsedScores:
        images = [pictures[name] for name in question.pictures]
        numbers: tuple[float, ...] = ()
        for part, prompt in enumerate(question.prompts(item.kind, item.instruction, is_swapped)):
            ids = {"item": item.id, "question": question.name, "exchanged": is_swapped, "pass": number, "part": part}
            outcome, found = self._ask_until_readable(
                prompt, images[::-1] if is_swapped else images, question.criteria, ids
            )
            if outcome != OK:
                return outcome, ()
            numbers += found
        return OK, numbers

    def _ask_until_readable(
        self, prompt: str, images: Sequence[Image.Image], count: int, ids: Mapping[str, Any]
    ) -> ParsedScores:
        """Ask until `count` scores can be read in the answer, at most `protocol.tries` times."""
        p, outcome = self.protocol, ""
        numbers: tuple[float, ...] = ()
        for attempt in range(p.tries):
            text = f"{prompt}\n\n{p.reminder}" if attempt and p.reminder else prompt
            if attempt and text == prompt and self.judge.identity["kind"] == "local":
                break  # greedy decoding would give the same answer
            record = self._ask_or_reuse(text, images, {**ids, "attempt": attempt})
            outcome = record["outcome"]
            if outcome == OK:
                outcome, numbers = parse_scores(p.answer, record["text"], count, p.low, p.high)
                self._check_readable(outcome == OK, record)
            if outcome in (OK, REFUSED, REJECTED, TRANSPORT_ERROR):
                break
        return outcome, numbers

    def _ask_or_reuse(self, prompt: str, images: Sequence[Image.Image], ids: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record of one call, from the cache if it is there."""
        repeat = {"pass": ids["pass"], "attempt": ids["attempt"]}
        key = answer_cache_key(images, protocol=self.protocol.hash, judge=self.judge.identity, prompt=prompt, **repeat)
        cached = self.cache.get(key)
        if cached is not None:
            return cached
        start = time.monotonic()
        reply = self.judge.ask(prompt, images, self.protocol.request_settings)
        record = {
            "key": key, **ids, "outcome": reply.outcome, "text": reply.text, "detail": reply.detail,
            "usage": dict(reply.usage), "seconds": round(time.monotonic() - start, 2), "judge": self.judge.name,
            "served_by": reply.served_by, "address": self.judge.address,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        self.cache.put(record)
        with self._lock:
            self._check_rejections(reply)
            self._check_failures(reply)
        return record

    def _check_failures(self, reply: Reply) -> None:
        """Stop the run where several calls in a row got no answer."""
        self._failures_in_a_row = self._failures_in_a_row + 1 if reply.outcome == TRANSPORT_ERROR else 0
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise JudgeUnavailable(
                f"expected answers from {self.judge.name}; {self._failures_in_a_row} calls in a row got none, the last "
                f"one because of: {reply.detail}; check the server and run the same command: {len(self.cache)} answers "
                "are kept"
            )

    def _check_rejections(self, reply: Reply) -> None:
        """Stop the run where the server refuses several requests in a row with the same message."""
        if reply.outcome != REJECTED:
            self._rejections_in_a_row = []
            return
        message = re.sub(r"[0-9a-f-]{12,}|\d+", "#", reply.detail)  # without the request's id
        is_same = self._rejections_in_a_row[-1:] in ([], [message])
        self._rejections_in_a_row = [*self._rejections_in_a_row, message] if is_same else [message]
        if len(self._rejections_in_a_row) >= MAX_REJECTIONS_IN_A_ROW:
            raise JudgeUnavailable(
                f"expected answers from {self.judge.name}; it refused {len(self._rejections_in_a_row)} requests in a "
                f"row with {reply.detail}; change the request with --judge-parameters, or choose another --judge or "
                f"--protocol; {len(self.cache)} answers are kept"
            )

    def _check_readable(self, is_readable: bool, record: Mapping[str, Any]) -> None:
        """Stop the run where none of the first answers has scores."""
        with self._lock:
            self._readable += is_readable
            self._unreadable += not is_readable
            if self._readable or self._unreadable < MAX_UNREADABLE_ANSWERS:
                return
        is_cut, is_server = "length" in record["detail"], self.judge.identity["kind"] == "server"
        advice = "the answers are cut off by the token limit: raise it" if is_cut else "change the request's parameters"
        advice += " with --judge-parameters" if is_server else ""
        raise JudgeUnavailable(
            f"expected scores from {self.judge.name}; got {self._unreadable} answers and can read none; the last one "
            f"({record['detail']}) begins: {record['text'][:200]!r}; "
            f"{advice}, or choose another --judge or --protocol"
        )


# ------------------------------------------------------------------------------------------------------------ threads


def score_items(
    scorer: Scorer, items: Sequence[Item], add_overall: Callable[[Row], Row], on_progress: ProgressCallback
) -> list[Row]:
    """The rows of all items, in the items' order. `judge.workers` threads ask at once. `add_overall` adds the scores
    that are computed from a row's other scores.

    Raises:
        JudgeUnavailable: see `Scorer.score_item`. Other errors and Ctrl-C pass too. Finished answers are kept.
    """
    rows: dict[int, Row] = {}
    judge, numbered = scorer.judge, list(enumerate(items))
    scored = results_as_finished(lambda job: scorer.score_item(job[1]), numbered, judge.workers, judge.stop_retrying)
    with closing(scored):
        for (number, _), row in scored:
            rows[number] = add_overall(row)
            on_progress(len(rows), len(items))
    return [rows[i] for i in range(len(items))]
