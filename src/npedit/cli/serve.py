"""`npedit serve`: an editor behind an HTTP interface and a page."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from npedit.cli.listening import address, is_local, listen, require_page_packages
from npedit.cli.options import BaseOption, BitsOption, OffloadOption, TileOption
from npedit.cli.watch import require_watch_options, run_watch
from npedit.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from npedit.editor import Editor
    from npedit.serve.limits import Limits
    from npedit.serve.runs import Runs

TOKEN_VARIABLE = "NPEDIT_SERVE_TOKEN"
LEAST_TOKEN = 16  # characters


def read_token(host: str, file: Path | None) -> str:
    """The token that clients must send, from a file or the environment; "" for none.

    Raises:
        UserError: the file cannot be read, the token is short, or other machines reach the server and there is none.
    """
    try:
        token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--token-file: expected a text file; got {file}: {error}; write the token into a file"
        ) from None
    if token and len(token) < LEAST_TOKEN:
        raise UserError(f"expected a token of at least {LEAST_TOKEN} characters; got {len(token)}; make a longer one")
    if not token and not is_local(host):
        raise UserError(
            f"--host {host}: expected a token, because other machines can reach this server; got none. "
            f"Set the environment variable {TOKEN_VARIABLE}, or give --token-file."
        )
    return token


def serve(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(help="RUN, RUN/final, RUN/checkpoint-N, a folder of runs, or 'embedded'.")
    ] = "embedded",
    watch: Annotated[
        bool, typer.Option("--watch", help="A status page of the trainings in the folder RUN; no editor is opened.")
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen on. Others than localhost need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 7860,
    token_file: Annotated[
        Path | None, typer.Option(help=f"A file with the token that clients must send. Else {TOKEN_VARIABLE}.")
    ] = None,
    waiting: Annotated[int, typer.Option(help="How many edits may wait.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="How long an edit may wait before it begins.", min=0.1)] = 120.0,
    most_mib: Annotated[float, typer.Option("--max-mib", help="Largest request, in MiB.", min=0.01)] = 32.0,
    most_megapixels: Annotated[
        float, typer.Option("--max-megapixels", help="Largest picture, in megapixels.", min=0.01, max=100)
    ] = 50.0,
    most_gib: Annotated[
        float, typer.Option("--max-memory-gib", help="Memory of all requests' pictures together, in GiB.", min=0.01)
    ] = 4.0,
    most_editors: Annotated[
        int, typer.Option("--max-editors", help="With a folder of runs: editors in memory.", min=2)
    ] = 2,
    critic: Annotated[
        bool, typer.Option("--critic", help="Load the critic of the run's recipe, so that the page can ask it.")
    ] = False,
    base: BaseOption = "",
    offload: OffloadOption = False,
    bits: BitsOption = 0,
    tile: TileOption = None,
) -> None:
    """Put an editor behind a page and an HTTP interface. Ctrl-C or SIGTERM finishes the waiting edits."""
    token = read_token(host, token_file)
    if watch:
        require_watch_options(context)
        run_watch(Path(run), host, port, token)
        return
    from npedit.editor import Editor

    limits = make_limits(most_mib, most_megapixels, most_gib)

    def open_editor(name: str) -> Editor:
        return Editor.open(name, tile=tile, base=base, offload=offload, bits=bits)

    options = ServerOptions(token, host, port, limits, waiting, seconds, critic, most_editors)
    run_server(run, open_editor, options, Console(soft_wrap=True))


def make_limits(mib: float, megapixels: float, memory_gib: float) -> Limits:
    """The limits of requests.

    Raises:
        UserError: the memory is less than one picture may need.
    """
    from npedit.serve.limits import Limits
    from npedit.serve.memory import PictureMemory, memory_needed

    pixels, memory = int(megapixels * 1e6), int(memory_gib * 2**30)
    if memory < memory_needed(pixels):
        raise UserError(
            f"expected --max-memory-gib of at least {memory_needed(pixels) / 2**30:.2f}, which one picture of "
            f"{megapixels:g} megapixels needs; got {memory_gib:g}. Or give a smaller --max-megapixels."
        )
    return Limits(bytes=int(mib * 2**20), pixels=pixels, memory=PictureMemory(memory))


def public_names(run: str) -> tuple[str, str]:
    """The names of an editor as a model of the interface, and in the metadata of its results; without its place on this
    computer."""
    from npedit.provenance import editor_name
    from npedit.runs.resolve import resolve_editor

    name = editor_name(run, resolve_editor(run))
    return (run if run == "embedded" else name), name


@dataclass(frozen=True)
class ServerOptions:
    """The options of the server: the token, the address to listen on, the limits of requests, how many edits may wait
    and for how many seconds, whether the critic is loaded, and how many editors of a folder of runs are in memory."""

    token: str
    host: str
    port: int
    limits: Limits
    waiting: int
    seconds: float
    with_critic: bool
    most_editors: int


def open_app(name: str, open_editor: Callable[[str], Editor], runs: Runs | None, options: ServerOptions) -> FastAPI:
    """The HTTP interface of the editor `name`, which is open when this returns. With `runs`, `name` is one of them.

    Raises:
        UserError: the editor cannot be opened.
    """
    from npedit.serve.access import LOCAL_HOSTS
    from npedit.serve.api import ServerSettings, make_app
    from npedit.serve.queue import EditQueue

    open_first = (lambda: runs.open(Path(name).name)) if runs else (lambda: open_editor(name))
    queue = EditQueue(open_first, options.waiting, options.seconds, open_run=runs.open if runs else None)
    queue.editor.result()
    hosts = (*LOCAL_HOSTS, options.host) if is_local(options.host) else ()
    shown_name, editor = public_names(name)
    return make_app(queue, ServerSettings(shown_name, options.token, hosts, options.limits, editor), runs)


def run_server(name: str, open_editor: Callable[[str], Editor], options: ServerOptions, out: Console) -> None:
    """Open the editor, then listen until a signal comes.

    Raises:
        UserError: a package is missing, the editor cannot be opened, or the address is taken.
    """
    require_page_packages()
    from npedit.serve.http_server import HttpServer
    from npedit.serve.page import add_page
    from npedit.serve.runs import Runs, find_runs
    from npedit.serve.verdict import find_critic, find_recipe

    first = next(iter(find_runs(name)), "")
    runs = Runs(name, open_editor, options.with_critic, options.most_editors) if first else None
    own = str(Path(name, first)) if first else name
    recipe = find_recipe(own)
    critic = find_critic(own, recipe, options.with_critic)
    app = open_app(own, open_editor, runs, options)
    add_page(app, critic, recipe is not None and recipe.family.weights == "embedded", runs)
    sock = listen(options.host, options.port)
    where = f"http://{address(sock)} (interface: /openapi.json)"
    out.print(escape(f"Serving {name} at {where}. Ctrl-C stops."), highlight=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn raises it again at its end
    try:
        HttpServer(app).run([sock])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        out.print("Stopped. The edits that waited are done.")
