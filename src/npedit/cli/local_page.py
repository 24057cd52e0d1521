"""A page for one person at this machine: listen on localhost until Ctrl-C."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from npedit.cli.listening import address, listen

if TYPE_CHECKING:
    from fastapi import FastAPI

PagePortOption = Annotated[
    int, typer.Option("--port", help="The page's port on this machine; 0 takes a free one.", min=0, max=65535)
]
HOST = "127.0.0.1"
out = Console(highlight=False, soft_wrap=True)


def run_page(app: FastAPI, port: int, words: str) -> None:
    """Serve a page on this machine until Ctrl-C or SIGTERM. `words` say what it is for.

    Raises:
        UserError: the port is taken.
    """
    import uvicorn

    from npedit.serve.local_page import stop_page

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list | None = None) -> None:
            stop_page(app)
            await super().shutdown(sockets)

    sock = listen(HOST, port)
    out.print(escape(f"{words} at http://{address(sock)}. Ctrl-C stops."))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn raises it again at its end
    with suppress(KeyboardInterrupt):
        Server(config).run([sock])
