"""`--json`: one JSON object on standard output, all other text on standard error. docs/scripting.md has the keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; other text goes to standard error.")
]


@contextmanager
def text_on_stderr(as_json: bool) -> Iterator[None]:
    """With `as_json`, everything that is printed in this block goes to standard error."""
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


def print_json(values: Mapping[str, Any]) -> None:
    """Print an object as JSON on standard output. NaN and infinity, which JSON does not have, are a ValueError."""
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=_plain_value))


def _plain_value(value: Any) -> Any:
    """A path as text, a number of numpy or torch as a number."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"expected something that JSON can hold; got {value!r}")
