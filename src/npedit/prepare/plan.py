"""Which edit types each photo is asked for, so that the rows have the wanted shares."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence


def wanted_types(photo: str, shares: Mapping[str, float], count: int, seed: int) -> list[str]:
    """`count` edit types for one photo; a function of the photo's id and the seed.

    Systematic sampling from a shuffled list: the expected number of each type is exactly `count` times its share, and
    a type comes twice only if its share is above 1 / count.
    """
    rng = random.Random(f"{seed}/{photo}/types")
    names = sorted(shares)
    rng.shuffle(names)
    point, total = rng.random(), 0.0
    drawn: list[str] = []
    for name in names:
        total += shares[name] * count
        while point < total and len(drawn) < count:
            drawn.append(name)
            point += 1
    return (drawn + names)[:count]  # rounding of the sum may leave the last one out


def refill_types(
    photos: Sequence[str],
    made: Mapping[str, Sequence[str]],
    asked: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    count: int,
) -> dict[str, list[str]]:
    """Further edit types for photos that have fewer than `count` rows: {photo: types}.

    `made` are the types of a photo's rows, `asked` all types that it was asked for. A photo gets types that it was not
    asked for, those first of which there are fewest rows for their share. So a type that few photos admit does not
    change the proportion of the others. A function of its arguments.
    """
    counts = Counter(kind for kinds in made.values() for kind in kinds)
    plan: dict[str, list[str]] = {}
    for photo in sorted(photos):
        for _ in range(count - len(made.get(photo, ()))):
            taken = {*asked.get(photo, ()), *plan.get(photo, ())}
            left = sorted(kind for kind in shares if kind not in taken)
            if not left:
                break
            kind = min(left, key=lambda name: (counts[name] + 1) / shares[name])
            counts[kind] += 1
            plan.setdefault(photo, []).append(kind)
    return plan
