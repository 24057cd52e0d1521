"""The demo's recipe, opened once, and variants of it with one planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npedit.check.findings import Section
from npedit.check.subject import CheckOptions, Subject, read_examples
from npedit.recipe.config import Recipe, load_recipe
from npedit.toy.dataset import write_dataset
from npedit.training.parts import build_parts, build_source

SAMPLES = 12
FEW = 6  # examples for sections that run models


def severities(section: Section) -> dict[str, str]:
    """The severity of each finding that is not "ok", by its key."""
    return {f.key: f.severity for f in section.findings if f.severity != "ok"}


@pytest.fixture(scope="package")
def demo() -> Subject:
    """The demo, with a small sample."""
    recipe = load_recipe("demo")
    data = build_source(recipe)
    return Subject(recipe, data, build_parts(recipe), CheckOptions(samples=SAMPLES), read_examples(data, SAMPLES))


@pytest.fixture
def with_parts(demo: Subject) -> Callable[..., Subject]:
    """The demo with other parts."""
    return lambda **changes: Subject(
        demo.recipe, demo.data, replace(demo.parts, **changes), CheckOptions(samples=FEW), demo.examples[:FEW]
    )


@pytest.fixture(scope="package")
def toy_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 45 toy pictures with their texts."""
    return write_dataset(tmp_path_factory.mktemp("rows") / "data", 45, 0)


@pytest.fixture
def from_folder(demo: Subject, toy_rows: Path, tmp_path: Path) -> Callable[..., Subject]:
    """The demo on a folder of pictures, whose rows `change` has changed in place."""

    def open_changed(change: Callable[[list[dict[str, Any]]], object] = len, *overrides: str) -> Subject:
        folder = tmp_path / "photos"
        folder.mkdir()
        (folder / "images").symlink_to(toy_rows / "images")
        rows = [json.loads(line) for line in (toy_rows / "metadata.jsonl").read_text().splitlines()]
        change(rows)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = folder_recipe(folder, *overrides)
        data = build_source(recipe)
        return Subject(recipe, data, demo.parts, demo.options, read_examples(data, SAMPLES))

    return open_changed


def folder_recipe(folder: Path, *overrides: str) -> Recipe:
    """The demo's recipe on a folder of pictures of 32 x 32 pixels."""
    settings = f"data={{name: imagefolder, path: {folder}, sizes: [[32, 32]], prefetch: 0}}"
    return load_recipe("demo", [settings, *overrides])
