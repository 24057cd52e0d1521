"""What holds for every test: one thread, no network, and the shapes that npedit states checked at every call."""

from __future__ import annotations

import ipaddress
import os
import socket
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from unittest.mock import patch

# Before torch and the Hub's client are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the nets are tiny; more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "huggingface")
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables are as wide in every process
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from jaxtyping import _import_hook, install_import_hook
from shapecheck import ShapedOnly


def _get_code(self: _import_hook._JaxtypingLoader, name: str) -> CodeType | None:
    """A module's code with the shape checks, read from or written to a cache file of its own."""
    named = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", named):
        return SourceFileLoader.get_code(self, name)


# jaxtyping renames cache files while a module of npedit *runs*, so torch and transformers, which that module imports,
# are compiled from source again: more than ten seconds in each process. Here the new name is for npedit's code alone.
_import_hook._JaxtypingLoader.get_code = _get_code
_import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module

# Must come before anything imports npedit. It checks "b c h w" across a call's arguments and result.
_import_hook.JaxtypingTransformer = ShapedOnly
install_import_hook("npedit", "shapecheck.check_shapes")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _is_here(address: object) -> bool:
    """A Unix socket, or an address of the loopback range."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this machine fails the test that makes it."""
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: object, real=real):
            if not _is_here(address):
                raise RuntimeError(
                    f"expected a test without network; got a connection to {address!r}; use a file the test makes"
                )
            return real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
