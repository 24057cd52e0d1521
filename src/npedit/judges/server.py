"""A judge behind HTTP that speaks OpenAI's chat completions: vLLM, SGLang, `transformers serve`, a paid service.

Plain standard library. One user message: pictures as data URLs and the text, in the protocol's order; no system
message. The key comes from the environment variable NPEDIT_JUDGE_KEY, goes to the given server alone (redirects are not
followed) and is written nowhere: where a server repeats it in an answer, it is replaced.

What the server does decides the outcome, never a number:

- 429, 408, 5xx, a time-out, a cut connection, a body that is no JSON or holds no choice: asked again after a growing
  wait (Retry-After is honoured; each wait is reported), then transport_error;
- a content filter, in the status or as the finish reason, or a filled `refusal`: refused;
- 400, 413, 422 for another reason: rejected;
- 401, 403, 404, a redirect, no credit left, a page of HTML (a login page), a host without a name or certificate: the
  run stops at once, and where nothing listens at the port after `REFUSED_TRIES` attempts; all answers are kept.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from npedit.errors import UserError
from npedit.judges.base import OK, REFUSED, REJECTED, TRANSPORT_ERROR, Judge, JudgeStopped, Manner, Reply

KEY_VARIABLE = "NPEDIT_JUDGE_KEY"
FILTER_MARKS = ("content_filter", "content_policy", "content policy", "content management policy", "safety system")
NO_CREDIT_MARKS = ("insufficient_quota", "billing_hard_limit", "insufficient_balance")
MOST_BYTES = 8_000_000  # of one answer
LONGEST_WAIT = 300.0  # seconds between two attempts, whatever the server asks for
REFUSED_TRIES = 3  # attempts at a port where nothing listens
REFUSED_WAIT = 1.0  # seconds between them
FIXED_PARAMETERS = ("model", "messages", "stream", "n")  # of a request, that a user may not set


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the key must not go elsewhere."""


class _Failed(Exception):
    """An attempt that may be made again, after `wait` seconds if the server said so."""

    def __init__(self, detail: str, wait: float = 0.0):
        super().__init__(detail)
        self.wait = wait


class _NotListening(Exception):
    """Nothing listens at the port."""


class ServerJudge(Judge):
    """`url` is the API's root, such as http://localhost:8000/v1; `timeout` is for one attempt, in seconds. `parameters`
    go into each request, in place of the protocol's; a value of None leaves a parameter out. `report` is called with a
    line for people before each wait.

    Raises:
        UserError: a URL that is none, no model, a key that no header can hold, or parameters that are not the user's.
    """

    def __init__(
        self,
        url: str,
        model: str,
        revision: str = "",
        workers: int = 4,
        timeout: float = 180.0,
        attempts: int = 6,
        first_wait: float = 2.0,
        parameters: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        check_address(url)
        read_key()
        fixed = [name for name in FIXED_PARAMETERS if name in (parameters or {})]
        if fixed:
            raise UserError(
                f"expected parameters of decoding; got {', '.join(fixed)}, which npedit sets; leave them out"
            )
        if not model:
            raise UserError("expected the model's name as the server knows it; got none; give --judge-model")
        self.url, self.name, self.revision = url.rstrip("/"), model, revision
        self.workers, self.timeout, self.attempts, self.first_wait = workers, timeout, attempts, first_wait
        self.parameters, self.report = dict(parameters or {}), report
        self._stopping = threading.Event()
        self._open = urllib.request.build_opener(_NoRedirect).open

    @property
    def identity(self) -> dict[str, Any]:
        """See `Judge.identity`. The address is no part of it, so that a server may move; each answer records it."""
        found = {"kind": "server", "model": self.name, "revision": self.revision}
        return found | ({"parameters": self.parameters} if self.parameters else {})

    @property
    def address(self) -> str:
        """See `Judge.address`."""
        return self.url

    def accepts(self, manner: Manner) -> None:
        """See `Judge.accepts`."""
        if manner.options:
            raise UserError(
                "expected a local judge: a score from logits needs the probabilities of all answers, which servers do "
                "not give; give a folder or Hub id as --judge, or choose another --protocol"
            )

    def ask(self, prompt: str, images: Sequence[Image.Image], manner: Manner) -> Reply:
        """See `Judge.ask`, and the module's head for outcomes."""
        body = json.dumps(self._request(prompt, images, manner)).encode()
        detail = ""
        attempt = 0
        for attempt in range(self.attempts):
            try:
                return self._once(body)
            except _NotListening as refused:
                detail, wait = str(refused), min(self.first_wait, REFUSED_WAIT)
                if attempt + 1 >= REFUSED_TRIES:
                    raise JudgeStopped(
                        f"expected a server at {self.url}; got: {detail}; start it or correct --judge, and run the "
                        "same command"
                    ) from None
            except _Failed as failed:
                detail = str(failed)
                grown = self.first_wait * 2**attempt * random.uniform(0.5, 1.5)
                wait = min(max(grown, failed.wait), LONGEST_WAIT)
            if attempt + 1 < self.attempts and self._wait(wait, detail, attempt):
                break
        return Reply(TRANSPORT_ERROR, detail=f"{detail} ({attempt + 1} attempts)")

    def _wait(self, seconds: float, detail: str, attempt: int) -> bool:
        """Report and wait; True if the run is being stopped."""
        if not self._stopping.is_set():
            self.report(f"{self.name}: {detail[:200]}; attempt {attempt + 2} of {self.attempts} in {seconds:.0f} s")
        return self._stopping.wait(seconds)

    def stop(self) -> None:
        """See `Judge.stop`."""
        self._stopping.set()

    def _request(self, prompt: str, images: Sequence[Image.Image], manner: Manner) -> dict[str, Any]:
        pictures = [{"type": "image_url", "image_url": {"url": data_url(im, manner.jpeg_quality)}} for im in images]
        text = [{"type": "text", "text": prompt}]
        content = text + pictures if manner.text_first else pictures + text
        stated = {"max_tokens": manner.max_tokens, "temperature": manner.temperature}
        decoding = {k: v for k, v in {**stated, **self.parameters}.items() if v is not None}
        return {"model": self.name, "messages": [{"role": "user", "content": content}], **decoding}

    def _once(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if read_key():
            headers["Authorization"] = f"Bearer {read_key()}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        end = time.monotonic() + self.timeout
        try:
            with self._open(request, timeout=self.timeout) as response:
                return self._completion(_read(response, end))
        except urllib.error.HTTPError as error:
            with error:
                try:
                    text = without_key(_read(error, end)).decode(errors="replace")
                except (OSError, http.client.HTTPException):
                    text = ""
            return self._status(error.code, text, error.headers)
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs, resets, cut bodies
            raise self._unanswered(error) from None

    def _completion(self, body: bytes) -> Reply:
        """See `_reply`. A page of HTML is a login page or another service's: all requests would get it."""
        if body.lstrip()[:1] == b"<":
            raise JudgeStopped(
                f"expected {self.url}/chat/completions to answer with JSON; got a page that begins "
                f"{' '.join(body[:200].decode(errors='replace').split())!r}; check the address in --judge, a proxy and "
                f"a login before it, and {KEY_VARIABLE}"
            )
        return _reply(without_key(body))

    def _unanswered(self, error: Exception) -> Exception:
        """What to raise for a request that got no answer."""
        reason = getattr(error, "reason", error)
        detail = f"{type(reason).__name__}: {reason}"
        if isinstance(reason, ConnectionRefusedError):
            return _NotListening(detail)
        if isinstance(reason, ssl.SSLCertVerificationError | http.client.InvalidURL) or (
            isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
        ):
            return JudgeStopped(f"expected a server at {self.url}; got: {detail}; correct --judge")
        return _Failed(detail)

    def _status(self, code: int, text: str, headers: Mapping[str, str] | Message) -> Reply:
        said, detail = text.lower(), f"HTTP {code}: {' '.join(text.split())[:300]}"
        if any(mark in said for mark in NO_CREDIT_MARKS) or code == 402:
            raise JudgeStopped(f"expected credit left at {self.url}; got {detail}; add some and run the same command")
        if code in (400, 403, 422) and any(mark in said for mark in FILTER_MARKS):
            return Reply(REFUSED, detail=detail)
        if code in (408, 409, 425, 429) or code >= 500:
            raise _Failed(detail, _retry_after(headers.get("Retry-After", "")))
        if code in (400, 413, 422):
            return Reply(REJECTED, detail=detail)
        raise JudgeStopped(
            f"expected {self.url}/chat/completions to answer; got {detail}; check --judge, --judge-model and "
            f"{KEY_VARIABLE}, and run the same command"
        )


def check_address(url: str) -> None:
    """Refuse what is no address of an API.

    Raises:
        UserError: it is none, or holds a key.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid, parts = False, None
    if not valid or parts is None or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise UserError(
            f"expected a judge's address such as http://localhost:8000/v1, without spaces; got {url!r}; correct it"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(f"expected an address without a key in it; put the key in {KEY_VARIABLE}")


def read_key() -> str:
    """The key from the environment, or "".

    Raises:
        UserError: it holds what no header can. The message does not show it.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    wrong = [i for i, c in enumerate(key, 1) if not "!" <= c <= "~"]
    if wrong:
        raise UserError(
            f"expected a key of plain ASCII characters in {KEY_VARIABLE}, without spaces and line breaks; got another "
            f"character at position {wrong[0]} of {len(key)} (a line break at the end, or curly quotes, from copying); "
            "set it again"
        )
    return key


def without_key(body: bytes) -> bytes:
    """What a server sent, without the key, which some repeat in their errors."""
    key = read_key().encode()
    return body.replace(key, b"[the key]") if len(key) >= 6 else body


def _read(response: Any, end: float) -> bytes:
    """The body, whole, before `end` of the monotonic clock: each single wait has a limit already, but many add up."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > end:
            raise TimeoutError("the answer takes too long")
        if size > MOST_BYTES:
            raise OSError(f"the answer is longer than {MOST_BYTES} bytes")
    if getattr(response, "length", None):  # read1 does not complain of a body that was cut
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _reply(body: bytes) -> Reply:
    """What the JSON of a 200 says.

    Raises:
        _Failed: it is no JSON, an error, or holds no choice.
    """
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        reason = choice.get("finish_reason")
        usage = {k: v for k, v in (found.get("usage") or {}).items() if isinstance(v, int)}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Failed(f"no chat completion: {body[:300].decode(errors='replace')}") from None
    model = str(found.get("model", ""))
    if refusal or reason == "content_filter":
        return Reply(REFUSED, str(refusal or content or ""), usage, f"finish_reason {reason}", model)
    if isinstance(content, list):  # some servers give parts
        content = "".join(p.get("text", "") for p in content if isinstance(p, dict))
    return Reply(OK, content if isinstance(content, str) else "", usage, f"finish_reason {reason}", model)


def _retry_after(value: str) -> float:
    """Seconds that the header asks to wait, given as a number or a date; 0 if it says nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def data_url(image: Image.Image, jpeg_quality: int) -> str:
    """An RGB picture as a data URL: PNG for quality 0, else JPEG."""
    kind, options = ("jpeg", {"quality": jpeg_quality}) if jpeg_quality else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
