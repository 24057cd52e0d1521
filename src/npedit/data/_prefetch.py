"""Batches made ahead of their use, in threads of a pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from npedit.data import Batch

Key = tuple[int, int, int, int]  # index, size, rank, number of ranks
MakeBatch = Callable[[int, int, int, int], Batch]


def check_batch_key(index: int, size: int, rank: int, world: int) -> None:
    """Refuse the arguments of a batch that cannot be.

    Raises:
        ValueError: a size, index or rank that cannot be.
    """
    if size < 1 or index < 0 or not 0 <= rank < world:
        raise ValueError(f"expected size >= 1, index >= 0, rank < world; got {size}, {index}, {rank} of {world}")


class Prefetcher:
    """Makes batches with `make` in `threads` threads, `ahead` of them before they are asked for."""

    def __init__(self, make: MakeBatch, ahead: int, threads: int, name: str) -> None:
        self.make, self.ahead = make, ahead
        self._pool = ThreadPoolExecutor(threads, name)
        self._batches: dict[Key, Future[Batch]] = {}

    def batch(self, index: int, size: int, rank: int, world: int) -> Batch:
        """The batch, and begin those after it. Errors are those of `make`."""
        wanted = [(i, size, rank, world) for i in range(index, index + 1 + self.ahead)]
        for key in self._batches.keys() - set(wanted):
            self._batches.pop(key).cancel()
        for key in wanted:
            if key not in self._batches:
                self._batches[key] = self._pool.submit(self.make, *key)
        return self._batches.pop(wanted[0]).result()

    def clear(self) -> None:
        """Drop the batches that were made ahead: they would be made in another way now."""
        for future in self._batches.values():
            future.cancel()
        self._batches.clear()
