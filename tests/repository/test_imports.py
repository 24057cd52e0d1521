"""The package and its help open fast: the large dependencies are imported only where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = {"torch", "diffusers", "transformers"}  # seconds each
HELP = """
import sys
from npedit.cli.main import main
sys.argv = ["npedit", "--help"]
try:
    main()
except SystemExit:
    pass
"""


def imported_by(code: str) -> set[str]:
    """Return the top-level packages that a new Python process has imported after running `code`."""
    code += "\nimport sys; print('\\nimported:', *sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.rpartition("imported: ")[2].split()}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [("import npedit", MODELS | {"numpy", "PIL", "pydantic", "typer", "rich", "matplotlib"}), (HELP, MODELS)],
    ids=["package", "help"],
)
def test_large_packages_are_imported_only_when_used(code: str, unwanted: set[str]) -> None:
    found = imported_by(code)
    assert "npedit" in found
    assert not found & unwanted


def test_the_check_finds_an_import() -> None:
    """The check above would notice: a module that needs torch imports torch."""
    assert MODELS & imported_by("import npedit.flow") == {"torch"}
