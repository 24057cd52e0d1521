"""Refuses requests that make Gradio fetch a file from another server.

Gradio takes a URL in place of an uploaded file, and downloads it: in the JSON body of an event, and in the path of
`/gradio_api/file=URL`. It refuses URLs of private networks. It has no setting that refuses all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

URL = re.compile(r"\s*https?://", re.IGNORECASE)
URL_PATH = re.compile(r"/gradio_api/file[=/]\s*https?:/", re.IGNORECASE)
REFUSAL = {"detail": "expected a file that was uploaded to this page; got the address of another server"}


def refuse_remote_files(app: FastAPI) -> Any:
    """Put `RefuseRemoteFiles` before the Gradio app that was mounted last, and return that Gradio app."""
    mount = next(route for route in reversed(app.routes) if isinstance(route, Mount))
    page = mount.app
    mount.app = RefuseRemoteFiles(page)
    return page


class RefuseRemoteFiles:
    """An ASGI middleware of a Gradio app: status 400 for a request that names a URL as a file. Nothing is fetched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and URL_PATH.search(scope["path"]):
            await JSONResponse(REFUSAL, 400)(scope, receive, send)
        elif scope["type"] == "http" and _may_have_json(scope):
            messages = await _read_body(receive)
            if has_remote_file(b"".join(message.get("body", b"") for message in messages)):
                await JSONResponse(REFUSAL, 400)(scope, receive, send)
            else:
                await self.app(scope, _replay(messages, receive), send)
        else:
            await self.app(scope, receive, send)


def _may_have_json(scope: Scope) -> bool:
    """Whether the body may be read as JSON; a form (an upload) is not."""
    content_type = Headers(scope=scope).get("content-type", "")
    return scope["method"] not in ("GET", "HEAD") and not content_type.lower().startswith("multipart/form-data")


async def _read_body(receive: Receive) -> list[Message]:
    """The messages of a body, all of them unless the client goes away."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives these messages first."""
    left = iter(messages)

    async def replay() -> Message:
        return next(left, None) or await receive()

    return replay


def has_remote_file(body: bytes) -> bool:
    """Whether a JSON body holds a file of Gradio whose path is a URL, at any depth. JSON that is nested too deeply to
    be read counts as one; a body that is no JSON does not."""
    try:
        return any(_is_remote_file(value) for value in _dicts(json.loads(body)))
    except RecursionError:
        return True
    except ValueError:
        return False


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """All dicts inside a JSON value, itself included."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _is_remote_file(value: dict[str, Any]) -> bool:
    path = value.get("path")
    return isinstance(path, str) and URL.match(path) is not None
