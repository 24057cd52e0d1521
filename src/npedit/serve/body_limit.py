"""Refuses a request whose body is too large, before it is read into memory or onto the disk."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCARDED = 4  # times the limit: how much of a body is read and thrown away, so that the client reads the answer


class BodyTooLarge(Exception):
    """More bytes came than a request may have."""


class BodyLimit:
    """An ASGI middleware: status 413 for a body of more than `most` bytes, by its `Content-Length`, or once more have
    come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _declared_bytes(scope) > self.most:
            await _discard(receive, DISCARDED * self.most)
            await self._refuse(send)
            return
        count, is_refused = 0, False

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise BodyTooLarge
            return message

        async def replaced(message: Message) -> None:
            """The app's own answer, or 413 in its place, as frameworks make another error of `BodyTooLarge`."""
            nonlocal is_refused
            if count <= self.most:
                await send(message)
            elif not is_refused:
                is_refused = True
                await _discard(receive, DISCARDED * self.most)
                await self._refuse(send)

        try:
            await self.app(scope, counted, replaced)
        except BodyTooLarge:
            await replaced({"type": "http.response.start"})

    async def _refuse(self, send: Send) -> None:
        words = f"expected at most {self.most / 2**20:g} MiB in one request; got more; send a smaller picture"
        body = json.dumps({"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}})
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})


async def _discard(receive: Receive, most: int) -> None:
    """Read the rest of a body, `most` bytes of it at most, and keep nothing. A connection that is closed while the
    client still sends is reset, and the client never sees the answer."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _declared_bytes(scope: Scope) -> int:
    """The body's size that the request's head states, 0 if it states none."""
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
