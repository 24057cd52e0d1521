"""Refuses a request whose body is too large, before it is read into memory or onto the disk."""

from __future__ import annotations

import json
import shutil
import tempfile

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCARDED = 4  # times the limit: how much of a body is read and thrown away, so that the client reads the answer
LEAST_FREE = 2**30  # bytes of the disk for temporary files, or a tenth of a smaller disk's size
TOGETHER = 32  # times the limit: bytes of the bodies of all requests that are not answered yet


class BodyRefused(Exception):
    """More bytes came than this request, or all requests together, may have."""


class BodyLimit:
    """An ASGI middleware: status 413 for a body of more than `most` bytes, by its `Content-Length`, or once more have
    come; status 429 once the bodies of all requests together have more than `TOGETHER` times as many. Uploads are
    temporary files, so a body gets status 507 while that disk is almost full."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _declared_bytes(scope) > self.most:
            await self._refuse(receive, send, 413)
            return
        if scope["method"] == "POST" and _is_disk_full():
            await self._refuse(receive, send, 507)
            return
        count = status = 0
        is_refused = False

        async def counted() -> Message:
            nonlocal count, status
            message = await receive()
            size = len(message.get("body", b""))
            count, self._held = count + size, self._held + size
            status = status or self._status(count)
            if status:
                raise BodyRefused
            return message

        async def replaced(message: Message) -> None:
            """The app's own answer, or a refusal in its place: frameworks make another error of `BodyRefused`."""
            nonlocal is_refused
            if not status:
                await send(message)
            elif not is_refused:
                is_refused = True
                await self._refuse(receive, send, status)

        try:
            await self.app(scope, counted, replaced)
        except BodyRefused:
            await replaced({"type": "http.response.start"})
        finally:
            self._held -= count

    def _status(self, count: int) -> int:
        """The HTTP status for a body of which `count` bytes have come, 0 if it is not too large."""
        if count > self.most:
            return 413
        return 429 if self._held > TOGETHER * self.most else 0

    async def _refuse(self, receive: Receive, send: Send, status: int) -> None:
        await _discard(receive, DISCARDED * self.most)
        words = {
            413: f"expected at most {self.most / 2**20:g} MiB in one request; got more; send a smaller picture",
            429: "too many requests are being sent; try again later",
            507: "the server's disk is full; try again later",
        }[status]
        body = json.dumps({"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}})
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})


def _is_disk_full() -> bool:
    disk = shutil.disk_usage(tempfile.gettempdir())
    return disk.free < min(LEAST_FREE, disk.total // 10)


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
