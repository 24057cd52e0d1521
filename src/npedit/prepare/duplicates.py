"""Groups of near-duplicate photos: the same picture resized, compressed again, or slightly changed.

Two photos are near-duplicates if their perceptual hashes (`imagehash.phash`, 64 bits) differ in few bits and the
colours of their thumbnails differ little. A perceptual hash alone ignores colours. Groups are connected: if A is like B
and B is like C, all three are one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import imagehash
import numpy as np
from PIL import Image

HASH_BITS = 64
THUMBNAIL = 8  # pixels a side of the colours that are compared
MAX_BITS = 4  # that may differ between the hashes of near-duplicates
MAX_COLOUR = 8.0  # root mean square difference of the thumbnails, of 255


def similarity_facts(image: Image.Image) -> dict[str, str]:
    """What near-duplicates of an RGB picture are found by: `phash`, 64 bits, and `colours`, those of the picture scaled
    down to 8 x 8 pixels. Both are hexadecimal."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return {"phash": str(imagehash.phash(image)), "colours": np.asarray(small, np.uint8).tobytes().hex()}


def group_near_duplicates(
    photos: Sequence[Mapping[str, Any]], max_bits: int = MAX_BITS, max_colour: float = MAX_COLOUR
) -> dict[str, str]:
    """Photo id -> group id. The group id is the id of the group's photo whose name comes first. Photos need `id`,
    `name`, `phash` and `colours`."""
    order = sorted(range(len(photos)), key=lambda i: photos[i]["name"])
    hashes = np.array([int(photos[i]["phash"], 16) for i in order], np.uint64)
    colours = np.array([np.frombuffer(bytes.fromhex(photos[i]["colours"]), np.uint8) for i in order], np.float32)
    root = list(range(len(order)))
    for first, others in _candidates(hashes, max_bits):
        distance = np.sqrt(((colours[others] - colours[first]) ** 2).mean(1))
        for other in others[distance <= max_colour]:
            _join(root, first, int(other))
    return {photos[i]["id"]: photos[order[_find(root, place)]]["id"] for place, i in enumerate(order)}


def _candidates(hashes: np.ndarray, max_bits: int) -> Iterator[tuple[int, np.ndarray]]:
    """(photo, later photos whose hashes differ from its hash in at most `max_bits` bits).

    The hash is cut into max_bits + 1 pieces. Two hashes that differ in at most `max_bits` bits agree in one of the
    pieces, so only photos that agree in a piece are compared.
    """
    pieces = max_bits + 1
    edges = [HASH_BITS * k // pieces for k in range(pieces + 1)]
    for low, high in zip(edges, edges[1:]):
        values = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        for members in _equal_values(values):
            for place, first in enumerate(members[:-1]):
                others = members[place + 1 :]
                bits = np.bitwise_count(hashes[others] ^ hashes[first])
                near = others[bits <= max_bits]
                if len(near):
                    yield int(first), near


def _equal_values(values: np.ndarray) -> Iterator[np.ndarray]:
    """The places of equal values, in ascending order, for each value that comes more than once."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            yield members


def join_groups(groups: Mapping[str, str], together: Iterable[Sequence[str]]) -> dict[str, str]:
    """Groups that also hold each of the given sets of photo ids together."""
    ids = sorted(groups)
    place = {photo: number for number, photo in enumerate(ids)}
    root = list(range(len(ids)))
    members: dict[str, list[str]] = defaultdict(list)
    for photo in ids:
        members[groups[photo]].append(photo)
    for photos in (*members.values(), *together):
        for photo in photos[1:]:
            _join(root, place[photos[0]], place[photo])
    return {photo: ids[_find(root, number)] for photo, number in place.items()}


def _find(root: list[int], place: int) -> int:
    while root[place] != place:
        root[place] = root[root[place]]
        place = root[place]
    return place


def _join(root: list[int], a: int, b: int) -> None:
    a, b = _find(root, a), _find(root, b)
    root[max(a, b)] = min(a, b)
