"""The public interface: its names, that they are imported late, and that the script in docs/api.md works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import npedit

ROOT = Path(__file__).parents[1]


def test_every_public_name_opens() -> None:
    for name in npedit.__all__:
        assert getattr(npedit, name) is not None
    assert set(npedit._MODULES) | {"__version__"} == set(npedit.__all__)
    assert dir(npedit) == sorted(npedit.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'edit_everything'"):
        npedit.edit_everything  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (ROOT / "src" / "npedit" / "py.typed").is_file()


def test_the_script_in_the_api_page_trains_and_edits(tmp_path: Path) -> None:
    """The page's own text is run, in a process of its own."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    script = re.search(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[1]
    assert len(script.strip().splitlines()) <= 16
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edited.png").stat().st_size > 0 and (tmp_path / "runs/mine/report.html").is_file()
    assert re.search(r"0\.\d+|1\.0+", done.stdout), done.stdout


def test_every_public_name_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [n for n in npedit.__all__ if f"`{n}" not in page] == []
