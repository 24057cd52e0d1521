"""Which rows are held out (`data.held_out`): never trained on, they serve the samples and the held-out judge."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from npedit.data._metadata import Row
from npedit.errors import UserError, did_you_mean

Size = tuple[int, int]
Buckets = Sequence[tuple[Size, Sequence[int]]]  # (picture size, numbers of the rows that have it)


def read_held_out_ids(name: str, folder: Path) -> list[str]:
    """The row ids in a text file, one a line; blank lines are left out. `name` is a path, or is relative to the data
    folder.

    Raises:
        UserError: the file is missing, cannot be read, or is empty.
    """
    places = [Path(name).expanduser(), folder / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(
            f"data.held_out: expected a number of rows or a file with one row id a line; got {name!r}, which is "
            f"neither a file nor one in {folder}; correct it"
        )
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.held_out: expected a text file; got {path} ({error}); correct it") from None
    ids = [i for i in dict.fromkeys(ids) if i]
    if not ids:
        raise UserError(f"data.held_out: expected at least one row id; got an empty {path}; set data.held_out to 0")
    return ids


def find_rows(rows: Sequence[Row], ids: Sequence[str]) -> list[int]:
    """The numbers of the rows that have these ids, in the order of the ids.

    Raises:
        UserError: no row has one of the ids.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[row.id].append(number)
    unknown = [i for i in ids if i not in numbers]
    if unknown:
        raise UserError(
            f"data.held_out: expected ids of rows; got {unknown[0]!r} ({len(unknown)} of {len(ids)} ids are unknown). "
            f"Correct the file.{did_you_mean(unknown[0], numbers)}"
        )
    return [number for i in ids for number in numbers[i]]


def draw_rows(rows: Sequence[Row], buckets: Buckets, count: int) -> list[int]:
    """The numbers of `count` rows drawn by lot, so that each picture size and each edit type comes as early and as
    evenly as it can.

    The lot depends on the row's photo and instruction alone: not on the seed, not on the order of the rows. A smaller
    count gives the first rows of a larger one. The last row of a size or of an edit type is never drawn: training keeps
    it.

    Raises:
        UserError: there are fewer rows that can be held out.
    """
    if count == 0:
        return []
    groups = _rows_in_lot_order(rows, buckets)
    left_of_size, left_of_type, drawn_pairs = Counter[Size](), Counter[str](), Counter[tuple[Size, str]]()
    for (size, edit_type), members in groups.items():
        left_of_size[size] += len(members)
        left_of_type[edit_type] += len(members)
    drawn_sizes, drawn_types = Counter[Size](), Counter[str]()

    def priority(pair: tuple[Size, str]) -> tuple[int, int, int, str]:
        size, edit_type = pair
        new_features = (drawn_sizes[size] == 0) + (drawn_types[edit_type] == 0)
        return -new_features, drawn_pairs[pair], drawn_sizes[size] + drawn_types[edit_type], _lot(rows[groups[pair][0]])

    chosen: list[int] = []
    while len(chosen) < count:
        open_pairs = [p for p, left in groups.items() if left and left_of_size[p[0]] > 1 and left_of_type[p[1]] > 1]
        if not open_pairs:
            raise UserError(
                f"data.held_out: expected at most {len(chosen)}, as training keeps a row of each picture size and of "
                f"each edit type; got {count} of {len(rows)} rows; lower it"
            )
        pair = min(open_pairs, key=priority)
        chosen.append(groups[pair].pop(0))
        left_of_size[pair[0]] -= 1
        left_of_type[pair[1]] -= 1
        drawn_pairs[pair] += 1
        drawn_sizes[pair[0]] += 1
        drawn_types[pair[1]] += 1
    return chosen


def _rows_in_lot_order(rows: Sequence[Row], buckets: Buckets) -> dict[tuple[Size, str], list[int]]:
    """The numbers of the rows by (picture size, edit type), those with the lowest lots first."""
    groups: dict[tuple[Size, str], list[int]] = defaultdict(list)
    for size, members in buckets:
        for number in members:
            groups[size, rows[number].edit_type].append(number)
    for members in groups.values():
        members.sort(key=lambda number: (_lot(rows[number]), number))
    return dict(groups)


def _lot(row: Row) -> str:
    return hashlib.sha256(f"held out\0{row.photo}\0{row.instruction}".encode()).hexdigest()
