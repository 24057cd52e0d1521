"""A page for one person at this machine: listen on localhost until Ctrl-C."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.listening import address, listen

if TYPE_CHECKING:
    from fastapi import FastAPI

PagePortOption = Annotated[
    int, typer.Option("--port", help="The page's port on this machine; 0 takes a free one.", min=0, max=65535)
]
HOST = "127.0.0.1"
DRAIN_SECONDS = 5  # for the requests that run when the page is stopped


def run_page(app: FastAPI, port: int, words: str, host: str = HOST) -> None:
    """Serve a page until Ctrl-C or SIGTERM. `words` say what it is for.

    Raises:
        UserError: the address cannot be had.
    """
    from npedit.serve.http_server import HttpServer

    sock = listen(host, port)
    out.print(escape(f"{words} at http://{address(sock)}. Ctrl-C stops."))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn raises it again at its end
    with suppress(KeyboardInterrupt):
        HttpServer(app, DRAIN_SECONDS).run([sock])
