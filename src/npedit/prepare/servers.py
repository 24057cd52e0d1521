"""A writer behind several servers of one model. Each request goes to the server with the fewest requests in work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from npedit.errors import UserError
from npedit.judges.base import JudgeUnavailable, Reply
from npedit.judges.chat_client import ServerNames
from npedit.prepare.writer import Request, Writer, open_writer

log = logging.getLogger(__name__)


class ServerPool(Writer):
    """Several servers as one writer. A server that cannot answer any request is left out, which `on_note` reports. The
    run ends when no server is left.

    All servers have the same `identity`, so that an answer counts for all of them.
    """

    def __init__(self, writers: Sequence[Writer], on_note: Callable[[str], None] = lambda line: None):
        self.writers, self.on_note = list(writers), on_note
        self.name = writers[0].name
        self.workers = sum(writer.workers for writer in writers)
        self._left = list(range(len(writers)))
        self._in_work, self._sent = [0] * len(writers), [0] * len(writers)
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """In another process, the same pool reports to the log."""
        return ServerPool, (self.writers, log.warning)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Writer.identity`."""
        return self.writers[0].identity

    @property
    def address(self) -> str:
        """The addresses of all servers."""
        return ", ".join(writer.address for writer in self.writers)

    def ask(self, request: Request) -> Reply:
        """See `Writer.ask`. A request that a server cannot answer goes to another one."""
        while True:
            with self._least_busy() as number:
                try:
                    reply = self.writers[number].ask(request)
                    return replace(reply, address=self.writers[number].address)
                except JudgeUnavailable as error:
                    self._leave_out(number, error)

    @contextmanager
    def _least_busy(self) -> Iterator[int]:
        """The number of the server with the fewest requests in work, and of these with the fewest so far. It has one
        more within the block."""
        with self._lock:
            number = min(self._left, key=lambda n: (self._in_work[n], self._sent[n]))
            self._in_work[number] += 1
            self._sent[number] += 1
        try:
            yield number
        finally:
            with self._lock:
                self._in_work[number] -= 1

    def _leave_out(self, number: int, error: JudgeUnavailable) -> None:
        """Send no further request to a server.

        Raises:
            JudgeUnavailable: it was the last one.
        """
        with self._lock:
            if self._left == [number]:
                raise error
            if number not in self._left:
                return
            self._left.remove(number)
        self.on_note(f"{error}. {len(self._left)} of {len(self.writers)} servers are left")

    def stop_retrying(self) -> None:
        """See `Writer.stop_retrying`."""
        for writer in self.writers:
            writer.stop_retrying()


def open_writers(
    models: Sequence[str],
    name: str,
    names: ServerNames,
    workers: int,
    jpeg_quality: int,
    parameters: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Writer:
    """The writer at an address or of a local model, or behind several addresses; see `open_writer`.

    Raises:
        UserError: one cannot be opened, or one of several is no address, or one is given twice.
    """
    addresses = {model for model in models if model.startswith(("http://", "https://"))}
    if len(models) > 1 and len(addresses) < len(models):
        raise UserError(
            f"{names.url}: expected different addresses of servers where it is given several times; got "
            f"{', '.join(models)}; correct them"
        )
    found = [open_writer(model, name, names, workers, jpeg_quality, parameters, on_note) for model in models]
    return found[0] if len(found) == 1 else ServerPool(found, on_note)
