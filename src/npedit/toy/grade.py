"""The truth about a data set of toy pictures: which rows' words are wrong (`npedit toy grade`)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from npedit.errors import UserError
from npedit.toy.writer import read_photo, row_faults


def grade_dataset(folder: Path) -> tuple[int, int, Counter[str]]:
    """(number of rows, number of wrong rows, how often each fault occurs) of the folder's metadata.jsonl.

    Raises:
        UserError: there is no metadata.jsonl, a line is no JSON object, or a picture is not of the toy world.
    """
    path, rows, wrong, faults = folder / "metadata.jsonl", 0, 0, Counter[str]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a data set with metadata.jsonl; got {folder} ({error}); check the path") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            with Image.open(folder / row["file_name"]) as picture:
                found = row_faults(read_photo(picture), row)
        except (OSError, UnidentifiedImageError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected a row with a toy picture; got: {error}; correct it") from None
        rows, wrong = rows + 1, wrong + bool(found)
        faults.update(found)
    if not rows:
        raise UserError(f"expected rows in {path}; got none; write the data set again")
    return rows, wrong, faults
