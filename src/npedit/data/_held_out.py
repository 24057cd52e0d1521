"""Which rows are held out (`data.held_out`): never trained on, they serve the samples and the held-out judge."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

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
        UserError: no row has one of the ids.
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
    return [number for i in ids for number in numbers[i]]


def draw_rows(rows: Rows, bucket_of: np.ndarray, count: int) -> list[int]:
    """The numbers of `count` rows drawn by lot, so that each bucket (picture size) and each edit type comes as early
    and as evenly as it can. `bucket_of` is the bucket of each row, -1 for none.

    The lot depends on the row's photo and instruction alone: not on the seed, not on the order of the rows. A smaller
    count gives the first rows of a larger one. The last row of a bucket or of an edit type is never drawn: training
    keeps it.

    Raises:
        UserError: there are fewer rows that can be held out.
    """
    if count == 0:
        return []
    groups, sizes = _lowest_lots(rows, bucket_of, count)
    left_of_bucket, left_of_type = Counter[int](), Counter[str]()
    for (bucket, edit_type), size in sizes.items():
        left_of_bucket[bucket] += size
        left_of_type[edit_type] += size
    drawn_buckets, drawn_types, drawn_pairs = Counter[int](), Counter[str](), Counter[Pair]()

    def priority(pair: Pair) -> tuple[int, int, int, str]:
        bucket, edit_type = pair
        new_features = (drawn_buckets[bucket] == 0) + (drawn_types[edit_type] == 0)
        return -new_features, drawn_pairs[pair], drawn_buckets[bucket] + drawn_types[edit_type], groups[pair][0][0]

    chosen: list[int] = []
    while len(chosen) < count:
        open_pairs = [p for p, left in groups.items() if left and left_of_bucket[p[0]] > 1 and left_of_type[p[1]] > 1]
        if not open_pairs:
            raise UserError(
                f"data.held_out: expected at most {len(chosen)}, as training keeps a row of each picture size and of "
                f"each edit type; got {count} of {len(rows)} rows; lower it"
            )
        pair = min(open_pairs, key=priority)
        chosen.append(groups[pair].pop(0)[1])
        left_of_bucket[pair[0]] -= 1
        left_of_type[pair[1]] -= 1
        drawn_pairs[pair] += 1
        drawn_buckets[pair[0]] += 1
        drawn_types[pair[1]] += 1
    return chosen


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
