"""What the README says exists, exists: its tree, commands, options, files and links.

The README's forms, on which this test relies:

- **The tree** is one fenced block whose info string is `tree`. Its first line is `src/npedit/`. Each further line is an
  entry: an indent (of blanks, `|`, `-`, backticks or box characters; the same for all entries of one folder), its name,
  and, after two blanks or more, a description. Folders end in `/`. An entry that begins with `#` is a remark. Several
  files of one folder may share a line, divided by single blanks. It lists every Python file of the package except those
  that begin with an underscore.
- **Commands** are the lines of fenced blocks with the info string `sh`. A backslash at the end continues a line; `#`
  begins a comment. `make X` must be a target; of `npedit X --option`, command and options must exist, and so must the
  recipes that are named.
- **Links** to places in the repository are relative and exist.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "npedit"
DOCUMENTS = ("README.md", "docs/architecture.md", "docs/training.md")
MARKS = " |`-+│├└─"


def blocks(text: str, info: str) -> list[str]:
    """The contents of fenced blocks with this info string."""
    return re.findall(rf"^```{info}[ ]*\n(.*?)^```[ ]*$", text, flags=re.MULTILINE | re.DOTALL)


def tree_files(block: str) -> set[str]:
    """The Python files that a tree lists, from the repository's root."""
    lines = [line for line in block.splitlines() if line.strip(MARKS)]
    assert lines and lines[0].split()[0] == "src/npedit/", (
        f"expected a tree that begins with src/npedit/; got {lines[:1]}"
    )
    open_folders: list[tuple[int, str]] = [(-1, "src/npedit/")]
    found: set[str] = set()
    for line in lines[1:]:
        entry = line.lstrip(MARKS)
        depth = len(line) - len(entry)
        if entry.startswith("#"):
            continue
        while open_folders[-1][0] >= depth:
            open_folders.pop()
        names = re.split(r"\s{2,}", entry)[0].split()
        for name in names:
            path = open_folders[-1][1] + name
            if name.endswith("/"):
                open_folders.append((depth, path))
            else:
                assert path not in found, f"{path} stands twice in the tree"
                found.add(path)
    return found


def package_files() -> set[str]:
    """The Python files that a tree has to list."""
    return {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py") if not p.name.startswith("_")}


def command_lines(text: str) -> list[list[str]]:
    """The commands of a document, split into words."""
    found = []
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(words)
    return found


def targets() -> set[str]:
    """The Makefile's targets."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def command_line() -> Any:
    """npedit's own commands, as click sees them."""
    import typer

    from npedit.cli.main import app

    return typer.main.get_command(app)


def wrong_words(words: list[str], program: Any) -> list[str]:
    """What is wrong with one command of a document."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    said = " ".join(words)
    if words[:1] == ["make"]:
        return [f"{said}: no target {w}" for w in words[1:] if re.fullmatch(r"[a-z-]+", w) and w not in targets()]
    words = words[1:] if words and words[0].endswith("npedit") else words[3:] if words[1:3] == ["-m", "npedit"] else []
    found = [f"{said}: no file {w}" for w in words if re.fullmatch(r"recipes/[\w.-]+", w) and not (ROOT / w).exists()]
    command, rest = program, words
    while rest and getattr(command, "commands", None):
        if rest[0].startswith("-"):
            break
        if rest[0] not in command.commands:
            return [*found, f"{said}: no command {rest[0]}"]
        command, rest = command.commands[rest[0]], rest[1:]
    options = {"--help"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    stated = (w.split("=")[0] for w in rest if re.match(r"--?[a-zA-Z]", w))
    return [*found, *(f"{said}: no option {o}" for o in stated if o not in options)]


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links, of pictures too, that lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    return [x for x in links if not re.match(r"[a-z]+:|#", x) and not (folder / x.split("#")[0]).exists()]


def test_the_tree_is_the_packages() -> None:
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "tree")
    assert len(found) == 1, "expected one fenced block ```tree in README.md"
    stated = tree_files(found[0])
    assert stated - package_files() == set(), "in the README's tree, but not there"
    assert package_files() - stated == set(), "there, but not in the README's tree"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    commands = command_lines((ROOT / document).read_text(encoding="utf-8"))
    program = command_line()
    complaints = [c for words in commands for c in wrong_words(words, program)]
    assert not complaints, complaints


def test_readme_says_how_to_begin() -> None:
    commands = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["make", "demo"] in [c[:2] for c in commands]
    assert ["npedit", "edit"] in [[Path(c[0]).name, *c[1:2]] for c in commands]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_the_studys_figures_are_those_of_its_results() -> None:
    """Rows that begin with a variant's name: applied, preserved and both, with their intervals."""
    scores = json.loads((ROOT / "docs/results/results.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)`: [^|]+\|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for name, stated in rows:
        rates = [scores[name][measure] for measure in ("applied", "preserved", "both")]
        true = [f"{r['value']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]" for r in rates]
        assert [cell.strip() for cell in stated.split("|")] == true, name


def test_every_target_says_what_it_is_for() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets() >= {"demo", "test", "test-slow", "lint", "clean", "help"}
    for target in targets():
        assert re.search(rf"^{target}:.*## \w", text, flags=re.MULTILINE), f"{target} has no description"


def test_mistakes_are_found() -> None:
    """Each check, on a text that breaks it."""
    program = command_line()
    assert wrong_words(["make", "dmeo"], program) == ["make dmeo: no target dmeo"]
    assert wrong_words(["npedit", "trian", "x"], program) == ["npedit trian x: no command trian"]
    assert wrong_words(["npedit", "train", "recipes/nothing.yaml"], program) == [
        "npedit train recipes/nothing.yaml: no file recipes/nothing.yaml"
    ]
    assert wrong_words([".venv/bin/npedit", "train", "--recieps=1"], program) == [
        ".venv/bin/npedit train --recieps=1: no option --recieps"
    ]
    assert wrong_words(["make", "demo", "ARGS=--help"], program) == []
    assert broken_links("[a](nowhere.md) [b](README.md#x) [c](https://example.org)", ROOT) == ["nowhere.md"]
    tree = "src/npedit/\n|  # remark\n|-- flow.py      times\n|-- steps/\n|   |-- base.py\n|   `-- a.py b.py  two\n"
    tree += "`-- cli.py\n"
    names = ("flow.py", "steps/base.py", "steps/a.py", "steps/b.py", "cli.py")
    assert tree_files(tree) == {f"src/npedit/{n}" for n in names}
