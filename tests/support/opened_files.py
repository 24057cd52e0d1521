"""The files that Python opens while a test runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_watching: list[list[str]] = []  # the lists that grow now


def _note(event: str, args: tuple) -> None:
    if event == "open":
        for paths in _watching:
            paths.append(str(args[0]))


sys.addaudithook(_note)  # it sees every open, by whatever library, and cannot be removed again


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Inside, this list grows by the path of every file that is opened."""
    paths: list[str] = []
    _watching.append(paths)
    try:
        yield paths
    finally:
        _watching.remove(paths)
