"""A real HTTP server with OpenAI's protocol that answers as a script says, and a small GEdit-Bench for it to judge."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from npedit.benchmarks import gedit


@dataclass
class Server:
    """Each request goes through `answer(number from 0, body)`: a text is an ordinary completion, a dictionary is its
    choice, and a function is called with the handler and does what it likes."""

    url: str
    answer: Callable[[int, dict[str, Any]], Any]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def completion(content: str | None, **choice: Any) -> bytes:
    """The body of an ordinary answer."""
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return json.dumps({"id": "x", "model": "tiny-1", "choices": choices, "usage": usage}).encode()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Any]) -> Iterator[Server]:
    """The server, in threads of its own."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(found.bodies)
                found.bodies.append({**body, "path": self.path})
                found.headers.append(dict(self.headers))
            said = found.answer(number, body)
            if callable(said):
                said(self)
            elif isinstance(said, dict):
                send(self, 200, completion(said.pop("content", None), **said))
            else:
                send(self, 200, completion(said))

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that went away is part of the tests."""

    server = Quiet(("127.0.0.1", 0), Handler)
    found = Server(f"http://127.0.0.1:{server.server_port}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def text_of(body: dict[str, Any]) -> str:
    (content,) = (m["content"] for m in body["messages"])
    return " ".join(part["text"] for part in content if part["type"] == "text")


def images_of(body: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a request, in order."""
    (content,) = (m["content"] for m in body["messages"])
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(u.partition("base64,")[2]))) for u in urls]


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_gedit(folder: Path, sizes: dict[str, int] | None = None, languages: tuple[str, ...] = ("en",)) -> Path:
    """A parquet file with the Hub's columns and so many items a task (one where nothing is said); every second one is
    in the Intersection."""
    rows = []
    for language in languages:
        for t, task in enumerate(gedit.TASKS):
            for k in range((sizes or {}).get(task, 1)):
                row = {"task_type": task, "key": f"{k:032x}", "instruction": f"edit {k} of {task}"}
                row |= {"instruction_language": language, "Intersection_exist": k % 2 == 0}
                image = {"bytes": encode_png(picture(1000 * t + k)), "path": None}
                rows.append({**row, "input_image": image, "input_image_raw": image})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder


def write_edited(folder: Path, found: list[Any]) -> None:
    """A picture for each item, where the official scripts look for it."""
    for i, item in enumerate(found):
        item.edited.parent.mkdir(parents=True, exist_ok=True)
        picture(50_000 + i).save(item.edited)
