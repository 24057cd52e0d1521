"""Asking a model once: kept answers are not asked for again, unreadable ones are asked for a second time, and the cost
of all answers stays below the ceiling."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from npedit.errors import UserError
from npedit.judges.base import OK
from npedit.judges.cache import answer_cache_key
from npedit.prepare.answers import UnreadableAnswer
from npedit.prepare.writer import Request, Writer

T = TypeVar("T")
ATTEMPTS = 2  # for an answer that cannot be read
IMAGE_TOKENS = 3000  # assumed for one picture before the first answer is known
PROMPT_TOKENS, ANSWER_TOKENS = "prompt_tokens", "completion_tokens"  # names in a server's `usage`
AGAIN = (
    "\nYour last answer could not be read: {reason}. Answer again, with one JSON object alone, which follows this JSON "
    "schema: {schema}"
)


class Unanswered(Exception):
    """A request without a usable answer; the message is the reason."""


class CostCeiling(Exception):
    """The next request could make the cost higher than `--max-cost`."""


class Answers(Protocol):
    """The kept answers: `judges.cache.AnswerCache`, or a stand-in for one in another process."""

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The answer or refusal with this key."""

    def put(self, record: Mapping[str, Any]) -> None:
        """Keep one record. It is on the disk when the call returns."""


class Meter:
    """Tokens and cost of all answers. Prices are for a million tokens; `max_cost` 0 is no ceiling.

    Before a request is sent, the most that it may cost is set aside: the prompt tokens of the longest prompt so far (or
    an assumption), and `max_tokens` for the answer. So the cost stays below the ceiling while many requests run.
    """

    def __init__(self, price_in: float = 0.0, price_out: float = 0.0, max_cost: float = 0.0):
        self.price_in, self.price_out, self.max_cost = price_in, price_out, max_cost
        self.usage: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()  # by pass, sent in this run
        self._reserved, self._longest = 0.0, 0
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Fetch the counts if another process holds them."""

    @property
    def cost(self) -> float:
        """The cost of all answers so far, those of earlier runs included."""
        return self.cost_of(self.usage)

    def cost_of(self, usage: Mapping[str, int]) -> float:
        """The cost of these tokens."""
        parts = self.price_in * usage.get(PROMPT_TOKENS, 0) + self.price_out * usage.get(ANSWER_TOKENS, 0)
        return parts / 1_000_000

    def add(self, usage: Mapping[str, int]) -> None:
        """Count the tokens of one answer."""
        with self._lock:
            self.usage.update(usage)
            self._longest = max(self._longest, usage.get(PROMPT_TOKENS, 0))

    @contextmanager
    def reserve(self, request: Request) -> Iterator[None]:
        """Set aside what a request may cost, for the time of the block.

        Raises:
            CostCeiling: the ceiling could be passed.
        """
        assumed = IMAGE_TOKENS + (len(request.system) + len(request.user)) // 2
        most = self.set_aside(request.name, assumed, request.max_tokens)
        try:
            yield
        finally:
            self.release(most)

    def set_aside(self, name: str, prompt_tokens: int, answer_tokens: int) -> float:
        """Set aside the most that a request of the pass `name` may cost; returns the amount, which `release` frees.

        Raises:
            CostCeiling: the ceiling could be passed.
        """
        with self._lock:
            prompt = max(self._longest, prompt_tokens)
            most = self.cost_of({PROMPT_TOKENS: prompt, ANSWER_TOKENS: answer_tokens})
            if self.max_cost and self.cost_of(self.usage) + self._reserved + most > self.max_cost:
                raise CostCeiling
            self._reserved += most
            self.requests[name] += 1
        return most

    def release(self, amount: float) -> None:
        """Free an amount that was set aside."""
        with self._lock:
            self._reserved -= amount


@dataclass
class Asker:
    """Asks one model. `on_answer(request, record, kept)` is called after each answer; `kept` is true if the answer came
    from the file."""

    writer: Writer
    cache: Answers
    meter: Meter
    on_answer: Callable[[Request, Mapping[str, Any], bool], None] = lambda request, record, kept: None

    def ask(self, request: Request, parse: Callable[[str], T]) -> T:
        """What `parse` makes of the answer. An answer that cannot be read is asked for once more, with the reason.

        Raises:
            Unanswered: refused, rejected, no answer, or unreadable twice.
            CostCeiling, JudgeUnavailable: no further request is possible.
        """
        reason = ""  # a server that ignores `response_format` sees the schema in the second attempt
        for attempt in range(ATTEMPTS):
            again = AGAIN.format(reason=reason, schema=json.dumps(request.schema)) if attempt else ""
            record = self._answer(replace(request, user=request.user + again, seed=request.seed + attempt))
            if record["outcome"] != OK:
                raise Unanswered(f"{record['outcome']}: {record.get('detail') or record.get('text', '')}"[:300])
            try:
                return parse(record["text"])
            except UnreadableAnswer as error:
                reason = str(error)
        raise Unanswered(f"unreadable: {reason}")

    def _answer(self, request: Request) -> Mapping[str, Any]:
        """The record of a kept answer, or of a new one, which is kept."""
        key = answer_cache_key([request.image], model=self.writer.identity, **request.facts())
        record = self.cache.get(key)
        if record is not None:
            self.on_answer(request, record, True)
            return record
        with self.meter.reserve(request):
            reply = self.writer.ask(request)
            self.meter.add(reply.usage)
        if self.meter.max_cost and self.writer.address and reply.outcome == OK and PROMPT_TOKENS not in reply.usage:
            raise UserError(
                f"--max-cost: expected token counts ('usage') in the answers of {self.writer.address}; got none, so "
                "that the cost is unknown; leave --max-cost out"
            )
        record = {
            "key": key, "pass": request.name, "outcome": reply.outcome, "text": reply.text, "usage": dict(reply.usage),
            "detail": reply.detail, "model": reply.served_by or self.writer.name,
            "address": reply.address or self.writer.address,
        }  # fmt: skip
        self.cache.put(record)
        self.on_answer(request, record, False)
        return record
