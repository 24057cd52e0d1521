"""What README and docs say exists, exists: the tree, commands, options, files, links, anchors, recipe keys.

The forms on which this test relies:

- **The tree** is the one fenced block in docs/architecture.md whose info string is `tree`. Its first line is
  `src/npedit/`. Each further line is an entry: an indent (of blanks, `|`, `-`, backticks or box characters; the same
  for all entries of one folder), its name, and, after two blanks or more, a description. Folders end in `/`. An entry
  that begins with `#` is a remark. Several files of one folder may share a line, divided by single blanks. It lists
  every Python file of the package except those that begin with an underscore.
- **Commands** are the lines of fenced blocks with the info string `sh`. A backslash at the end continues a line; `#`
  begins a comment. `make X` must be a target; of `npedit X --option`, command and options must exist, and so must the
  recipes that are named.
- **Links** to places in the repository are relative and exist; an anchor is a heading of its page, written as GitHub
  does. A mention of `docs/...` in source, recipes or tests names a page that exists.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "npedit"
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", *PAGES)
NOTEBOOK = "docs/log.md"  # history: its commands are those of their day
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
    if words and words[0].endswith("npedit"):
        words = words[1:]
    else:  # python or torchrun, or any other program
        at = [i for i, pair in enumerate(zip(words, words[1:])) if pair == ("-m", "npedit")]
        words = words[at[0] + 2 :] if at else []
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


def without_code(text: str) -> str:
    """A document without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links, of pictures too, that lead nowhere, and anchors that no heading has."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8") if name else text)
        ):
            broken.append(link)
    return broken


def recipe_keys() -> set[str]:
    """Every key that a recipe may have, without its place."""
    from npedit.recipe.config import Recipe, Settings, available_names, find_class, find_module
    from npedit.recipe.config import Stage as StageSettings

    seen: set[str] = set()

    def add(model: Any) -> None:
        for name, field in model.model_fields.items():
            seen.add(name)
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(kind, type) and issubclass(kind, Settings) and kind is not Settings:
                    add(kind)

    for model in (Recipe, StageSettings):
        add(model)
    for name in available_names("steps"):
        add(find_class("steps", name).Settings)
    for name in available_names("data"):
        add(find_module("data", name).Settings)
    return seen


def test_the_tree_in_architecture_lists_the_packages_files() -> None:
    found = blocks((ROOT / "docs/architecture.md").read_text(encoding="utf-8"), "tree")
    assert len(found) == 1, "expected one fenced block ```tree in docs/architecture.md"
    stated = tree_files(found[0])
    assert stated - package_files() == set(), "in the tree of docs/architecture.md, but not there"
    assert package_files() - stated == set(), "there, but not in the tree of docs/architecture.md"


def test_architecture_names_every_folder_and_layer() -> None:
    """The folder table has each folder of the package; the layers table is the contract of pyproject.toml."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    folders = {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)) == folders
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text[text.index("## Layers") : text.index("Further rules")], re.M)
    assert [sorted(re.findall(r"\w+", row)) for row in rows] == [
        sorted(re.findall(r"\w+", layer)) for layer in contracts[0]["layers"]
    ]


def test_the_recipe_page_has_every_key() -> None:
    stated = set(re.findall(r"`(\w+)`", (ROOT / "docs/recipe.md").read_text(encoding="utf-8")))
    assert recipe_keys() - stated == set(), "keys that docs/recipe.md does not explain"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_site_shows_every_page() -> None:
    """mkdocs says so too, but only where it is installed."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = re.findall(r"^ +- .+: (\S+\.md)$", text, flags=re.MULTILINE)
    assert sorted(f"docs/{name}" for name in shown) == PAGES


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "README.md", "Makefile", "docs"])
def test_mentioned_pages_exist(folder: str) -> None:
    """Messages, docstrings and recipes send people to pages that are there."""
    place, missing = ROOT / folder, []
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.suffix not in (".py", ".yaml", ".md", "") or not path.is_file() or path == Path(__file__):
            continue
        for name in re.findall(r"(?<![\w/])docs/[\w.-]+\.md", path.read_text(encoding="utf-8")):
            if not (ROOT / name).exists() and path != ROOT / NOTEBOOK:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != NOTEBOOK])
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
def test_every_link_resolves(document: str) -> None:
    path = ROOT / document
    assert broken_links(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("document", ["README.md", "docs/shipped-editor.md"])
def test_figures_of_the_study_are_those_of_its_results(document: str) -> None:
    """Rows that begin with a variant's name: applied, preserved and both, with their intervals. A row that is not yet
    in the study with three seeds has the figures of the earlier study."""
    pages = ("docs/results/results.json", "docs/results-toy/results.json")
    earlier, newer = (json.loads((ROOT / page).read_text(encoding="utf-8")) for page in pages)
    scores = earlier | newer
    rows = re.findall(r"^\| `(\w+)`: [^|]+\|(.*)\|$", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for name, stated in rows:
        rates = [scores[name][measure] for measure in ("applied", "preserved", "both")]
        true = [f"{r['value']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]" for r in rates]
        assert [cell.strip() for cell in stated.split("|")] == true, name


def test_figures_for_the_shipped_editor_agree() -> None:
    """README repeats the first row of the table by edit type."""
    row = re.search(r"^\| \*\*all\*\* \|(.*)\|$", (ROOT / "docs/shipped-editor.md").read_text(encoding="utf-8"), re.M)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert row and [cell for cell in row[1].split("|") if cell.strip() not in text] == []


def test_every_target_says_what_it_is_for() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets() >= {"demo", "test", "test-slow", "lint", "docs", "clean", "help"}
    for target in targets():
        assert re.search(rf"^{target}:.*## \w", text, flags=re.MULTILINE), f"{target} has no description"


def test_these_checks_find_mistakes() -> None:
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
    torchrun = ["torchrun", "--standalone", "-m", "npedit", "train", "--recieps=1"]
    assert wrong_words(torchrun, program) == [f"{' '.join(torchrun)}: no option --recieps"]
    page = ROOT / "README.md"
    links = "# Two `of` us!\n[a](nowhere.md) [b](README.md#nothing) [c](https://x.org) [d](#two-of-us) [e](#x) `[f](g)`"
    assert broken_links(links, page) == ["nowhere.md", "README.md#nothing", "#x"]
    tree = "src/npedit/\n|  # remark\n|-- flow.py      times\n|-- steps/\n|   |-- base.py\n|   `-- a.py b.py  two\n"
    tree += "`-- cli.py\n"
    names = ("flow.py", "steps/base.py", "steps/a.py", "steps/b.py", "cli.py")
    assert tree_files(tree) == {f"src/npedit/{n}" for n in names}
