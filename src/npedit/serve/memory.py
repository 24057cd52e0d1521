"""The memory of decoded pictures: how much all requests together may hold."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from PIL import Image

BYTES_PER_PIXEL = 12  # of a request's picture: itself (Pillow holds RGB in 4 bytes), its result, and the result's file
DECODERS = 2  # pictures that are decoded at a time: a decoder needs several times the memory of its picture


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

    def decode(self, make: Callable[[], Image.Image], pixels: int) -> Image.Image:
        """The picture of so many pixels that `make` returns.

        Raises:
            MemoryFull: there is no room for it; `make` is not called.
        """
        count = pixels * BYTES_PER_PIXEL
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
