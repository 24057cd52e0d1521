"""The HTTP server's process: it serves an app until a signal comes, and then ends what runs."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from npedit.serve.connections import TimedConnection

DRAIN_SECONDS = 120


class HttpServer(uvicorn.Server):
    """Uvicorn's server. At its end it closes the connections that pages of Gradio (`app.state.page`) hold, and then
    waits at most `drain_seconds` for the requests that run."""

    def __init__(self, app: FastAPI, drain_seconds: int = DRAIN_SECONDS) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=TimedConnection, ws="none", log_level="warning", server_header=False,
                timeout_graceful_shutdown=drain_seconds,
            )
        )  # fmt: skip
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; the edits that wait are finished first."""
        if page := getattr(self._app.state, "page", None):
            page.stop_event.set()
        await super().shutdown(sockets)
