"""The wheel and the source archive, built without a network: what they hold, and that npedit runs from the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "npedit"
LARGEST_MB = 25  # docs/install.md states the size
KINDS = {".py", ".typed", ".yaml", ".json", ".jinja", ".safetensors", ".md"}  # .md: the shipped editor's model card
PARTS = ("base", "critic", "editor")


def build(kind: str, source: Path, folder: Path) -> Path:
    """The archive that hatchling makes of the project in `source`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = folder.iterdir()
    return archive


def names(wheel: Path) -> set[str]:
    """The files in a wheel."""
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def metadata(unpacked: Path) -> str:
    (folder,) = unpacked.glob("npedit-*.dist-info")
    return (folder / "METADATA").read_text(encoding="utf-8")


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    expected = {p.relative_to(ROOT / "src").as_posix() for p in files}
    inside = {name for name in names(wheel) if ".dist-info/" not in name}
    assert inside == expected
    assert {Path(name).suffix for name in inside} == KINDS
    assert wheel.stat().st_size < LARGEST_MB * 1e6


def test_the_wheel_names_licence_command_and_extras(unpacked: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (folder,) = unpacked.glob("npedit-*.dist-info")
    assert (folder / "licenses" / "LICENSE").is_file()
    assert "npedit = npedit.cli.main:main" in (folder / "entry_points.txt").read_text(encoding="utf-8")
    text = metadata(unpacked)
    assert set(re.findall(r"^Provides-Extra: (.+)$", text, re.M)) == set(project["optional-dependencies"])
    always = [line for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M) if "extra ==" not in line]
    assert len(always) == len(project["dependencies"])


def test_npedit_runs_from_the_unpacked_wheel(unpacked: Path, tmp_path: Path) -> None:
    """The package data are found beside the code: three embedded models, and every packaged recipe."""
    code = f"""
import sys; sys.path.insert(0, {str(unpacked)!r})
import npedit
from npedit.recipe import config, packaged
assert npedit.__file__.startswith({str(unpacked)!r}), npedit.__file__
for part in {PARTS!r}:
    assert config.embedded_weights(part).is_relative_to({str(unpacked)!r})
for name in {sorted(p.stem for p in (PACKAGE / "recipes").glob("*.yaml"))!r}:
    assert packaged.recipe_path(name).is_relative_to({str(unpacked)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_source_archive_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """And it has what its tests and documents need: every file of the repository's folders."""
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("npedit-*")
    assert names(build("wheel", source, tmp_path / "wheel")) == names(wheel)
    for folder in ("tests", "benchmarks", "docs"):
        assert {p.name for p in (ROOT / folder).rglob("*.py")} == {p.name for p in (source / folder).rglob("*.py")}


def test_every_extra_is_in_the_table_of_the_install_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = page[page.index("## Extras") : page.index("##", page.index("## Extras") + 2)]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == set(project["optional-dependencies"])
