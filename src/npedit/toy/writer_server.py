"""The toy's writer behind HTTP, with OpenAI's chat completions API (`npedit toy writer`).

A request has one picture as a data URL, and names its pass in `response_format` (`json_schema.name`: look, write,
verify or caption). Without `response_format`, as for a server that has no structured output, the pass is recognised by
the keys that the text asks for. The answer is one chat completion whose content is JSON.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, UnidentifiedImageError

from npedit.errors import UserError
from npedit.toy.edits import EDIT_TYPES
from npedit.toy.world import Scene
from npedit.toy.writer import ErrorRates, caption, look, read_photo, verify, write

MODEL = "toy-writer"
PASS_KEYS = {  # the first key in the text decides
    "verify": "object_present", "write": "proposals", "caption": "target_caption", "look": "objects",
}  # fmt: skip
MAX_BODY_BYTES = 8_000_000
LINE = re.compile(r"(?m)^\s*(?:[-*]\s*|\d+[.)]\s*)?([a-z]+):")


class BadRequest(Exception):
    """A request that cannot be answered; the message is sent back with status 400."""


class Writer:
    """Answers request bodies. `counts` says how many requests of each pass were answered, and how many were broken."""

    def __init__(self, rates: ErrorRates, seed: int = 0, structured: bool = True):
        self.rates = rates
        self.seed = seed
        self.structured = structured
        self.counts: Counter[str] = Counter()
        self._scenes: dict[str, Scene] = {}  # by the hash of the pixels
        self._lock = threading.Lock()

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The chat completion for a request.

        Raises:
            BadRequest: no picture, or not a toy picture; no known pass; or a format that is not offered.
        """
        if body.get("response_format") and not self.structured:
            raise BadRequest("response_format is not supported by this server")
        text, pictures = _read_messages(body.get("messages"))
        if len(pictures) != 1:
            raise BadRequest(f"expected one picture; got {len(pictures)}")
        name, schema = _find_pass(body, text)
        scene = self._read_scene(pictures[0])
        content = self._content(name, schema, scene, text, self._generator(name, text, pictures[0], body))
        return _completion(content, text, str(body.get("model") or MODEL))

    def _read_scene(self, picture: Image.Image) -> Scene:
        """The scene in a picture; that of a picture that was read before is known."""
        key = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
        with self._lock:
            if key not in self._scenes:
                try:
                    self._scenes[key] = read_photo(picture)
                except ValueError as error:
                    raise BadRequest(str(error)) from None
            return self._scenes[key]

    def _generator(self, name: str, text: str, picture: Image.Image, body: Mapping[str, Any]) -> random.Random:
        """The random generator of a request: a function of the seed and of the request."""
        digest = hashlib.sha256(picture.convert("RGB").tobytes() + text.encode())
        return random.Random(f"{self.seed}/{name}/{body.get('seed')}/{digest.hexdigest()}")

    def _content(self, name: str, schema: Mapping[str, Any], scene: Scene, text: str, rng: random.Random) -> str:
        found: dict[str, Any]
        if name == "look":
            found = look(scene, rng)
        elif name == "write":
            seen = re.search(r'"caption": "([^"]*)"', text)  # in the answer of the first pass
            found = write(scene, _wanted_types(schema, text), rng, self.rates, seen[1] if seen else "")
        elif name == "caption":
            found = caption(scene, _read_proposal(text), rng, self.rates)
        else:
            found = verify(scene, _read_proposal(text), rng, self.rates)
        content = json.dumps(found)
        is_broken = name == "write" and rng.random() < self.rates.broken
        with self._lock:
            self.counts[name] += 1
            self.counts["broken"] += is_broken
        return content[: len(content) // 2] if is_broken else content


def _completion(content: str, text: str, model: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 64 + len(text.split()), "completion_tokens": len(content.split())}
    message = {"role": "assistant", "content": content}
    return {
        "id": "toy",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


# --------------------------------------------------------------------------------------------------------- requests


def _read_messages(messages: Any) -> tuple[str, list[Image.Image]]:
    """The text of all messages, and the pictures."""
    texts, pictures = [], []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            elif part.get("type") == "image_url":
                pictures.append(_decode_data_url(str(part["image_url"]["url"])))
    return "\n".join(texts), pictures


def _decode_data_url(url: str) -> Image.Image:
    if not url.startswith("data:image/") or "base64," not in url:
        raise BadRequest("expected a picture as a data URL (data:image/...;base64,...)")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
        picture.load()
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
        raise BadRequest(f"expected a picture that can be decoded; got: {error}") from None
    return picture


def _find_pass(body: Mapping[str, Any], text: str) -> tuple[str, Mapping[str, Any]]:
    """The name of the pass and its JSON schema ({} if the request has none)."""
    form = body.get("response_format") or {}
    asked = form.get("json_schema") or {}
    name = str(asked.get("name", ""))
    if not form:
        name = next((n for n, key in PASS_KEYS.items() if key in text), "")
    if name not in PASS_KEYS:
        raise BadRequest(f"expected json_schema.name among look, write, verify, caption; got {name!r}")
    return name, asked.get("schema") or {}


def _wanted_types(schema: Mapping[str, Any], text: str) -> list[str]:
    """The toy's edit types that a `write` request asks for: one for each line "TYPE: ..." of its text, in their order;
    else those that its schema allows; else those that are words of its text."""
    if lines := [kind for kind in LINE.findall(text) if kind in EDIT_TYPES]:
        return lines
    allowed = re.search(r'"edit_type":\s*\{[^{}]*"enum":\s*\[([^\]]*)\]', json.dumps(schema))
    words = re.findall(r"[a-z]+", allowed[1] if allowed else text)
    return list(dict.fromkeys(word for word in words if word in EDIT_TYPES))


def _read_proposal(text: str) -> dict[str, Any]:
    """The proposal in the text of a `verify` request: a JSON object with an instruction, or lines "type: ...",
    "instruction: ...", "object: ...", "caption of the photo after the edit: ..." and the questions, one a line."""
    decoder, found = json.JSONDecoder(), None
    for start in [match.start() for match in re.finditer(r"\{", text)]:
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if isinstance(value, dict) and "instruction" in value and "properties" not in value:
            found = value
    return found or _read_proposal_lines(text)


def _read_proposal_lines(text: str) -> dict[str, Any]:
    names = {
        "type": "edit_type",
        "instruction": "instruction",
        "object": "object",
        "caption of this photo": "source_caption",
        "caption of the photo after the edit": "target_caption",
    }
    found: dict[str, Any] = {"questions": []}
    for line in map(str.strip, text.splitlines()):
        name, colon, value = line.partition(":")
        key = names.get(name.lower()) if colon else None
        if key and key not in found:
            found[key] = value.strip()
        elif line.endswith("?"):
            found["questions"].append({"question": re.sub(r"^[-*\d.)\s]+", "", line)})
    if "instruction" not in found:
        raise BadRequest("expected a proposal in the text: a JSON object, or a line 'instruction: ...'; got none")
    return found


# ------------------------------------------------------------------------------------------------------------- HTTP


def _send_json(handler: BaseHTTPRequestHandler, status: int, value: Mapping[str, Any]) -> None:
    body = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _send_error(handler: BaseHTTPRequestHandler, status: int, message: str) -> None:
    _send_json(handler, status, {"error": {"message": message, "type": "invalid_request_error"}})


def _handler(writer: Writer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Print nothing for a request."""

        def do_GET(self) -> None:
            if self.path.rstrip("/").endswith("/models"):
                _send_json(self, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            else:
                _send_error(self, 404, f"no such path: {self.path}")

        def do_POST(self) -> None:
            stated = self.headers.get("Content-Length") or "0"
            length = int(stated) if stated.isdecimal() else MAX_BODY_BYTES + 1
            if length > MAX_BODY_BYTES:
                self.close_connection = True
                _send_error(self, 413, f"expected a Content-Length of at most {MAX_BODY_BYTES}; got {stated}")
                return
            raw = self.rfile.read(length)
            if not self.path.rstrip("/").endswith("/chat/completions"):
                _send_error(self, 404, f"no such path: {self.path}")
                return
            try:
                body = json.loads(raw)
                if not isinstance(body, dict):
                    raise BadRequest("expected a JSON object")
                _send_json(self, 200, writer.answer(body))
            except (BadRequest, ValueError, KeyError, TypeError, AttributeError) as error:
                _send_error(self, 400, f"{error}" if isinstance(error, BadRequest) else f"bad request: {error!r}")

    return Handler


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error."""


def make_server(writer: Writer, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server that is bound to `port` (0: a free one) and not yet running: call `serve_forever`.

    Raises:
        UserError: the port cannot be used.
    """
    try:
        return _QuietServer((host, port), _handler(writer))
    except (OSError, OverflowError) as error:
        raise UserError(f"expected a free port on {host}; got {port} ({error}); choose another --port") from None
