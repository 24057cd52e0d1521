"""CITATION.cff, CHANGELOG.md, SECURITY.md and the commit hooks agree with the project that they describe."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_names_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (str(cited["version"]), cited["license"]) == (project()["version"], project()["license"])
    assert cited["authors"] == [{"name": "npedit contributors"}]
    (paper,) = cited["references"]
    assert "arXiv:2510.14978" in [identifier["value"] for identifier in paper["identifiers"]]


def test_the_changelog_has_the_keep_a_changelog_form() -> None:
    """Sections for versions, the unreleased one first; within each only the six kinds of change, each with entries."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    assert sections and all(section.splitlines()[0] in kinds and "\n- " in section for section in sections)


def test_commit_hooks_are_local_and_run_what_make_lint_runs() -> None:
    """Hooks need no network, and a commit that passes them passes these lines of `make lint`."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lint
    for hook in hooks:
        command = re.match(r"\.venv/bin/(ruff \w+|[\w-]+)", hook["entry"])
        assert command and f"$(BIN)/{command[1]}" in lint[1], hook["entry"]


def test_project_files_are_in_the_source_archive() -> None:
    """Whoever gets the source archive gets the licence's companions too."""
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert {"CHANGELOG.md", "CITATION.cff"} <= set(included["targets"]["sdist"]["only-include"])
