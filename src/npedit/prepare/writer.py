"""The models that look, write and verify: an OpenAI-compatible server, or a critic family opened in this process."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from PIL import Image

from npedit.errors import UserError
from npedit.judges.base import (
    MAX_FAILURES_IN_A_ROW,
    REJECTED,
    TRANSPORT_ERROR,
    JudgeUnavailable,
    Reply,
    RequestSettings,
)
from npedit.judges.chat_client import ChatClient, ServerNames, encode_data_url

WRITER_KEY = "NPEDIT_WRITER_KEY"
VERIFIER_KEY = "NPEDIT_VERIFIER_KEY"
WRITER = ServerNames("--writer", "--writer-model", (WRITER_KEY,), "writer")
VERIFIER = ServerNames("--verifier", "--verifier-model", (VERIFIER_KEY,), "verifier")
SCHEMA_MARKERS = ("response_format", "json_schema", "guided", "structured", "grammar")
SCHEMA_IN_WORDS = "Your answer must be one JSON object that follows this JSON schema:\n"


@dataclass(frozen=True)
class Request:
    """One question about one photo. `name` is the pass; `image` is RGB, scaled down, without EXIF data; `schema` is the
    JSON schema of the answer."""

    name: str
    system: str
    user: str
    schema: Mapping[str, Any]
    image: Image.Image
    temperature: float
    max_tokens: int
    seed: int

    def facts(self) -> dict[str, Any]:
        """Everything that the answer depends on, except the picture and the model."""
        return {
            "pass": self.name, "system": self.system, "user": self.user, "schema": self.schema,
            "temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed,
        }  # fmt: skip


class Writer(ABC):
    """A model that answers requests. `workers` is the number of requests that can be in work at once."""

    name: str
    workers: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the request; part of every cache key."""

    @property
    def address(self) -> str:
        """The server's address; "" for a model in this process."""
        return ""

    @abstractmethod
    def ask(self, request: Request) -> Reply:
        """The model's reply.

        Raises:
            JudgeUnavailable: the model cannot answer any request.
        """

    def stop_retrying(self) -> None:  # noqa: B027 (a local model has nothing to do)
        """End the retries of requests in other threads. Called when the run ends early."""


class ServerWriter(Writer):
    """A model behind a server. The schema is sent as `response_format`. If the server refuses that, this and all
    further requests state the schema in words. `jpeg_quality` 0 sends PNG. A server that leaves several requests in a
    row without an answer counts as unavailable: otherwise every photo would lose its edits while the server is down."""

    def __init__(self, client: ChatClient, workers: int = 8, jpeg_quality: int = 90, revision: str = ""):
        self.client, self.workers, self.jpeg_quality, self.revision = client, workers, jpeg_quality, revision
        self.name = client.model
        self._takes_schema = True
        self._failures_in_a_row, self._lock = 0, threading.Lock()

    def __reduce__(self) -> Any:
        return ServerWriter, (self.client, self.workers, self.jpeg_quality, self.revision)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Writer.identity`. The address is not part of it, so that a server can move."""
        found = {"kind": "server", "model": self.name, "jpeg_quality": self.jpeg_quality}
        found |= {"revision": self.revision} if self.revision else {}
        return found | ({"parameters": self.client.parameters} if self.client.parameters else {})

    @property
    def address(self) -> str:
        """See `Writer.address`."""
        return self.client.url

    def ask(self, request: Request) -> Reply:
        """See `Writer.ask`."""
        structured = self._takes_schema
        reply = self._send(request, structured)
        refused = reply.outcome == REJECTED and any(mark in reply.detail.lower() for mark in SCHEMA_MARKERS)
        if structured and refused:
            self._takes_schema = False
            reply = self._send(request, structured=False)
        self._check_failures(reply)
        return reply

    def _check_failures(self, reply: Reply) -> None:
        with self._lock:
            self._failures_in_a_row = self._failures_in_a_row + 1 if reply.outcome == TRANSPORT_ERROR else 0
            if self._failures_in_a_row < MAX_FAILURES_IN_A_ROW or self.client.is_stopping:
                return
        raise JudgeUnavailable(
            f"expected answers from {self.address}; {self._failures_in_a_row} requests in a row got none, the last one "
            f"because of: {reply.detail}; check the server and run the same command: all answers are kept"
        )

    def _send(self, request: Request, structured: bool) -> Reply:
        form = {"name": request.name, "schema": request.schema, "strict": True}
        text = request.user if structured else f"{request.user}\n{_schema_in_words(request)}"
        picture = {"type": "image_url", "image_url": {"url": encode_data_url(request.image, self.jpeg_quality)}}
        return self.client.complete(
            [
                {"role": "system", "content": request.system},
                {"role": "user", "content": [picture, {"type": "text", "text": text}]},
            ],
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
            response_format={"type": "json_schema", "json_schema": form} if structured else None,
        )

    def stop_retrying(self) -> None:
        """See `Writer.stop_retrying`."""
        self.client.stop_retrying()


class LocalWriter(Writer):
    """A critic family opened in this process. It writes greedily, so temperature and seed have no effect."""

    def __init__(self, judge: Any):
        self.judge, self.name = judge, judge.name
        self._lock = threading.Lock()

    @classmethod
    def open(cls, weights: str) -> Self:
        """A folder or a Hub id of a critic family, or "embedded".

        Raises:
            UserError: it cannot be opened.
        """
        from npedit.judges.local import LocalJudge

        return cls(LocalJudge.open(weights))

    @property
    def identity(self) -> dict[str, Any]:
        """See `Writer.identity`."""
        return self.judge.identity

    def ask(self, request: Request) -> Reply:
        """See `Writer.ask`."""
        prompt = f"{request.system.strip()}\n{request.user}\n{_schema_in_words(request)}"
        with self._lock:
            return self.judge.ask(prompt, [request.image], RequestSettings(0.0, request.max_tokens))


def _schema_in_words(request: Request) -> str:
    return SCHEMA_IN_WORDS + json.dumps(request.schema)


def open_writer(
    model: str,
    name: str,
    names: ServerNames,
    workers: int,
    jpeg_quality: int,
    parameters: Mapping[str, Any] | None = None,
    on_retry: Callable[[str], None] = lambda line: None,
) -> Writer:
    """The writer at an address (`name` is the model's name there), or a local model.

    Raises:
        UserError: it cannot be opened, or options do not fit it.
    """
    if model.startswith(("http://", "https://")):
        client = ChatClient(model, name, names, parameters=parameters, on_retry=on_retry)
        return ServerWriter(client, workers, jpeg_quality)
    if name or parameters:
        raise UserError(
            f"expected {names.model} and parameters with a server's address only; got the local model {model!r}; leave "
            "them out, or give an address such as http://localhost:8000/v1"
        )
    return LocalWriter.open(model)
