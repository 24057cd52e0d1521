"""An HTTP client of servers with OpenAI's chat completions API: vLLM, SGLang, `transformers serve`, a paid service.

Judges (`judges/server.py`) and the writers of `npedit prepare` use this client. It needs the standard library only. The
API key comes from an environment variable. The key is sent to the given server only (redirects are not followed) and is
never written: where a server repeats the key in an answer, the key is replaced.

The server's behaviour decides the outcome of a question:

- 429, 408, 5xx, a time-out, a lost connection, a body that is not JSON or has no choice: retried with exponential
  backoff (Retry-After is respected; each wait is reported), then transport_error;
- a content filter, in the status or as the finish reason, or a filled `refusal`: refused;
- 400, 413, 422 for another reason: rejected;
- 401, 403, 404, a redirect, no credit left, a page of HTML (a login page), a host without a name or certificate: the
  run stops at once. Where nothing listens at the port, the run stops after `CONNECTION_REFUSED_ATTEMPTS` attempts. All
  finished answers are kept.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import logging
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from npedit.errors import UserError
from npedit.judges.base import OK, REFUSED, REJECTED, TRANSPORT_ERROR, JudgeUnavailable, Reply

log = logging.getLogger(__name__)

CONTENT_FILTER_MARKERS = (
    "content_filter",
    "content_policy",
    "content policy",
    "content management policy",
    "safety system",
)
NO_CREDIT_MARKERS = ("insufficient_quota", "billing_hard_limit", "insufficient_balance")
MAX_RESPONSE_BYTES = 8_000_000  # of one answer
MAX_WAIT_SECONDS = 300.0  # between two attempts, even if the server asks for more
CONNECTION_REFUSED_ATTEMPTS = 3  # attempts at a port where nothing listens
CONNECTION_REFUSED_WAIT = 1.0  # seconds between them
RESERVED_PARAMETERS = ("model", "messages", "stream", "n")  # of a request; a user cannot set them


class _NoRedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: the key must not be sent to another server."""


class _RetryableError(Exception):
    """A failed attempt that can be repeated, after `wait` seconds if the server said so."""

    def __init__(self, detail: str, wait: float = 0.0):
        super().__init__(detail)
        self.wait = wait


class _ConnectionRefused(Exception):
    """Nothing listens at the port."""


@dataclass(frozen=True)
class ServerNames:
    """How messages call the server's settings: the options of its address and model, its key's environment variables
    (the first one that is set counts), and what the server serves as."""

    url: str
    model: str
    keys: tuple[str, ...]
    role: str

    def read_key(self) -> str:
        """The key from the environment, or "".

        Raises:
            UserError: the key has a character that an HTTP header cannot hold. The message does not show the key.
        """
        variable = next((name for name in self.keys if os.environ.get(name)), self.keys[0])
        key = os.environ.get(variable, "")
        wrong = [i for i, c in enumerate(key, 1) if not "!" <= c <= "~"]
        if wrong:
            raise UserError(
                f"expected a key of plain ASCII characters in {variable}, without spaces and line breaks; got "
                f"another character at position {wrong[0]} of {len(key)} (a line break at the end, or curly quotes, "
                "from copying); set it again"
            )
        return key


class ChatClient:
    """`url` is the API's root, such as http://localhost:8000/v1. `timeout` is for one attempt, in seconds.
    `parameters` are added to each request and replace what the caller sets; a value of None removes a parameter.
    `on_retry` is called with a line for people before each wait.

    Raises:
        UserError: the URL or the key is not valid, the model is missing, or a reserved parameter is set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        names: ServerNames,
        timeout: float = 180.0,
        max_attempts: int = 6,
        initial_backoff: float = 2.0,
        parameters: Mapping[str, Any] | None = None,
        on_retry: Callable[[str], None] = lambda line: None,
    ):
        validate_url(url, names)
        names.read_key()
        reserved = [name for name in RESERVED_PARAMETERS if name in (parameters or {})]
        if reserved:
            raise UserError(
                f"expected parameters of decoding; got {', '.join(reserved)}, which npedit sets; leave them out"
            )
        if not model:
            raise UserError(f"expected the model's name as the server knows it; got none; give {names.model}")
        self.url, self.model, self.names = url.rstrip("/"), model, names
        self.timeout, self.max_attempts, self.initial_backoff = timeout, max_attempts, initial_backoff
        self.parameters, self.on_retry = dict(parameters or {}), on_retry
        self._stopping = threading.Event()
        self._open_url = urllib.request.build_opener(_NoRedirectHandler).open

    def __reduce__(self) -> Any:
        """In another process, the same client reports its retries to the log."""
        limits = (self.timeout, self.max_attempts, self.initial_backoff)
        return ChatClient, (self.url, self.model, self.names, *limits, self.parameters, log.warning)

    def complete(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        """The reply to a chat; see the module's head for outcomes. An option of None is not sent.

        Raises:
            JudgeUnavailable: the server cannot answer any request.
        """
        options = {k: v for k, v in {**options, **self.parameters}.items() if v is not None}
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        detail = ""
        attempt = 0
        for attempt in range(self.max_attempts):
            try:
                return self._send_request(body)
            except _ConnectionRefused as refused:
                detail, wait = str(refused), min(self.initial_backoff, CONNECTION_REFUSED_WAIT)
                if attempt + 1 >= CONNECTION_REFUSED_ATTEMPTS:
                    raise JudgeUnavailable(
                        f"expected a server at {self.url}; got: {detail}; start it or correct {self.names.url}, "
                        "and run the same command"
                    ) from None
            except _RetryableError as failed:
                detail = str(failed)
                backoff = self.initial_backoff * 2**attempt * random.uniform(0.5, 1.5)
                wait = min(max(backoff, failed.wait), MAX_WAIT_SECONDS)
            if attempt + 1 < self.max_attempts and self._wait_before_retry(wait, detail, attempt):
                break
        return Reply(TRANSPORT_ERROR, detail=f"{detail} ({attempt + 1} attempts)")

    def _wait_before_retry(self, seconds: float, detail: str, attempt: int) -> bool:
        """Report the retry and wait. True if the run is being stopped."""
        if not self._stopping.is_set():
            self.on_retry(
                f"{self.model} at {self.url}: {detail[:200]}; attempt {attempt + 2} of {self.max_attempts} in "
                f"{seconds:.0f} s"
            )
        return self._stopping.wait(seconds)

    @property
    def is_stopping(self) -> bool:
        """Whether the run is being stopped, so that requests may end without an answer."""
        return self._stopping.is_set()

    def stop_retrying(self) -> None:
        """End the retries of requests in other threads. Called when the run ends early."""
        self._stopping.set()

    def _send_request(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.names.read_key():
            headers["Authorization"] = f"Bearer {self.names.read_key()}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._open_url(request, timeout=self.timeout) as response:
                return self._parse_response(_read_body(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                try:
                    text = self._redact_key(_read_body(error, deadline)).decode(errors="replace")
                except (OSError, http.client.HTTPException):
                    text = ""
            return self._handle_http_error(error.code, text, error.headers)
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs, resets, cut bodies
            raise self._classify_connection_error(error) from None

    def _parse_response(self, body: bytes) -> Reply:
        """The reply in a response. A page of HTML stops the run: a login page would answer all requests."""
        if body.lstrip()[:1] == b"<":
            raise JudgeUnavailable(
                f"expected {self.url}/chat/completions to answer with JSON; got a page that begins "
                f"{' '.join(body[:200].decode(errors='replace').split())!r}; check the address in "
                f"{self.names.url}, a proxy and a login before it, and {self.names.keys[0]}"
            )
        return _parse_completion(self._redact_key(body))

    def _redact_key(self, body: bytes) -> bytes:
        """A server's answer without the API key, which some servers repeat in error messages."""
        key = self.names.read_key().encode()
        return body.replace(key, b"[the key]") if len(key) >= 6 else body

    def _classify_connection_error(self, error: Exception) -> Exception:
        """The exception for a request that got no answer."""
        reason = getattr(error, "reason", error)
        detail = f"{type(reason).__name__}: {reason}"
        if isinstance(reason, ConnectionRefusedError):
            return _ConnectionRefused(detail)
        if isinstance(reason, ssl.SSLCertVerificationError | http.client.InvalidURL) or (
            isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
        ):
            return JudgeUnavailable(f"expected a server at {self.url}; got: {detail}; correct {self.names.url}")
        return _RetryableError(detail)

    def _handle_http_error(self, code: int, text: str, headers: Mapping[str, str] | Message) -> Reply:
        lowered, detail = text.lower(), f"HTTP {code}: {' '.join(text.split())[:300]}"
        if any(mark in lowered for mark in NO_CREDIT_MARKERS) or code == 402:
            raise JudgeUnavailable(
                f"expected credit left at {self.url}; got {detail}; add some and run the same command"
            )
        if code in (400, 403, 422) and any(mark in lowered for mark in CONTENT_FILTER_MARKERS):
            return Reply(REFUSED, detail=detail)
        if code in (408, 409, 425, 429) or code >= 500:
            raise _RetryableError(detail, _parse_retry_after(headers.get("Retry-After", "")))
        if code in (400, 413, 422):
            return Reply(REJECTED, detail=detail)
        raise JudgeUnavailable(
            f"expected {self.url}/chat/completions to answer; got {detail}; check {self.names.url}, {self.names.model} "
            f"and {self.names.keys[0]}, and run the same command"
        )


def validate_url(url: str, names: ServerNames) -> None:
    """Check the address of an API.

    Raises:
        UserError: the address is not valid, or it holds a key.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid, parts = False, None
    if not valid or parts is None or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise UserError(
            f"expected a {names.role}'s address such as http://localhost:8000/v1, without spaces; got {url!r}; "
            "correct it"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(f"expected an address without a key in it; put the key in {names.keys[0]}")


def _read_body(response: Any, deadline: float) -> bytes:
    """The complete body. `deadline` is a time of the monotonic clock: each single wait has a limit, but many add up."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer takes too long")
        if size > MAX_RESPONSE_BYTES:
            raise OSError(f"the answer is longer than {MAX_RESPONSE_BYTES} bytes")
    if getattr(response, "length", None):  # read1 reports no error for an incomplete body
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _parse_completion(body: bytes) -> Reply:
    """The reply in the body of a response with status 200.

    Raises:
        _RetryableError: the body is not JSON, is an error, or has no choice.
    """
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        reason = choice.get("finish_reason")
        usage = {k: v for k, v in (found.get("usage") or {}).items() if isinstance(v, int)}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _RetryableError(f"no chat completion: {body[:300].decode(errors='replace')}") from None
    model = str(found.get("model", ""))
    if refusal or reason == "content_filter":
        return Reply(REFUSED, str(refusal or content or ""), usage, f"finish_reason {reason}", model)
    if isinstance(content, list):  # some servers send a list of parts
        content = "".join(p.get("text", "") for p in content if isinstance(p, dict))
    return Reply(OK, content if isinstance(content, str) else "", usage, f"finish_reason {reason}", model)


def _parse_retry_after(value: str) -> float:
    """Seconds to wait, from the Retry-After header (a number or a date); 0 without one."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def encode_data_url(image: Image.Image, jpeg_quality: int) -> str:
    """An RGB picture as a data URL: PNG for quality 0, else JPEG."""
    kind, options = ("jpeg", {"quality": jpeg_quality}) if jpeg_quality else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
