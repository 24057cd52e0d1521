"""Which rows are held out (`data.held_out`): never trained on, they serve the samples and the held-out judge."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from npedit.data._groups import Groups
from npedit.data._rows import Rows
from npedit.errors import UserError, did_you_mean

Pair = tuple[int, str]  # bucket, edit type
OTHER_FORMS = {"data.held_out": "a number of rows", "--held-out": "a run"}  # beside a file, by setting
SUGGESTED = 10_000  # ids among which the nearest one is looked for


def read_held_out_ids(name: str, folder: Path, setting: str = "data.held_out") -> list[str]:
    """The row ids in a text file, one a line; blank lines are left out. `name` is a path, or is relative to the data
    folder. `setting` is what messages name: the recipe's key, or an option.

    Raises:
        UserError: the file is missing, cannot be read, or is empty.
    """
    places = [Path(name).expanduser(), folder / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(
            f"{setting}: expected {OTHER_FORMS[setting]} or a file with one row id a line; got {name!r}, which is "
            f"neither; a file's path is relative to {folder} or to the current folder; correct it"
        )
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: expected a text file; got {path} ({error}); correct it") from None
    ids = [i for i in dict.fromkeys(ids) if i]
    if not ids:
        raise UserError(
            f"{setting}: expected at least one row id; got an empty {path}; name another file, or leave it out"
        )
    return ids


def find_rows(rows: Rows, ids: Sequence[str]) -> list[int]:
    """The numbers of the rows that have these ids, in the order of the ids.

    Raises:
        UserError: no row has one of the ids, or a group would be separated.
    """
    numbers: dict[str, list[int]] = {i: [] for i in ids}
    for number, (id_,) in enumerate(rows.values("id")):
        if id_ in numbers:
            numbers[id_].append(number)
    unknown = [i for i in ids if not numbers[i]]
    if unknown:
        known = [id_ for (id_,) in islice(rows.values("id"), SUGGESTED)]
        raise UserError(
            f"data.held_out: expected ids of rows; got {unknown[0]!r} ({len(unknown)} of {len(ids)} ids are unknown). "
            f"Correct the file.{did_you_mean(unknown[0], known)}"
        )
    found = [number for i in ids for number in numbers[i]]
    _require_complete_groups(rows, found)
    return found


def _require_complete_groups(rows: Rows, held_out: Sequence[int]) -> None:
    groups, chosen = Groups(rows), set(held_out)
    for number in held_out:
        outside = [member for member in groups.members(number) if member not in chosen]
        if outside:
            raise UserError(
                f"data.held_out: expected all rows of a group or none; got {rows[number].id!r} of the group "
                f"{rows[number].group!r} without {', '.join(repr(rows[member].id) for member in outside[:3])}"
                f"{', ...' if len(outside) > 3 else ''}, whose photos show the same; add these ids, or remove it"
            )


def draw_rows(rows: Rows, bucket_of: np.ndarray, count: int) -> list[int]:
    """The numbers of `count` rows drawn by lot, so that each bucket (picture size) and each edit type comes as early
    and as evenly as it can. `bucket_of` is the bucket of each row, -1 for none.

    The lot depends on the row's photo and instruction alone: not on the seed, not on the order of the rows. A smaller
    count gives the first rows of a larger one. The last row of a bucket or of an edit type is never drawn: training
    keeps it. Rows of one group are drawn together, so there may be a few more rows than `count`.

    Raises:
        UserError: there are fewer rows that can be held out.
    """
    if count == 0:
        return []
    groups = Groups(rows)
    has_groups = bool(groups.shared)
    lots, sizes = _lowest_lots(rows, bucket_of, len(rows) if has_groups else count)
    types = rows.column("edit_type") if has_groups else []
    tally, chosen = _Tally(sizes), dict[int, None]()
    while len(chosen) < count:
        open_pairs = [pair for pair, left in lots.items() if left and tally.can_take([pair])]
        if not open_pairs:
            raise UserError(
                f"data.held_out: expected at most {len(chosen)}, as training keeps a row of each picture size and of "
                f"each edit type; got {count} of {len(rows)} rows; lower it"
            )
        pair = min(open_pairs, key=lambda p: (*tally.priority(p), lots[p][0][0]))
        number = lots[pair].pop(0)[1]
        members = groups.members(number)
        pairs = [(int(bucket_of[n]), types[n].as_py()) for n in members if bucket_of[n] >= 0] if has_groups else [pair]
        if number not in chosen and tally.can_take(pairs):
            chosen |= dict.fromkeys(members)
            tally.take(pairs)
    return list(chosen)


class _Tally:
    """How many rows of each bucket and of each edit type are left for training and are drawn. `sizes` are the numbers
    of rows of each pair."""

    def __init__(self, sizes: Mapping[Pair, int]):
        self._left, self._drawn, self._drawn_pairs = Counter[int | str](), Counter[int | str](), Counter[Pair]()
        for pair, size in sizes.items():
            for feature in pair:
                self._left[feature] += size

    def can_take(self, pairs: Sequence[Pair]) -> bool:
        """Whether training keeps a row of each bucket and of each edit type if rows of these pairs are drawn."""
        taken = Counter(feature for pair in pairs for feature in pair)
        return all(self._left[feature] > number for feature, number in taken.items())

    def take(self, pairs: Sequence[Pair]) -> None:
        """Count rows of these pairs as drawn."""
        features = [feature for pair in pairs for feature in pair]
        self._left.subtract(features)
        self._drawn.update(features)
        self._drawn_pairs.update(pairs)

    def priority(self, pair: Pair) -> tuple[int, int, int]:
        """A smaller one is drawn first: new buckets and edit types, then those that were drawn least."""
        drawn = [self._drawn[feature] for feature in pair]
        return -drawn.count(0), self._drawn_pairs[pair], sum(drawn)


def _lowest_lots(
    rows: Rows, bucket_of: np.ndarray, count: int
) -> tuple[dict[Pair, list[tuple[str, int]]], Counter[Pair]]:
    """(the `count` lowest lots of each bucket and edit type, with their rows' numbers; number of rows of each)."""
    lots: dict[Pair, list[tuple[str, int]]] = defaultdict(list)
    sizes = Counter[Pair]()
    columns = rows.values("edit_type", "file_name", "file", "instruction")
    for number, (edit_type, file_name, file, instruction) in enumerate(columns):
        pair = int(bucket_of[number]), edit_type
        if pair[0] < 0:
            continue
        sizes[pair] += 1
        lots[pair].append((_lot(rows.photo_name(file_name, file), instruction), number))
        if len(lots[pair]) > 4 * count + 1024:
            lots[pair] = heapq.nsmallest(count, lots[pair])
    by_bucket = sorted(lots, key=lambda pair: pair[0])  # then by the first row, as before sorting
    return {pair: heapq.nsmallest(count, lots[pair]) for pair in by_bucket}, sizes


def _lot(photo: str, instruction: str) -> str:
    return hashlib.sha256(f"held out\0{photo}\0{instruction}".encode()).hexdigest()
