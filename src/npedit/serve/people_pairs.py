"""The pictures that people compare: each item's reference, instruction, and the results of two editors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.report.result_pictures import read_result_pictures
from npedit.scoring.results import Results


@dataclass(frozen=True)
class Pair:
    """One item with the results of the first and of the second editor. `data` are the digests of the data that each of
    them was evaluated on."""

    id: str
    task: str
    instruction: str
    reference: Callable[[], Image.Image]
    edited: tuple[Path, Path]
    data: tuple[str, str] = ("", "")

    def digest(self, names: tuple[str, str]) -> str:
        """A hash of what people see: the data, the instruction, and the file of each editor's picture. `names` are
        those of the editors; their order does not matter. "" if a file cannot be read."""
        try:
            files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.edited]
        except OSError:
            return ""
        seen = [self.id, self.instruction, sorted(zip(names, self.data, files, strict=True))]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def pictures(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """The reference and the two results, RGB, without anything that their files say.

        Raises:
            BadImage, UserError: one cannot be read.
        """
        return self.reference(), read_photo(self.edited[0]), read_photo(self.edited[1])


def read_pairs(folders: Sequence[Path], results: Sequence[Results], data: Path | None) -> tuple[list[Pair], int]:
    """(the items of which both results have a picture, the number of items that lack one). `data` is the set or the
    benchmark's data; None: what the results name.

    Raises:
        UserError: the results keep no pictures, or the data are missing or others than those of the results.
    """
    first, second = (read_result_pictures(folder, found, data) for folder, found in zip(folders, results, strict=True))
    ids = [row.id for row in results[0].rows if row.id in {row.id for row in results[1].rows}]
    there = [i for i in ids if all(i in made and made[i].edited.is_file() for made in (first, second))]
    if not there:
        raise UserError(
            f"expected edited pictures of the same items in {folders[0]} and {folders[1]}; got none; "
            "evaluate both editors on the same data"
        )
    digests = _data_digest(results[0]), _data_digest(results[1])
    pairs = [
        Pair(i, first[i].task, first[i].instruction, first[i].reference, (first[i].edited, second[i].edited), digests)
        for i in there
    ]
    return pairs, len(ids) - len(pairs)


def _data_digest(results: Results) -> str:
    """The digest of the evaluated data, "" for a benchmark, whose protocol says which data they are."""
    return str((results.settings.get("protocol") or {}).get("data", ""))


def is_readable(pair: Pair) -> bool:
    """Whether all pictures of a pair can be read."""
    try:
        pair.pictures()
    except (BadImage, UserError, OSError):
        return False
    return True
