"""Where commands print: results on standard output, all else on standard error. Lines are not wrapped."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from npedit.errors import npedit_command

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def train_command(folder: Path) -> str:
    """The command that trains on a set, without its held-out rows."""
    held_out, path = folder / "held_out.txt", shlex.quote(str(folder))
    held = f" data.held_out={shlex.quote(str(held_out))}" if held_out.is_file() and held_out.stat().st_size else ""
    return f"{npedit_command()} train RECIPE data.path={path}{held}"
