"""The order in which rows are used: a function of the seed alone, whatever holds the rows and pictures.

A *bucket* is a set of rows whose references have one shape; a batch is from one bucket. Each bucket is an endless
stream of rows in epochs. Without shares an epoch uses each row once, in a new random order. With shares an epoch has
as many rows as there are rows in use, and each edit type has its share of them, to within one row per bucket; the
rounding is carried over to the next epoch. The rows of one type are used in passes: no row is used again before all
others of its type and bucket have been used.

`trainer.by_failure` gives rows weights, which change in the course of a run. A change begins another order in the
middle of an epoch, so the last two sentences hold between two changes only.
"""

from __future__ import annotations

import random
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from npedit.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Group:
    """Rows of one bucket, in increasing order, of which an epoch uses `quota` on average."""

    rows: array[int]
    quota: Fraction

    def count_before(self, epoch: int) -> int:
        """How many rows of this group are used before an epoch begins."""
        return int(epoch * self.quota)  # rounded down


def plain_groups(buckets: Sequence[np.ndarray]) -> list[list[Group]]:
    """The groups of each bucket without shares: one, whose rows are each used once in an epoch."""
    return [[Group(_as_array(rows), Fraction(len(rows)))] for rows in buckets]


def shared_groups(
    buckets: Sequence[np.ndarray], types: np.ndarray, shares: Mapping[str, float]
) -> tuple[list[list[Group]], int]:
    """(the groups of each bucket, number of rows in use), where an epoch gives each edit type its share.

    `types` holds the edit type of each row. Types without a share divide what is left in proportion to their rows.

    Raises:
        UserError: a type with a share has no rows, or types without rows would get what is left.
    """
    counts = {str(name): int(n) for name, n in zip(*np.unique(types[np.concatenate(buckets)], return_counts=True))}
    for name, share in shares.items():
        if share > 0 and name not in counts:
            raise UserError(
                f"data.shares.{name}: expected an edit type that some rows have; got none; remove it or add rows."
                f"{did_you_mean(name, counts)} The data have: {', '.join(sorted(counts))}"
            )
    wanted = {name: Fraction(str(share)) for name, share in shares.items() if share > 0}
    left, others = 1 - sum(wanted.values(), Fraction(0)), sum(n for name, n in counts.items() if name not in shares)
    if left > 0 and not others:
        raise UserError(
            f"data.shares: expected shares that add up to 1, as no row has another edit type; got {float(1 - left):g}; "
            "correct them"
        )
    if left > 0:
        wanted |= {name: left * n / others for name, n in counts.items() if name not in shares}
    used = sum(counts[name] for name in wanted)
    found = []
    for rows in buckets:
        of_type = {name: rows[types[rows] == name] for name in sorted(wanted)}
        quota = {name: wanted[name] * used / counts[name] for name in wanted}
        found.append([Group(_as_array(m), quota[name] * len(m)) for name, m in of_type.items() if len(m)])
    return found, used


WEIGHT_LEVELS = 8  # weights are rounded up to eighths: few groups, and rounding in a weight changes nothing


def weighted_groups(buckets: Sequence[Sequence[Group]], weights: np.ndarray) -> list[list[Group]]:
    """The groups of each bucket, divided by the weights of their rows, so that a row is used in proportion to its
    quota x its weight. An epoch keeps its number of rows. `weights` holds the weight in (0, 1] of each row's number.
    """
    levels = np.ceil(weights * WEIGHT_LEVELS).astype(int)
    parts = [[list(_divided(group, levels)) for group in bucket] for bucket in buckets]
    total = sum((group.quota for bucket in buckets for group in bucket), Fraction(0))
    weighted = sum((part.quota for bucket in parts for group in bucket for part in group), Fraction(0))
    return [[Group(p.rows, p.quota * total / weighted) for group in bucket for p in group] for bucket in parts]


def _divided(group: Group, levels: np.ndarray) -> Iterator[Group]:
    """The rows of a group by their level, with quotas in proportion to the level."""
    rows = np.array(group.rows)
    for level in np.unique(levels[rows]).tolist():
        members = rows[levels[rows] == level]
        yield Group(_as_array(members), group.quota * len(members) * level / len(rows))


def _as_array(rows: np.ndarray) -> array[int]:
    return array("i", rows.astype(np.int32).tobytes())


class Order:
    """The rows of all buckets as batches. `groups` are those of each bucket."""

    def __init__(self, seed: int, groups: Sequence[Sequence[Group]]):
        self.seed, self._groups = seed, groups
        self._rows = lru_cache(2 * len(groups) + 2)(self._shuffled_rows)
        self._pass = lru_cache(2 * sum(map(len, groups)) + 2)(self._shuffled_pass)
        self._plan = lru_cache(2)(self._shuffled_batch_order)
        self._lock = threading.RLock()  # one thread shuffles, the others wait for it

    def locate_batch(self, index: int, size: int) -> tuple[int, int]:
        """(bucket, number of the batch in it) of the index-th batch of `size` rows over all ranks."""
        epoch = _last_not_above(lambda e: sum(self._batches_before(e, size)), index)
        with self._lock:
            code = self._plan(epoch, size)[index - sum(self._batches_before(epoch, size))]
        return code % len(self._groups), code // len(self._groups)

    def candidates(self, bucket: int, position: int) -> Iterator[int]:
        """The number of the row at a position of a bucket's stream, then those that may replace it: the rest of its
        epoch, and the rows of other buckets."""
        epoch = _last_not_above(lambda e: self._rows_before(bucket, e), position)
        with self._lock:
            order = self._rows(bucket, epoch)
        place = position - self._rows_before(bucket, epoch)
        for k in range(len(order)):
            yield order[(place + k) % len(order)]
        for other, groups in enumerate(self._groups):
            if other != bucket:
                for group in groups:
                    yield from group.rows

    def _rows_before(self, bucket: int, epoch: int) -> int:
        return sum(group.count_before(epoch) for group in self._groups[bucket])

    def _batches_before(self, epoch: int, size: int) -> list[int]:
        """How many batches of `size` rows each bucket has given before this epoch begins. What is left of an epoch
        begins the next batch."""
        return [self._rows_before(bucket, epoch) // size for bucket in range(len(self._groups))]

    def _shuffled_rows(self, bucket: int, epoch: int) -> array[int]:
        order = array("i")
        for number, group in enumerate(self._groups[bucket]):
            order += self._slice_of_passes(bucket, number, group, epoch)
        random.Random(f"{self.seed}/{bucket}/{epoch}").shuffle(order)
        return order

    def _slice_of_passes(self, bucket: int, number: int, group: Group, epoch: int) -> array[int]:
        """The rows of a group that an epoch uses."""
        count = len(group.rows)
        if group.quota == count:
            return group.rows
        start, stop = group.count_before(epoch), group.count_before(epoch + 1)
        rows = array("i")
        while start < stop:
            which, place = divmod(start, count)
            part = self._pass(bucket, number, which)[place : place + stop - start]
            rows += part
            start += len(part)
        return rows

    def _shuffled_pass(self, bucket: int, number: int, which: int) -> array[int]:
        rows = self._groups[bucket][number].rows[:]
        random.Random(f"{self.seed}/{bucket}/{number}/pass/{which}").shuffle(rows)
        return rows

    def _shuffled_batch_order(self, epoch: int, size: int) -> array[int]:
        """The batches of one epoch, mixed, as number of the batch in its bucket x number of buckets + bucket."""
        count = len(self._groups)
        spans = list(zip(self._batches_before(epoch, size), self._batches_before(epoch + 1, size), strict=True))
        plan = array("q")
        for bucket, (start, end) in enumerate(spans):
            plan.extend(range(start * count + bucket, end * count + bucket, count))
        random.Random(f"{self.seed}/plan/{epoch}").shuffle(plan)
        return plan


def _last_not_above(count_before, position: int) -> int:
    """The last epoch e with `count_before(e)` <= position; `count_before` never falls."""
    high = 1
    while count_before(high) <= position:
        high *= 2
    return bisect_right(range(high), position, key=count_before) - 1
