"""One edit of the page: from what the browser sent to a turn of the visitor's session."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.errors import UserError
from npedit.provenance import editor_name
from npedit.serve.api import MOST_SEED, ServerSettings
from npedit.serve.limits import Limits, read_instruction, read_int, read_picture
from npedit.serve.pictures import encode_picture
from npedit.serve.queue import EditQueue, EditRequest
from npedit.serve.runs import Runs
from npedit.serve.session import Result, Turn
from npedit.serve.verdict import CriticQueue, Verdict

MOST_RESULTS = 4


@dataclass(frozen=True)
class PageParts:
    """What the page needs: the queue, the server's settings, a folder for pictures, the critic (None: no verdicts),
    whether the editor is one of the toy world, whose examples are offered, and the runs to choose from (None: none)."""

    queue: EditQueue
    settings: ServerSettings
    folder: Path
    critic: CriticQueue | None
    is_toy: bool
    runs: Runs | None


async def make_turn(
    parts: PageParts, run: Any, photo: Any, instruction: Any, seed: Any, count: Any, keep: Any, ask: Any
) -> Turn:
    """Edit the visitor's picture. The values are what the browser sent.

    Raises:
        UserError, QueueFull, TooLate, Draining: it cannot be edited.
    """
    limits = parts.settings.limits
    results = read_int(_digits(count), "Number of seeds", 1, 1, min(MOST_RESULTS, limits.results)) or 1
    picture = await asyncio.to_thread(_read_upload, photo, limits, results)
    text = read_instruction(str(instruction or ""), limits, "Instruction")
    first = read_int(_digits(seed), "First seed", 0, 0, MOST_SEED - results) or 0
    request = EditRequest(picture, text, first, keep_resolution=bool(keep), run=_check_run(parts.runs, run))
    edited = await _edited(parts.queue, [replace(request, seed=first + i) for i in range(results)])
    verdicts = await asyncio.to_thread(_verdicts, parts, request, edited) if ask else [None] * results
    before, *files = await asyncio.to_thread(_write_pictures, parts, request, edited)
    made = [Result(file, first + i, verdict) for i, (file, verdict) in enumerate(zip(files, verdicts, strict=True))]
    return Turn(before, text, tuple(made))


def _read_upload(photo: Any, limits: Limits, results: int) -> Image.Image:
    """The picture that a visitor uploaded. Gradio has checked that its file is one of the page's own."""
    path = photo.get("path") if isinstance(photo, dict) else None
    if not path:
        raise UserError("expected a picture; got none; drop one on the field 'Picture'")
    try:
        data = Path(path).read_bytes()
    except OSError:
        raise UserError("expected the picture's file; it is no longer kept; drop the picture again") from None
    return read_picture(data, limits, "Picture", results)


def _digits(value: Any) -> str:
    """A number that JSON may have made a float, as the text of a form's field."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str("" if value is None else value)


async def _edited(queue: EditQueue, wanted: Sequence[EditRequest]) -> list[Image.Image]:
    """The edited pictures. If one is refused, or the visitor goes away, those not begun are not edited."""
    results: list[Future[Image.Image]] = []
    try:
        for request in wanted:
            results.append(queue.submit(request))
        return list(await asyncio.gather(*(asyncio.wrap_future(result) for result in results)))
    finally:
        for result in results:
            result.cancel()


def _check_run(runs: Runs | None, name: Any) -> str:
    """The name of the run whose editor is asked for; "" without a choice.

    Raises:
        UserError: there is no such run.
    """
    if runs is None:
        return ""
    runs.find(name)
    return str(name)


def _verdicts(parts: PageParts, request: EditRequest, edited: Sequence[Image.Image]) -> Sequence[Verdict | None]:
    """The critic's verdicts; None for each without a critic."""
    critic = parts.runs.critic(request.run) if parts.runs else parts.critic
    if critic is None:
        return [None] * len(edited)
    sizes = parts.runs.sizes[request.run] if parts.runs else parts.queue.editor.result().sizes
    return critic.ask(request.picture, edited, request.instruction, sizes)


def _write_pictures(parts: PageParts, request: EditRequest, edited: Sequence[Image.Image]) -> list[str]:
    """Write the visitor's picture and its edits as PNG files of the page; only the edits have metadata of an edit."""
    own = io.BytesIO()
    request.picture.save(own, "PNG", compress_level=1)
    editor = editor_name(request.run, parts.runs.find(request.run)) if parts.runs else parts.settings.editor
    edits = (encode_picture(picture, "png", editor) for picture in edited)
    return [_write_file(parts.folder, data) for data in (own.getvalue(), *edits)]


def _write_file(folder: Path, data: bytes) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, prefix="npedit-", suffix=".png", delete=False) as file:
        file.write(data)
    return file.name
