"""Requests that wait for an editor, and the thread that edits them in batches.

One thread holds the editor, as a GPU does one thing at a time. It takes all waiting requests that fit into one batch
with the oldest one, so many clients share the passes through the model.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.full_size import keep_unchanged, scale_back
from npedit.generator import BATCH_ITEMS


class QueueFull(Exception):
    """As many requests wait as may wait."""


class TooLate(Exception):
    """The request waited longer than a request may wait, and was not begun."""


class Draining(Exception):
    """The server stops, and takes no new request."""


REFUSALS: dict[type[Exception], str] = {
    QueueFull: "too many edits wait; try again later",
    TooLate: "the edit waited too long and was not begun; try again later",
    Draining: "the server stops and takes no new edits",
}


def words_for(error: Exception) -> str:
    """What a client is told about a request that was not taken or not begun; "" for any other error."""
    return next((words for kind, words in REFUSALS.items() if isinstance(error, kind)), "")


@dataclass(frozen=True)
class EditRequest:
    """One edit: an upright RGB picture, further references, an instruction, and the sampling settings. `steps` None is
    the editor's own number. `keep_resolution` is that of `Editor.edit`. `run` names another editor than the server's
    own, which is ""."""

    picture: Image.Image
    instruction: str
    seed: int = 0
    steps: int | None = None
    references: tuple[Image.Image, ...] = ()
    keep_resolution: bool = False
    run: str = ""


@dataclass
class Waiting:
    """A request in the queue: when it is too late to begin it (monotonic seconds), and its result to come."""

    request: EditRequest
    too_late: float
    result: Future[Image.Image] = field(default_factory=Future)


class EditQueue:
    """At most `most_waiting` requests, each begun within `seconds` or not at all. `open_editor` is called once, in the
    thread that edits, and `open_run` with the `run` of each batch that names one. `on_batch` is told the size and the
    seconds of each batch.

    Use `submit` from any thread. A request whose future is cancelled before its batch begins is never edited.
    """

    def __init__(
        self,
        open_editor: Callable[[], Editor],
        most_waiting: int = 64,
        seconds: float = 120.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
        open_run: Callable[[str], Editor] | None = None,
    ) -> None:
        self.most_waiting, self.seconds, self.on_batch = most_waiting, seconds, on_batch
        self._open_editor, self._open_run = open_editor, open_run
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._is_draining = False
        self.editor: Future[Editor] = Future()
        self._thread = threading.Thread(target=self._run, name="editor", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def most_references(self) -> int:
        """How many further references the editor takes; the editor must be open."""
        return self.editor.result().family.most_references - 1

    @property
    def is_draining(self) -> bool:
        """Whether `close` has been called."""
        return self._is_draining

    def submit(self, request: EditRequest) -> Future[Image.Image]:
        """The edited picture to come; the future fails with `TooLate`, or with what the editor raised.

        Raises:
            QueueFull, Draining: the request is not taken.
        """
        with self._changed:
            if self._is_draining:
                raise Draining
            if len(self._waiting) >= self.most_waiting:
                raise QueueFull
            waiting = Waiting(request, time.monotonic() + self.seconds)
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.result

    def close(self, seconds: float | None = None) -> None:
        """Take no further request, edit those that wait, and end the thread; return after `seconds` at most."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            editor = self._open_editor()
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait for the editor are told
            self.editor.set_exception(error)
            return
        self.editor.set_result(editor)
        while (batch := self._next_batch()) is not None:
            begun = time.monotonic()
            if batch:
                self._edit_with_its_editor(editor, batch)
                self.on_batch(len(batch), time.monotonic() - begun)

    def _edit_with_its_editor(self, own: Editor, batch: Sequence[Waiting]) -> None:
        """Edit a batch with the editor that its requests name, `own` if they name none."""
        try:
            run = batch[0].request.run
            editor = self._open_run(run) if self._open_run and run else own
        except Exception as error:  # noqa: BLE001 - the server stays up, and the client is told
            for waiting in batch:
                waiting.result.set_exception(error)
        else:
            _edit_batch(editor, batch)

    def _next_batch(self) -> list[Waiting] | None:
        """The oldest request and those that fit into one batch with it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_draining)
            if not self._waiting:
                return None
            first = self._waiting[0].request
            chosen: list[Waiting] = []
            rest = deque[Waiting]()
            for waiting in self._waiting:
                fits = len(chosen) < BATCH_ITEMS and _fits(waiting.request, first)
                (chosen if fits else rest).append(waiting)
            self._waiting = rest
        return list(_begin(chosen))


def _fits(request: EditRequest, other: EditRequest) -> bool:
    """Whether one call of the editor can make both. References are those of all pictures of a call, so requests with
    references are edited alone."""
    if request.references or other.references:
        return request is other
    return (request.run, request.steps, request.keep_resolution) == (other.run, other.steps, other.keep_resolution)


def _begin(chosen: Sequence[Waiting]) -> Iterator[Waiting]:
    """Those that still want a result and are not too late; from now on they cannot be cancelled."""
    now = time.monotonic()
    for waiting in chosen:
        if waiting.result.set_running_or_notify_cancel():
            if now > waiting.too_late:
                waiting.result.set_exception(TooLate())
            else:
                yield waiting


def _edit_batch(editor: Editor, batch: Sequence[Waiting]) -> None:
    """Set the result of each; if the batch fails, each is tried alone, so that one bad request fails alone."""
    try:
        for waiting, picture in zip(batch, _edit(editor, batch), strict=True):
            waiting.result.set_result(picture)
    except Exception as error:  # noqa: BLE001 - the server stays up, and the client is told
        left = [waiting for waiting in batch if not waiting.result.done()]
        if len(batch) == 1 or not _is_one_requests_fault(error):
            for waiting in left:
                waiting.result.set_exception(error)
            return
        for waiting in left:
            _edit_batch(editor, [waiting])


def _is_one_requests_fault(error: Exception) -> bool:
    return isinstance(error, UserError | ValueError)


def _edit(editor: Editor, batch: Sequence[Waiting]) -> Iterator[Image.Image]:
    requests = [waiting.request for waiting in batch]
    first = requests[0]
    yield from editor.edit_each(
        (r.picture for r in requests), [r.instruction for r in requests], [r.seed for r in requests], first.steps,
        first.references, _keep_unchanged if first.keep_resolution else scale_back,
    )  # fmt: skip


def _keep_unchanged(original: Image.Image, reference: Tensor, edited: Tensor) -> Image.Image:
    picture, _ = keep_unchanged(original, reference, edited)
    return picture
