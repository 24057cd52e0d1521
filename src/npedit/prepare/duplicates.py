"""Groups of near-duplicate photos: the same picture resized, compressed again, or slightly changed.

Two photos are near-duplicates if their perceptual hashes (`imagehash.phash`, 64 bits) differ in few bits and the
colours of their thumbnails differ little. A perceptual hash alone ignores colours. Groups are connected: if A is like B
and B is like C, all three are one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    if not photos:
        return {}
    order = sorted(photos, key=lambda photo: photo["name"])
    look = [(photo["phash"], photo["colours"]) for photo in order]
    first = {key: place for place, key in reversed(list(enumerate(look)))}  # of the photos that look exactly alike
    places = sorted(first.values())
    alike = _Alike([look[place] for place in places], max_bits, max_colour)
    group = {look[place]: order[places[found]]["id"] for place, found in zip(places, alike.groups(), strict=True)}
    return {photo["id"]: group[key] for photo, key in zip(order, look, strict=True)}


class _Alike:
    """Finds what looks alike among pairs of perceptual hash and colours, no two of which are equal.

    The hash is cut into max_bits + 1 pieces. Two hashes that differ in at most `max_bits` bits agree in one of the
    pieces, so only those that agree in a piece are compared. What has got a group is not compared again.
    """

    def __init__(self, looks: Sequence[tuple[str, str]], max_bits: int, max_colour: float):
        self.hashes = np.array([int(phash, 16) for phash, _ in looks], np.uint64)
        self.colours = np.array([np.frombuffer(bytes.fromhex(c), np.uint8) for _, c in looks], np.float32)
        self.max_bits, self.max_colour = max_bits, max_colour
        self.sums = self.colours.sum(1, dtype=np.float64)
        self.group = np.full(len(looks), -1)
        edges = [HASH_BITS * k // (max_bits + 1) for k in range(max_bits + 2)]
        self.masks = [np.uint64(2**high - 2**low) for low, high in zip(edges, edges[1:])]
        self.members = [_places_of_values(self.hashes & mask) for mask in self.masks]

    def groups(self) -> list[int]:
        """The first member of each one's group."""
        for start in range(len(self.group)):
            if self.group[start] < 0:
                self.group[start] = start
                waiting = [start]
                while waiting:
                    near = self._near(waiting.pop())
                    self.group[near] = start
                    waiting += near.tolist()
        return self.group.tolist()

    def _near(self, place: int) -> np.ndarray:
        """What looks like the one at `place` and has no group yet."""
        found = [np.empty(0, int)]
        for piece in range(len(self.masks)):
            others = self._without_group(piece, self.hashes[place] & self.masks[piece])
            differ = self.hashes[others] ^ self.hashes[place]
            is_near = np.bitwise_count(differ) <= self.max_bits
            for mask in self.masks[:piece]:
                is_near &= (differ & mask) != 0  # else an earlier piece has found it
            found.append(others[is_near])
        others = np.concatenate(found)
        return others[self._has_colours_of(place, others)]

    def _without_group(self, piece: int, value: np.uint64) -> np.ndarray:
        members = self.members[piece][int(value)]
        self.members[piece][int(value)] = members = members[self.group[members] < 0]
        return members

    def _has_colours_of(self, place: int, others: np.ndarray) -> np.ndarray:
        """Whether the colours of `others` differ little. Sums of colours that differ much tell it at once: the root
        mean square is at least the difference of the means."""
        count = self.colours.shape[1]
        is_like = np.abs(self.sums[others] - self.sums[place]) <= self.max_colour * count
        near = others[is_like]
        distance = np.sqrt(((self.colours[near] - self.colours[place]) ** 2).mean(1))
        is_like[is_like] = distance <= self.max_colour
        return is_like


def _places_of_values(values: np.ndarray) -> dict[int, np.ndarray]:
    """The places of each value, in ascending order."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    return {int(values[places[0]]): places for places in np.split(order, starts)}


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
