"""The memory of decoded pictures: how much all requests together may hold."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from PIL import Image

BYTES_PER_PIXEL = 4  # of a request's picture: Pillow holds RGB in 4 bytes
BYTES_PER_RESULT = 8  # for each pixel: the result, and the result's file
DECODERS = 2  # pictures that are decoded at a time: a decoder needs several times the memory of its picture


def memory_needed(pixels: int, results: int = 1) -> int:
    """The bytes that a request with a picture of so many pixels needs."""
    return pixels * (BYTES_PER_PIXEL + BYTES_PER_RESULT * results)


class MemoryFull(Exception):
    """The pictures of other requests need the memory."""


class PictureMemory:
    """Counts the memory of decoded pictures, each as long as it exists; at most `most` bytes. Use it from any
    thread."""

    def __init__(self, most: int = 4 * 2**30) -> None:
        self.most = most
        self._held = 0
        self._lock = threading.RLock()  # a picture may be deleted, and counted out, inside the lock
        self._decoders = threading.BoundedSemaphore(DECODERS)

    @property
    def held(self) -> int:
        """Bytes of the pictures that exist now."""
        return self._held

    def decode(self, make: Callable[[], Image.Image], pixels: int, results: int = 1) -> Image.Image:
        """The picture of so many pixels that `make` returns; so many results of its size will be made of it.

        Raises:
            MemoryFull: there is no room for it; `make` is not called.
        """
        count = memory_needed(pixels, results)
        self._add(count)
        try:
            with self._decoders:
                picture = make()
        except BaseException:
            self._free(count)
            raise
        weakref.finalize(picture, self._free, count).atexit = False
        return picture

    def _add(self, count: int) -> None:
        with self._lock:
            if self._held + count > self.most:
                raise MemoryFull
            self._held += count

    def _free(self, count: int) -> None:
        with self._lock:
            self._held -= count
