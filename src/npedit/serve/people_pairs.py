"""The pictures that people compare: each item's reference, instruction, and the results of two editors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.benchmarks import gedit, imgedit, own
from npedit.benchmarks._outputs import EDITED, find_picture_any_format
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.scoring.results import Results

OFFICIAL = "official"  # the folder of a judged benchmark's pictures


@dataclass(frozen=True)
class Pair:
    """One item with the results of the first and of the second editor."""

    id: str
    task: str
    instruction: str
    reference: Callable[[], Image.Image]
    edited: tuple[Path, Path]

    def pictures(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """The reference and the two results, RGB, without anything that their files say.

        Raises:
            BadImage, UserError: one cannot be read.
        """
        return self.reference(), read_photo(self.edited[0]), read_photo(self.edited[1])


@dataclass(frozen=True)
class _Picture:
    """One result of one editor."""

    task: str
    instruction: str
    reference: Callable[[], Image.Image]
    edited: Path


def read_pairs(folders: Sequence[Path], results: Sequence[Results], data: Path | None) -> tuple[list[Pair], int]:
    """(the items of which both results have a picture, the number of items that lack one). `data` is the set or the
    benchmark's data; None: what the results name.

    Raises:
        UserError: the results keep no pictures, or the data are missing or others than those of the results.
    """
    first, second = (_read_pictures(folder, found, data) for folder, found in zip(folders, results, strict=True))
    ids = [row.id for row in results[0].rows if row.id in {row.id for row in results[1].rows}]
    there = [i for i in ids if all(i in made and made[i].edited.is_file() for made in (first, second))]
    if not there:
        raise UserError(
            f"expected edited pictures of the same items in {folders[0]} and {folders[1]}; got none; "
            "evaluate both editors on the same data"
        )
    pairs = [
        Pair(i, first[i].task, first[i].instruction, first[i].reference, (first[i].edited, second[i].edited))
        for i in there
    ]
    return pairs, len(ids) - len(pairs)


def _read_pictures(folder: Path, results: Results, data: Path | None) -> Mapping[str, _Picture]:
    settings = results.settings
    name = settings.get("benchmark") or (settings.get("protocol") or {}).get("benchmark")
    data = data or (Path(settings["data"]) if isinstance(settings.get("data"), str) else None)
    if name not in ("own", "gedit", "imgedit"):
        raise UserError(
            f"--people: expected results of 'evaluate own', 'gedit' or 'imgedit'; got {folder}, which is of "
            f"{name or 'another program'}; evaluate the editors with one of these"
        )
    if data is None:
        raise UserError(f"--people: expected --data, because {folder} does not name its data; add --data FOLDER")
    if name == "own":
        return _read_own(folder, settings, data)
    return _read_judged(folder, settings, data, name)


def _read_own(folder: Path, settings: Mapping[str, Any], data: Path) -> dict[str, _Picture]:
    items, digest = own.read_items(str(data))
    if digest != settings["protocol"].get("data"):
        raise UserError(
            f"--people: expected the data that {folder} is of; the metadata of {data} have changed since; evaluate "
            "again, or name the old data with --data"
        )
    made = Path(settings["source"].get("edited") or folder / EDITED)
    return {
        item.id: _Picture(
            item.task, item.instruction, _opener(item.reference), find_picture_any_format(made / item.file)
        )
        for item in items
    }


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: read_photo(path)


def _read_judged(folder: Path, settings: Mapping[str, Any], data: Path, name: str) -> dict[str, _Picture]:
    made = _pictures_of(folder, settings)
    if name == "imgedit":
        items = imgedit.read_items(data, made)
    else:
        items = gedit.read_items(data, tuple(dict.fromkeys(gedit.LANGUAGES.values())), made)
    return {
        item.id: _Picture(item.task, item.instruction, item.source, find_picture_any_format(item.edited))
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
            f"--people: expected the edited pictures of one editor in {official}; got {len(found)} folders; "
            "evaluate again with --run or --edited"
        )
    return found[0]


def is_readable(pair: Pair) -> bool:
    """Whether all pictures of a pair can be read."""
    try:
        pair.pictures()
    except (BadImage, UserError, OSError):
        return False
    return True
