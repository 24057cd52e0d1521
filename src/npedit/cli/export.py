"""`npedit export`: the lines that are printed about an exported editor."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from npedit.errors import npedit_command
from npedit.export.export import export_editor
from npedit.runs.editor_facts import EditorFacts
from npedit.runs.resolve import EditorSource


def run_export(name: str, folder: Path, base: str = "") -> list[str]:
    """Lines about the export of an editor to a new folder. Arguments and errors as in `export_editor`."""
    return list(_describe(export_editor(name, folder, base=base), folder))


def _describe(source: EditorSource, folder: Path) -> Iterator[str]:
    facts = EditorFacts.read(folder)
    yield f"Exported {source} to {folder}. Its base model: {facts.base}."
    if os.path.isabs(facts.base):
        yield (
            "The base model is named by its place on this computer. For use elsewhere name a Hub id or another folder: "
            f"{npedit_command()} export ... --base ID, or edit ... --base FOLDER."
        )
    yield f"Use it: {npedit_command()} edit PICTURE INSTRUCTION --model {shlex.quote(str(folder))}"
