"""Other photos of a subject: against one of them the critic checks a scene (`questions.py`).

The other photos of a row are its further references, and the photos of the rows that have the same `group`. One is
drawn for each item of the stream, from the seed and the item's position alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from npedit.data._example import Place
from npedit.data._metadata import Row
from npedit.questions import SCENE


def shuffled_other_photos(row: Row, members: Iterable[Row], rng: random.Random) -> list[Place]:
    """The other photos of a row's subject, each once, in random order. `members` are the rows of its group."""
    folder = "" if row.subfolder == "." else f"{row.subfolder}/"
    found = {folder + name: (row, name) for name in row.references}
    found |= {member.photo: (member, member.file_name) for member in members}
    found.pop(row.photo, None)
    places = list(found.values())
    rng.shuffle(places)
    return places


def has_critic_photos(edit_type: str, other_photos: bool) -> bool:
    """Whether the other photos of a row of this type are for the critic: those of a scene, unless `data.other_photos`
    is off."""
    return other_photos and edit_type == SCENE
