"""The Dockerfile, checked without Docker: its sources, its extras, its user, and that its build context suffices."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of each instruction of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def words_of(name: str) -> list[str]:
    """The words of every instruction of this name."""
    return [words for instruction, words in instructions() if instruction == name]


def copied() -> list[str]:
    """What COPY takes from the build context."""
    return [source for words in words_of("COPY") for source in words.split()[:-1]]


def is_ignored(name: str) -> bool:
    """Whether .dockerignore leaves this file or folder out; the last line that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and fnmatch.fnmatch(name, pattern):
            ignored = not line.startswith("!")
    return ignored


def test_only_known_instructions_in_the_right_order() -> None:
    found = [instruction for instruction, _ in instructions()]
    assert set(found) <= {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "ARG", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert found[0] == "FROM" and found.count("FROM") == 1
    assert re.fullmatch(r"python:3\.1[1-3]-slim-\w+", words_of("FROM")[0])  # an official image, with its tag
    assert words_of("ENTRYPOINT") == ['["npedit"]']
    assert max(i for i, name in enumerate(found) if name == "RUN") < found.index("USER")
    assert words_of("USER") == ["npedit"] and "useradd --uid 1000" in words_of("RUN")[0]


def test_every_source_exists_and_is_in_the_build_context() -> None:
    assert {"constraints.txt", "pyproject.toml", "src"} <= set(copied())
    for name in copied():
        assert (ROOT / name).exists() and not is_ignored(name), name
    for name in (".venv", ".git", "runs", "tests", "__pycache__"):
        assert is_ignored(name), name


def test_the_cache_of_downloads_is_in_the_volume() -> None:
    (volume,) = words_of("VOLUME")
    assert f"HF_HOME={volume}/" in words_of("ENV")[0] and f"--mode=1777 {volume}" in words_of("RUN")[0]


def test_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (default,) = [words.removeprefix("EXTRAS=") for words in words_of("ARG") if words.startswith("EXTRAS=")]
    assert set(default.split(",")) <= set(project["optional-dependencies"])


def test_npedit_can_be_built_from_what_is_copied(tmp_path: Path) -> None:
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(list((tmp_path / "dist").glob("npedit-*.whl"))) == 1
