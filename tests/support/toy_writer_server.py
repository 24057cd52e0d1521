"""The toy's writer as a real server in a thread, and requests to it in the form of `npedit prepare`."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from npedit.toy.world import Scene, render
from npedit.toy.writer import ErrorRates
from npedit.toy.writer_server import Writer, make_server


@contextmanager
def serving_writer(
    rates: ErrorRates = ErrorRates(), seed: int = 0, structured: bool = True
) -> Iterator[tuple[str, Writer]]:
    """(address of the API, the writer)."""
    writer = Writer(rates, seed, structured)
    server = make_server(writer, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", writer
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def scene_picture(scene: Scene) -> Image.Image:
    pixels = (render([scene])[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def request_body(name: str, text: str, picture: Image.Image, kind: str = "PNG", **more: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    schema = {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "object"}}}
    return {"model": "m", "messages": [{"role": "user", "content": parts}], "response_format": schema, **more}


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    """(status, answer) of a chat completion request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", data)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]
