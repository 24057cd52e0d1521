"""The HTTP server's process: it serves an app until a signal comes, and then ends what runs."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from npedit.serve.connections import TimedConnection
from npedit.serve.page import stop_page

DRAIN_SECONDS = 120


class HttpServer(uvicorn.Server):
    """Uvicorn's server, which at its end closes the connections that open pages hold."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=TimedConnection, ws="none", log_level="warning", server_header=False,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )  # fmt: skip
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; the edits that wait are finished first."""
        stop_page(self._app)
        await super().shutdown(sockets)
