"""`npedit serve --watch RUNS`: a status page of the trainings in a folder."""

from __future__ import annotations

from pathlib import Path

import typer

from npedit.cli.listening import is_local, require_page_packages
from npedit.cli.local_page import run_page
from npedit.errors import UserError

WATCH_OPTIONS = {"run", "watch", "host", "port", "token_file"}  # of `npedit serve`, that go with --watch


def require_watch_options(context: typer.Context) -> None:
    """Refuse options that only an editor has.

    Raises:
        UserError: names them.
    """
    others = [parameter for parameter in context.command.params if parameter.name not in WATCH_OPTIONS]
    if names := [parameter.opts[0] for parameter in others if _is_on_command_line(context, parameter.name or "")]:
        raise UserError(
            f"--watch: expected no options of an editor, because none is opened; got {', '.join(names)}; leave them out"
        )


def _is_on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def run_watch(folder: Path, host: str, port: int, token: str) -> None:
    """Serve the status page until Ctrl-C.

    Raises:
        UserError: there is no such folder, a package is missing, or the address is taken.
    """
    if not folder.is_dir():
        raise UserError(f"--watch: expected a folder of runs; got {folder}, which is none; npedit serve --watch runs/")
    require_page_packages()
    from npedit.serve.access import LOCAL_HOSTS
    from npedit.serve.watch_app import make_watch_app

    hosts = (*LOCAL_HOSTS, host) if is_local(host) else ()
    run_page(make_watch_app(folder, token, hosts), port, f"Watching {folder}", host)
