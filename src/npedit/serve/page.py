"""The page at "/": edit a picture in a browser, compare results, undo, and edit a result further (Gradio).

Each edit goes through the server's `EditQueue`, so the limits of the HTTP interface hold here too. The page loads
nothing from other servers.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from fastapi import FastAPI

from npedit.errors import UserError
from npedit.serve.examples import write_examples
from npedit.serve.page_edit import MOST_RESULTS, PageParts, make_turn
from npedit.serve.page_headers import PageHeaders
from npedit.serve.queue import words_for
from npedit.serve.remote_files import refuse_remote_files
from npedit.serve.runs import Runs
from npedit.serve.session import Result, Session, Turn
from npedit.serve.verdict import CriticQueue

log = logging.getLogger(__name__)

KEPT_SECONDS = 6 * 3600  # how long the page's files stay on disk
LOOKS_EVERY = 600  # seconds between two looks for older files
FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the reader's own fonts
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}  # arguments of all events
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


def add_page(app: FastAPI, critic: CriticQueue | None, is_toy: bool, runs: Runs | None = None) -> None:
    """Add the page to an app of `make_app`. With a token the page asks for it, as a password."""
    queue, settings = app.state.queue, app.state.settings
    app.state.page_folder = tempfile.TemporaryDirectory(prefix="npedit-serve-")  # deleted when the process ends
    folder = Path(app.state.page_folder.name).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio keeps uploads and serves files from
    blocks = make_page(PageParts(queue, settings, folder, critic, is_toy, runs))
    gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False,
        max_file_size=settings.limits.bytes, theme=THEME, css=CSS, auth=_check_token(settings.token),
        auth_message="Any user name will do. The password is the server's token.",
    )  # fmt: skip
    app.state.page = refuse_remote_files(app)
    app.add_middleware(PageHeaders)


def _check_token(token: str) -> Any:
    """The test of a login; None without a token."""
    if not token:
        return None
    return lambda _, password: secrets.compare_digest(password.strip().encode(), token.encode())


# -------------------------------------------------------------------------------------------------------- the layout


def make_page(parts: PageParts) -> gr.Blocks:
    """The page, not mounted yet."""
    title = f"npedit: {parts.settings.name}"
    blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(LOOKS_EVERY, KEPT_SECONDS))
    with blocks:
        session = gr.State(Session())
        used = "Editor for programs" if parts.runs else "Editor"
        gr.Markdown(f"## npedit\n{used}: `{parts.settings.name}` ([/openapi.json](/openapi.json)).")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                asked = _add_inputs(parts)
            with gr.Column(scale=3, min_width=320):
                shown = _add_outputs()
        _connect(parts, session, asked, shown)
        if parts.runs:
            _add_report(parts.runs, asked.run)
    return blocks.queue(default_concurrency_limit=None, max_size=parts.queue.most_waiting, api_open=False)


@dataclass(frozen=True)
class Inputs:
    """The components that say what to edit, and with which run's editor."""

    run: gr.Dropdown
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
    run = _add_choice(parts.runs)
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
    ask_critic = gr.Checkbox(
        has_critic, label="Ask the critic about each result", visible=has_critic or parts.runs is not None,
        elem_id="critic",
    )  # fmt: skip
    edit = gr.Button("Edit", variant="primary", elem_id="edit")
    if parts.is_toy:
        rows = write_examples(parts.folder)
        gr.Examples(rows, [photo, instruction], label="Examples", cache_examples=False, api_visibility="private")
    return Inputs(run, photo, instruction, seed, count, keep, ask_critic, edit)


def _add_choice(runs: Runs | None) -> gr.Dropdown:
    """The runs to choose from; it looks again for runs and checkpoints when a visitor opens it."""
    choices = runs.choices() if runs else []
    first = choices[0][1] if choices else None
    field = gr.Dropdown(choices, value=first, label="Editor of the run", visible=runs is not None, elem_id="run")
    if runs:
        field.focus(lambda: gr.update(choices=runs.choices()), None, field, **HIDDEN)
    return field


def _add_report(runs: Runs, chosen: gr.Dropdown) -> None:
    """A button that shows the chosen run's report, as of now, in a frame without scripts."""
    button = gr.Button("Show this run's report", elem_id="show-report")
    place = gr.HTML(elem_id="report")

    def show(name: Any) -> str:
        try:
            page = runs.report(name)
        except Exception as error:  # noqa: BLE001 - the visitor is told, without a traceback
            raise _page_error(error) from None
        style = "width: 100%; height: 80vh; border: 1px solid #8888;"
        return f'<iframe sandbox="" title="report" style="{style}" srcdoc="{escape(page)}"></iframe>'

    button.click(show, chosen, place, preprocess=False, **HIDDEN)


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
            session = session.with_turn(await make_turn(parts, *given))
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

    given = [
        asked.run,
        asked.photo,
        asked.instruction,
        asked.seed,
        asked.count,
        asked.keep_resolution,
        asked.ask_critic,
        state,
    ]
    for begin in (asked.edit.click, asked.instruction.submit):  # raw values: `make_turn` checks them, and not Gradio
        begin(edit, given, outputs, preprocess=False, trigger_mode="once", **HIDDEN)
    shown.results.select(choose, state, outputs, **HIDDEN)
    shown.history.select(recall, state, outputs, **HIDDEN)
    shown.undo.click(undo, state, [*outputs, asked.photo, asked.instruction], **HIDDEN)
    shown.further.click(go_further, state, [asked.photo, asked.instruction], **HIDDEN)


def _number(event: gr.SelectData) -> int:
    return event.index if isinstance(event.index, int) else -1


def _page_error(error: Exception) -> gr.Error:
    """The message that a visitor sees. A fault of the editor is logged and not shown."""
    words = words_for(error) or (str(error) if isinstance(error, UserError) else "")
    if not words:
        log.exception("an edit of the page failed", exc_info=error)
    return gr.Error(words or f"the editor failed: {type(error).__name__}", title="Not edited", print_exception=False)
