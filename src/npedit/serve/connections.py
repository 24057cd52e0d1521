"""Connections that do little for a long time are closed, as each holds memory, a file descriptor and perhaps a
temporary file. A client that sends or reads at `LEAST_BYTES_PER_SECOND` or faster may take as long as it needs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512  # further ones are closed at once
MOST_SECONDS = 60.0  # for a request's head, for its body, and for the client to read what was sent
LEAST_BYTES_PER_SECOND = 2**15  # of a body and of an answer; each second at this rate adds a second to the limit
SECONDS_BETWEEN_LOOKS = 2.0


class TimedConnection(H11Protocol):
    """A connection of uvicorn with time limits. There is none while the server works on a request."""

    most_connections, most_seconds, seconds_between_looks = MOST_CONNECTIONS, MOST_SECONDS, SECONDS_BETWEEN_LOOKS
    least_bytes_per_second = LEAST_BYTES_PER_SECOND
    _look_task: asyncio.TimerHandle | None = None
    _waits_for: tuple[str, Any] = ("", None)
    _since = 0.0
    _moved = 0  # bytes of the body that came since then, or of the answer that went
    _unsent = 0  # bytes of the answer at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._look()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._waits_for[0] == "body":  # a client that does not read gains no time by what it sends
            self._moved += len(data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if self._look_task:
            self._look_task.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if it has waited for the client too long; else look again later."""
        now, waits_for = time.monotonic(), self._find_wait()
        unsent = self.transport.get_write_buffer_size()
        self._moved += max(0, self._unsent - unsent)
        self._unsent = unsent
        if waits_for != self._waits_for:
            self._waits_for, self._since, self._moved = waits_for, now, 0
        in_time = self._moved / self.least_bytes_per_second if waits_for[0] in ("read", "body") else 0.0
        if waits_for[0] and now - self._since > self.most_seconds + in_time:
            self.transport.abort()
        else:
            self._look_task = self.loop.call_later(self.seconds_between_looks, self._look)

    def _find_wait(self) -> tuple[str, Any]:
        """What the client has to do next, and in which request; ("", None) if the server has to do something."""
        if self.transport.get_write_buffer_size():
            return "read", self.cycle
        if self.conn.their_state is h11.IDLE:
            return "head", self.cycle
        if self.conn.their_state is h11.SEND_BODY:
            return "body", self.cycle
        return "", None
