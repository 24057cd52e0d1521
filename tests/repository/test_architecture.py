"""The rules that keep the package small, held by machine: layers, siblings, lengths, settings, banned words.

Each rule is a function from what it looks at to a list of complaints. The last tests break each rule on purpose.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "npedit"
FLAT = ("families", "critics", "steps", "benchmarks")  # folders of adapters, where none may import another

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# Longer ones, each with its reason. A line that is no longer needed fails too.
LONG = {
    "tests/judges/test_server.py": "one server, many ways to fail; split it when it grows again",
    "src/npedit/toy_models/fit.py::fit": "one training loop, read from top to bottom",
    "src/npedit/toy_models/critic.py::loss": "the loss inside it",
    "tests/steps/test_np_edit.py": "one step, many proofs; split it when it grows again",
    "src/npedit/toy_models/critic.py::train_critic": "one loss with its helping heads, read from top to bottom",
}

# Outside packages stay in their place: here, and nowhere else in the package.
PLACES = {
    "diffusers": ("families", "export", "toy", "toy_models", "runs"),
    "transformers": ("families", "critics", "scoring", "benchmarks", "toy", "toy_models"),
    "peft": ("nets", "export"),
    "datasets": ("data",),
    "matplotlib": ("report",),
    "ray": ("prepare",),
    "typer": ("cli",),
    "torchvision": (),  # beside a CPU-only torch it does not import
    "accelerate": (),  # sharding is the learner's own
}

# Without the tildes, which are here so that this file does not contain the words.
BANNED = {
    "a path of one machine": r"/wo~rk/\w|/opt/(?:whe~els|py~pi)|/ro~ot/|/ho~me/\w+/",
    "a helper's folder": r"(?<!torch)\.libr~ary\b|(?<![\w.])shared/do~cs",
    "an import of torchvision": r"(?m)^\s*(?:import|from)\s+torch~vision\b",
    "a registry's host": r"py~pi\.org|python~hosted\.org|download\.py~torch\.org|npm~js\.org|deb\.deb~ian\.org",
}


def project_files() -> list[Path]:
    """What git tracks or would track; without git, every file but hidden and built ones."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        paths = [ROOT / line for line in listed.splitlines()]
    else:
        paths = []
        for folder, names, files in os.walk(ROOT):
            names[:] = [
                n for n in names if n == ".ci" or (n[0] != "." and n not in ("runs", "build", "dist", "__pycache__"))
            ]
            paths += [Path(folder) / f for f in files]
    return sorted(p for p in paths if p.is_file())


def sources(folder: Path = PACKAGE) -> Iterator[tuple[str, ast.Module]]:
    """(path from the root, parsed file) of each Python file."""
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Every module that a file imports, wherever the import stands; `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected absolute imports; got a relative one"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def meddling_siblings(path: str, tree: ast.Module) -> list[str]:
    """Imports of a sibling adapter. `base` and files that begin with an underscore are shared by all, and
    `np_edit_bootstrap` may extend `np_edit`: its name says so."""
    parts = Path(path).relative_to("src/npedit").parts
    if parts[0] not in FLAT:
        return []
    own = {f"npedit.{parts[0]}.{parts[-1].removesuffix('.py')}", f"npedit.{parts[0]}"}
    siblings = {p.stem for p in (PACKAGE / parts[0]).glob("*.py")} - {"base"}
    siblings = {s for s in siblings if not s.startswith("_") and not parts[-1].startswith(f"{s}_")}
    siblings = {f"npedit.{parts[0]}.{s}" for s in siblings} - own
    return [f"{path} imports {name}" for name in sorted(imported(tree) & siblings)]


def misplaced(path: str, tree: ast.Module) -> list[str]:
    """Outside packages that are imported where they do not belong."""
    place = Path(path).relative_to("src/npedit").parts[0].removesuffix(".py")
    tops = {name.split(".")[0] for name in imported(tree)}
    return [f"{path} imports {top}" for top in sorted(tops & PLACES.keys()) if place not in PLACES[top]]


def too_long(path: str, text: str) -> list[str]:
    """Files and functions over the limits, as `path` or `path::function`."""
    lines = len(text.splitlines())
    found = [path] if lines > LONGEST_FILE else []
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
        ):
            found.append(f"{path}::{node.name}")
    return found


def settings_fields(tree: ast.Module) -> dict[str, list[str]]:
    """Class -> fields, for every class of settings: its parent's name ends in Settings or is one of this file."""
    fields: dict[str, list[str]] = {}
    known = {"BaseModel"}
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        parents = {ast.unparse(b).split(".")[-1] for b in node.bases}
        if not any(p in known or p.endswith("Settings") for p in parents) and not _imported_settings(tree, parents):
            continue
        known.add(node.name)
        fields[node.name] = [
            s.target.id
            for s in node.body
            if isinstance(s, ast.AnnAssign)
            and isinstance(s.target, ast.Name)
            and "ClassVar" not in ast.unparse(s.annotation)
        ]
    return fields


def _imported_settings(tree: ast.Module, parents: set[str]) -> bool:
    """Is one of the parents config's Settings under another name?"""
    return any(
        alias.asname in parents and alias.name.endswith("Settings")
        for node in tree.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    )  # fmt: skip


def read_names(tree: ast.AST) -> set[str]:
    """Every attribute that is read, save by validators: a check of a value is no use of it."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and any("validator" in ast.unparse(d) for d in node.decorator_list):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        found |= read_names(node)
    return found


def unread(path: str, tree: ast.Module, elsewhere: set[str]) -> list[str]:
    """Fields of settings that nobody reads. They are to be read in the same file; those of recipe/config.py and
    study/file.py, which describe the recipe and the study for all, and those that several data sources share, anywhere
    (`elsewhere`)."""
    shared = ("/recipe/config.py", "/study/file.py", "/data/_settings.py")
    read = read_names(tree) | (elsewhere if path.endswith(shared) else set())
    return [
        f"{path}: {cls}.{field}"
        for cls, fields in settings_fields(tree).items()
        for field in fields
        if field not in read
    ]


def banned(path: str, text: str) -> list[str]:
    """What must not stand in the project."""
    return [
        f"{path}: {what}: {m.group().strip()}"
        for what, pattern in BANNED.items()
        for m in re.finditer(pattern.replace("~", ""), text)
    ]


def test_imports_keep_to_the_layers() -> None:
    """import-linter's contracts, in pyproject.toml. In a process of its own: it switches other loggers off."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 2 kept, 0 broken" in done.stdout


def test_a_file_imports_no_sibling_but_base() -> None:
    complaints = [c for path, tree in sources() for c in meddling_siblings(path, tree)]
    assert not complaints, complaints


def test_outside_packages_are_imported_only_in_their_folders() -> None:
    complaints = [c for path, tree in sources() for c in misplaced(path, tree)]
    assert not complaints, complaints


def test_files_and_functions_are_short() -> None:
    texts = {
        p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
        for d in (PACKAGE, ROOT / "tests")
        for p in d.rglob("*.py")
    }
    found = {c for path, text in texts.items() for c in too_long(path, text)}
    assert found - LONG.keys() == set(), "shorten them, or give a reason in LONG"
    assert LONG.keys() - found == set(), "no longer needed in LONG"


def test_every_setting_is_read() -> None:
    trees = dict(sources())
    elsewhere = set().union(*(read_names(tree) for tree in trees.values()))
    complaints = [c for path, tree in trees.items() for c in unread(path, tree, elsewhere)]
    assert not complaints, complaints


def test_no_banned_words() -> None:
    complaints = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        complaints += banned(path.relative_to(ROOT).as_posix(), text)
    assert not complaints, complaints


def test_shipped_recipes_load() -> None:
    from npedit.recipe.config import load_recipe

    recipes = sorted((PACKAGE / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        if not path.stem.startswith("study-"):  # tests/study/test_study.py loads those
            assert load_recipe(path).name


# Each rule, broken on purpose: a rule that accepts these would accept anything.


def test_a_sibling_import_is_found() -> None:
    name = next(
        p.stem for p in (PACKAGE / "families").glob("*.py") if p.stem not in ("base", "__init__") and p.stem[0] != "_"
    )
    bad = ast.parse(f"from npedit.families.base import Family\nfrom npedit.families import {name}\n")
    assert meddling_siblings("src/npedit/families/another.py", bad) == [
        f"src/npedit/families/another.py imports npedit.families.{name}"
    ]


def test_a_misplaced_package_is_found() -> None:
    assert misplaced("src/npedit/training/trainer.py", ast.parse("def f():\n    import torchvision.ops")) == [
        "src/npedit/training/trainer.py imports torchvision"
    ]
    assert misplaced("src/npedit/families/x.py", ast.parse("from diffusers import FluxPipeline")) == []


def test_a_long_function_is_found() -> None:
    text = "def f():\n" + "    pass\n" * LONGEST_FUNCTION
    assert too_long("a.py", text) == ["a.py::f"]
    assert too_long("a.py", text.replace("    pass\n", "", 1)) == []
    assert too_long("a.py", "x = 1\n" * (LONGEST_FILE + 1)) == ["a.py"]


@pytest.mark.parametrize("parent", ["Settings", "config.Settings", "Base", "LearnerSettings"])
def test_an_unread_setting_is_found(parent: str) -> None:
    text = f"""
from npedit.recipe.config import Settings as Base
class Settings({parent}):
    used: float
    unused: float
    @model_validator(mode="after")
    def check(self):
        assert self.unused > 0
def f(settings):
    settings.unused2 = 1
    return settings.used
"""
    assert unread("src/npedit/steps/a.py", ast.parse(text), {"unused"}) == ["src/npedit/steps/a.py: Settings.unused"]


def test_banned_words_are_found() -> None:
    text = "cd /wo~rk/x\nimport torch~vision\nsee https://py~pi.org\n".replace("~", "")
    assert len(banned("a", text)) == 3
    assert banned("a", "work/x, a shared/net, torchvision is not used, network/") == []


# What conftest.py promises.


def test_shapes_are_checked() -> None:
    from jaxtyping import TypeCheckError

    from npedit import flow

    x0, t = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    assert flow.add_noise(x0, x0, t).shape == x0.shape
    with pytest.raises(TypeCheckError, match="eps"):
        flow.add_noise(x0, torch.zeros(2, 3, 4, 1), t)  # plain torch would broadcast it


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_a_test_cannot_reach_the_network(method: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:  # its connect sends nothing
        with pytest.raises(RuntimeError, match="without network"):
            getattr(far, method)(("192.0.2.1", 9))
        far.connect(("127.0.0.1", 9))
