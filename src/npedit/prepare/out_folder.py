"""Which folder can become a set: a new one, or one that the same command has begun from the same source.

begun.json   {"command", "sources": the folders that the set is made from}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npedit.errors import UserError
from npedit.prepare.set_folder import ANSWERS, FACTS, PHOTOS, REVIEW
from npedit.runs.files import read_json_object, write_text
from npedit.runs.lock import LOCK_FILES

BEGUN = "begun.json"
CAPTION, MERGE, PREPARE = "caption", "merge-shards", "prepare"  # the commands that make sets


def begin_set(folder: Path, command: str, sources: Sequence[Path]) -> None:
    """Write down what makes the set. Call this after `require_folder` and inside `hold`."""
    write_text(folder / BEGUN, json.dumps(_origin(command, sources), ensure_ascii=False) + "\n")


def read_sources(folder: Path) -> list[Path]:
    """The folders that a set is made from; [] if an older npedit began it."""
    return [Path(source) for source in _read_begun(folder).get("sources", ())]


def require_folder(folder: Path, command: str, sources: Sequence[Path]) -> None:
    """Check that a folder can become a set: it is new, or was begun by this command from these sources; it is outside
    of them, and no person has reviewed it.

    Raises:
        UserError: it cannot.
    """
    for source in sources:
        if source.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(
                f"expected a folder for the set outside the folder {source}, which is read; got {folder}; choose "
                "another folder"
            )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder for the set; got the file {folder}; choose another name")
    if (folder / REVIEW).exists():
        raise UserError(
            f"expected a set that no person has reviewed; got {folder}, whose {REVIEW} holds decisions that would be "
            "lost; choose another folder"
        )
    if folder.is_dir() and {path.name for path in folder.iterdir()} - LOCK_FILES - {f"{BEGUN}.tmp"}:
        _require_begun(folder, command, sources)


def _require_begun(folder: Path, command: str, sources: Sequence[Path]) -> None:
    begun = _read_begun(folder)
    if not begun and command not in _older_commands(folder):
        raise UserError(
            f"expected a new folder for the set, or one that npedit {command} has begun; got {folder}, which holds "
            "other files; choose another"
        )
    if begun and begun != _origin(command, sources):
        given = ", ".join(str(source.resolve()) for source in sources)
        raise UserError(
            f"expected a new folder for the set, or one that npedit {command} has begun from {given}; got {folder}, "
            f"which npedit {begun.get('command')} has begun from {', '.join(map(str, begun.get('sources', ())))}; "
            f"choose another folder, or correct {BEGUN} in it if the same files have moved"
        )


def _origin(command: str, sources: Sequence[Path]) -> dict[str, Any]:
    return {"command": command, "sources": [str(source.resolve()) for source in sources]}


def _read_begun(folder: Path) -> dict[str, Any]:
    if not (folder / BEGUN).exists():
        return {}
    try:
        return read_json_object(folder / BEGUN)
    except ValueError as error:
        raise UserError(f"expected a JSON object in {folder / BEGUN}; got {error}; choose another folder") from None


def _older_commands(folder: Path) -> tuple[str, ...]:
    """The commands that may have begun a set without begun.json, as npedit made sets before it wrote this file."""
    try:
        facts = read_json_object(folder / FACTS)
    except ValueError:
        if (folder / PHOTOS).exists():
            return (PREPARE,)
        return (PREPARE, CAPTION) if (folder / ANSWERS).exists() else ()
    if "captions" in facts:
        return (CAPTION,)
    return (PREPARE,) if "prompts" in facts else ()
