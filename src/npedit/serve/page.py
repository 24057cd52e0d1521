"""The page at "/": edit a picture in a browser, compare results, undo, and edit a result further (Gradio).

Each edit goes through the server's `EditQueue`, so the limits of the HTTP interface hold here too. The page loads
nothing from other servers.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from starlette.routing import Mount

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.serve.api import MOST_SEED, ServerSettings
from npedit.serve.examples import write_examples
from npedit.serve.limits import Limits, read_instruction, read_int, read_picture
from npedit.serve.page_headers import PageHeaders
from npedit.serve.pictures import encode_picture
from npedit.serve.queue import EditQueue, EditRequest, words_for
from npedit.serve.session import Result, Session, Turn
from npedit.serve.verdict import CriticQueue, Verdict

log = logging.getLogger(__name__)

MOST_RESULTS = 4
KEPT_SECONDS = 6 * 3600  # how long the page's files stay on disk
LOOKS_EVERY = 600  # seconds between two looks for older files
FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the reader's own fonts
GALLERY: dict[str, Any] = {
    "height": "auto", "allow_preview": False, "interactive": False, "fit_columns": False, "object_fit": "contain",
    "buttons": [],
}  # fmt: skip
CSS = """
#results .grid-wrap, #history .grid-wrap { height: auto; min-height: 8rem; padding-top: 2.2rem; overflow: auto; }
#results .caption-label, #history .caption-label {
  inset: auto 0 0 0; max-width: none; white-space: normal; font-size: 0.7rem; line-height: 1.2; text-align: center;
}
#history .caption-label { max-height: 2.9rem; overflow: hidden; }
"""  # captions in full, and no room for pictures that are not there
THEME = gr.themes.Default(primary_hue="indigo", font=FONT, font_mono=MONO)


@dataclass(frozen=True)
class PageParts:
    """What the page needs: the queue, the server's settings, the critic (None: no verdicts), a folder for pictures, and
    whether the editor is one of the toy world, whose examples are offered."""

    queue: EditQueue
    settings: ServerSettings
    critic: CriticQueue | None
    folder: Path
    is_toy: bool


def add_page(app: FastAPI, critic: CriticQueue | None, is_toy: bool) -> None:
    """Add the page to an app of `make_app`. With a token the page asks for it, as a password."""
    queue, settings = app.state.queue, app.state.settings
    app.state.page_folder = tempfile.TemporaryDirectory(prefix="npedit-serve-")  # deleted when the process ends
    folder = Path(app.state.page_folder.name).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio keeps uploads and serves files from
    blocks = make_page(PageParts(queue, settings, critic, folder, is_toy))
    gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False,
        max_file_size=settings.limits.bytes, theme=THEME, css=CSS, auth=_check_token(settings.token),
        auth_message="Any user name will do. The password is the server's token.",
    )  # fmt: skip
    app.state.page = next(route.app for route in reversed(app.routes) if isinstance(route, Mount))
    app.add_middleware(PageHeaders)


def _check_token(token: str) -> Any:
    """The test of a login; None without a token."""
    if not token:
        return None
    return lambda _, password: secrets.compare_digest(password.strip().encode(), token.encode())


def stop_page(app: FastAPI) -> None:
    """Close the connections that open pages hold, so that the server can stop. Call it in the server's event loop."""
    app.state.page.stop_event.set()


# -------------------------------------------------------------------------------------------------------- the layout


def make_page(parts: PageParts) -> gr.Blocks:
    """The page, not mounted yet."""
    title = f"npedit: {parts.settings.name}"
    blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(LOOKS_EVERY, KEPT_SECONDS))
    with blocks:
        session = gr.State(Session())
        gr.Markdown(f"## npedit\nEditor: `{parts.settings.name}`. For programs: [/openapi.json](/openapi.json).")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                asked = _add_inputs(parts)
            with gr.Column(scale=3, min_width=320):
                shown = _add_outputs()
        _connect(parts, session, asked, shown)
    return blocks.queue(default_concurrency_limit=None, max_size=parts.queue.most_waiting, api_open=False)


@dataclass(frozen=True)
class Inputs:
    """The components that say what to edit."""

    photo: gr.Image
    instruction: gr.Textbox
    seed: gr.Number
    count: gr.Slider
    keep_resolution: gr.Checkbox
    ask_critic: gr.Checkbox
    edit: gr.Button


@dataclass(frozen=True)
class Outputs:
    """The components that show a session."""

    slider: gr.ImageSlider
    caption: gr.Markdown
    results: gr.Gallery
    further: gr.Button
    undo: gr.Button
    download: gr.DownloadButton
    history: gr.Gallery

    def as_list(self) -> list[Any]:
        """The components in the order of `_show`."""
        return [self.slider, self.caption, self.results, self.further, self.undo, self.download, self.history]


def _add_inputs(parts: PageParts) -> Inputs:
    most = min(MOST_RESULTS, parts.settings.limits.results)
    photo = gr.Image(
        label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=340, elem_id="photo"
    )
    instruction = gr.Textbox(
        label="Instruction", placeholder="what to change", lines=2, max_lines=4, elem_id="instruction"
    )
    with gr.Row():
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        count = gr.Slider(1, most, 1, step=1, label="Number of seeds", min_width=160, elem_id="count")
    keep = gr.Checkbox(False, label="Keep the full resolution of what did not change", elem_id="keep")
    has_critic = parts.critic is not None
    ask_critic = gr.Checkbox(has_critic, label="Ask the critic about each result", visible=has_critic, elem_id="critic")
    edit = gr.Button("Edit", variant="primary", elem_id="edit")
    if parts.is_toy:
        rows = write_examples(parts.folder)
        gr.Examples(rows, [photo, instruction], label="Examples", cache_examples=False, api_visibility="private")
    return Inputs(photo, instruction, seed, count, keep, ask_critic, edit)


def _add_outputs() -> Outputs:
    slider = gr.ImageSlider(label="Before and after", interactive=False, max_height=420, elem_id="slider")
    caption = gr.Markdown("", elem_id="caption")
    results = gr.Gallery(label="Results (click one)", columns=4, elem_id="results", **GALLERY)
    with gr.Row():
        further = gr.Button("Edit further", interactive=False, elem_id="further")
        undo = gr.Button("Undo", interactive=False, elem_id="undo")
        download = gr.DownloadButton("Download PNG", interactive=False, elem_id="download")
    history = gr.Gallery(label="History (click one)", columns=6, elem_id="history", **GALLERY)
    return Outputs(slider, caption, results, further, undo, download, history)


def _show(session: Session) -> list[Any]:
    """The values of `Outputs`, in their order."""
    shown = session.shown
    if shown is None:
        off = gr.update(interactive=False)
        return [None, "", [], off, off, gr.update(value=None, interactive=False), []]
    turn, result = shown
    chosen = gr.update(value=[(r.file, r.caption) for r in turn.results], selected_index=session.result)
    past = [(t.results[0].file, f"{i}. {t.instruction}") for i, t in enumerate(session.turns, 1)]
    on = gr.update(interactive=True)
    download = gr.update(value=result.file, interactive=True)
    history = gr.update(value=past, selected_index=session.turn)
    return [(turn.before, result.file), _caption(turn, result), chosen, on, on, download, history]


def _caption(turn: Turn, result: Result) -> str:
    """The text below the slider. The visitor's own words are set as code, so that they are not read as Markdown."""
    words = turn.instruction.replace("`", "'").replace("\n", " ")
    verdict = f" The critic: {result.verdict}." if result.verdict else ""
    return f"`{words}` (seed {result.seed}).{verdict}"


# ---------------------------------------------------------------------------------------------------------- the events


def _connect(parts: PageParts, state: gr.State, asked: Inputs, shown: Outputs) -> None:
    """Say what each click does."""
    outputs = [state, *shown.as_list()]

    async def edit(*values: Any) -> list[Any]:
        *given, session = values
        try:
            session = session.with_turn(await _make_turn(parts, *given))
        except Exception as error:  # noqa: BLE001 - the visitor is told, without a traceback
            raise _page_error(error) from None
        return [session, *_show(session)]

    def choose(session: Session, event: gr.SelectData) -> list[Any]:
        session = session.showing(session.turn, _number(event))
        return [session, *_show(session)]

    def recall(session: Session, event: gr.SelectData) -> list[Any]:
        session = session.showing(_number(event), 0)
        return [session, *_show(session)]

    def undo(session: Session) -> list[Any]:
        if not session.turns:
            return [session, *_show(session), gr.skip(), gr.skip()]
        last, session = session.turns[-1], session.without_last_turn()
        return [session, *_show(session), last.before, last.instruction]

    def go_further(session: Session) -> list[Any]:
        return [session.shown[1].file if session.shown else gr.skip(), ""]

    given = [asked.photo, asked.instruction, asked.seed, asked.count, asked.keep_resolution, asked.ask_critic, state]
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    for begin in (asked.edit.click, asked.instruction.submit):  # raw values: `_make_turn` checks them, and not Gradio
        begin(edit, given, outputs, preprocess=False, trigger_mode="once", **hidden)
    shown.results.select(choose, state, outputs, **hidden)
    shown.history.select(recall, state, outputs, **hidden)
    shown.undo.click(undo, state, [*outputs, asked.photo, asked.instruction], **hidden)
    shown.further.click(go_further, state, [asked.photo, asked.instruction], **hidden)


def _number(event: gr.SelectData) -> int:
    return event.index if isinstance(event.index, int) else -1


def _page_error(error: Exception) -> gr.Error:
    """The message that a visitor sees. A fault of the editor is logged and not shown."""
    words = words_for(error) or (str(error) if isinstance(error, UserError) else "")
    if not words:
        log.exception("an edit of the page failed", exc_info=error)
    return gr.Error(words or f"the editor failed: {type(error).__name__}", title="Not edited", print_exception=False)


# ----------------------------------------------------------------------------------------------------------- one edit


async def _make_turn(
    parts: PageParts, photo: Any, instruction: Any, seed: Any, count: Any, keep: Any, ask: Any
) -> Turn:
    """Edit the visitor's picture. The values are what the browser sent.

    Raises:
        UserError, QueueFull, TooLate, Draining: it cannot be edited.
    """
    limits = parts.settings.limits
    picture = await asyncio.to_thread(_read_upload, photo, limits)
    text = read_instruction(str(instruction or ""), limits, "Instruction")
    results = read_int(_digits(count), "Number of seeds", 1, 1, min(MOST_RESULTS, limits.results)) or 1
    first = read_int(_digits(seed), "First seed", 0, 0, MOST_SEED - results) or 0
    request = EditRequest(picture, text, first, keep_resolution=bool(keep))
    edited = await _edited(parts.queue, [replace(request, seed=first + i) for i in range(results)])
    verdicts = await asyncio.to_thread(_verdicts, parts, picture, edited, text) if ask else [None] * results
    before, *files = await asyncio.to_thread(_write_pictures, parts, picture, edited)
    made = [Result(file, first + i, verdict) for i, (file, verdict) in enumerate(zip(files, verdicts, strict=True))]
    return Turn(before, text, tuple(made))


def _read_upload(photo: Any, limits: Limits) -> Image.Image:
    """The picture that a visitor uploaded. Gradio has checked that its file is one of the page's own."""
    path = photo.get("path") if isinstance(photo, dict) else None
    if not path:
        raise UserError("expected a picture; got none; drop one on the field 'Picture'")
    try:
        data = Path(path).read_bytes()
    except OSError:
        raise UserError("expected the picture's file; it is no longer kept; drop the picture again") from None
    return read_picture(data, limits, "Picture")


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


def _verdicts(
    parts: PageParts, before: Image.Image, edited: Sequence[Image.Image], instruction: str
) -> Sequence[Verdict | None]:
    """The critic's verdicts; None for each without a critic."""
    if parts.critic is None:
        return [None] * len(edited)
    editor: Editor = parts.queue.editor.result()
    return parts.critic.ask(before, edited, instruction, editor.sizes)


def _write_pictures(parts: PageParts, before: Image.Image, edited: Sequence[Image.Image]) -> list[str]:
    """Write the visitor's picture and its edits as PNG files of the page; only the edits have metadata of an edit."""
    own = io.BytesIO()
    before.save(own, "PNG", compress_level=1)
    edits = (encode_picture(picture, "png", parts.settings.editor) for picture in edited)
    return [_write_file(parts.folder, data) for data in (own.getvalue(), *edits)]


def _write_file(folder: Path, data: bytes) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, prefix="npedit-", suffix=".png", delete=False) as file:
        file.write(data)
    return file.name
