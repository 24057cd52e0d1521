"""The pictures of a folder of results: each item's reference, instruction and edited picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.benchmarks import gedit, imgedit, own
from npedit.benchmarks._outputs import EDITED, find_picture_any_format
from npedit.data._photos import read_photo
from npedit.errors import UserError
from npedit.scoring.results import Results

OFFICIAL = "official"  # the folder of a judged benchmark's pictures


@dataclass(frozen=True)
class ResultPicture:
    """One result of one editor. `edited` need not exist."""

    task: str
    instruction: str
    reference: Callable[[], Image.Image]
    edited: Path


def read_result_pictures(folder: Path, results: Results, data: Path | None) -> dict[str, ResultPicture]:
    """The pictures of a folder of results, by the item's id. `data` is the set or the benchmark's data; None: what the
    results name.

    Raises:
        UserError: the results keep no pictures, or the data are missing or others than those of the results.
    """
    settings = results.settings
    name = settings.get("benchmark") or (settings.get("protocol") or {}).get("benchmark")
    data = data or (Path(settings["data"]) if isinstance(settings.get("data"), str) else None)
    if name not in ("own", "gedit", "imgedit"):
        raise UserError(
            f"expected results of 'evaluate own', 'gedit' or 'imgedit'; got {folder}, which is of "
            f"{name or 'another program'}; evaluate the editors with one of these"
        )
    if data is None:
        raise UserError(f"expected --data, because {folder} does not name its data; add --data FOLDER")
    if name == "own":
        return _read_own(folder, settings, data)
    return _read_judged(folder, settings, data, name)


def _read_own(folder: Path, settings: Mapping[str, Any], data: Path) -> dict[str, ResultPicture]:
    items, digest = own.read_items(str(data))
    if digest != settings["protocol"].get("data"):
        raise UserError(
            f"expected the data that {folder} is of; the metadata of {data} have changed since; evaluate "
            "again, or name the old data with --data"
        )
    made = Path(settings["source"].get("edited") or folder / EDITED)
    return {
        item.id: ResultPicture(
            item.task, item.instruction, _opener(item.reference), find_picture_any_format(made / item.file)
        )
        for item in items
    }


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: read_photo(path)


def _read_judged(folder: Path, settings: Mapping[str, Any], data: Path, name: str) -> dict[str, ResultPicture]:
    made = _pictures_of(folder, settings)
    if name == "imgedit":
        items = imgedit.read_items(data, made)
    else:
        items = gedit.read_items(data, tuple(dict.fromkeys(gedit.LANGUAGES.values())), made)
    return {
        item.id: ResultPicture(item.task, item.instruction, item.source, find_picture_any_format(item.edited))
        for item in items
    }


def _pictures_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the edited pictures of a judged benchmark."""
    editor = settings.get("editor")
    if isinstance(editor, dict) and editor.get("pictures"):
        return Path(editor["pictures"])
    official = folder / OFFICIAL
    found = sorted(path for path in official.iterdir() if path.is_dir()) if official.is_dir() else []
    if len(found) != 1:
        raise UserError(
            f"expected the edited pictures of one editor in {official}; got {len(found)} folders; "
            "evaluate again with --run or --edited"
        )
    return found[0]
