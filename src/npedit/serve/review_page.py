"""The page on which a person reviews a set, row by row (Gradio)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from fastapi import FastAPI

from npedit.data._metadata import resolve_photo_path
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.questions import EDIT_TYPES
from npedit.serve.local_page import HIDDEN, make_local_app, message_html, picture_html, progress_html
from npedit.serve.review_set import FIELDS, REJECTED_STATE, Entry, ReviewSet, describe_progress

MOST_SIDE = 1024  # of the shown photo, in pixels
KEYS = {"a": "accept", "e": "instruction", "r": "reason", "ArrowLeft": "previous", "ArrowRight": "next"}
HELP = (
    "<kbd>a</kbd> accept (with your changes) · <kbd>e</kbd> edit the fields, <kbd>Esc</kbd> leaves them · "
    "<kbd>r</kbd> reason, <kbd>Enter</kbd> rejects · <kbd>←</kbd> <kbd>→</kbd> other rows. "
    "<kbd>a</kbd> on a rejected row takes it back."
)
LABELS = {
    "instruction": "Instruction",
    "edit_type": "Edit type",
    "object": "Object",
    "source_caption": "Caption of the photo",
    "target_caption": "Caption of the wanted result",
    "questions": "Questions, one a line: yes | QUESTION, or yes, both | QUESTION about both pictures",
}
ALL_SEEN = "All rows are seen."


def make_review_app(review: ReviewSet) -> FastAPI:
    """The app of the page."""
    return make_local_app(make_review_page(review), KEYS)


def make_review_page(review: ReviewSet) -> gr.Blocks:
    """The page, not mounted yet."""
    title = f"npedit: review of {review.folder.name}"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
        state = gr.State(None)
        progress = gr.HTML()
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                photo, message = gr.HTML(), gr.HTML(message_html(""))
                buttons = _add_buttons()
                gr.HTML(HELP)
            with gr.Column(scale=2, min_width=320):
                fields = [_field(name) for name in FIELDS]
                reason = gr.Textbox(
                    label="Reason for a rejection", max_lines=1, elem_id="reason", elem_classes="submits"
                )
        _connect(blocks, Page(review), state, [progress, message, photo, *fields, reason], buttons)
    return blocks


def _field(name: str) -> Any:
    if name == "edit_type":
        return gr.Dropdown(list(EDIT_TYPES), label=LABELS[name], allow_custom_value=True, elem_id=name)
    return gr.Textbox(label=LABELS[name], lines=2 if name == "questions" else 1, max_lines=6, elem_id=name)


def _add_buttons() -> dict[str, gr.Button]:
    with gr.Row():
        return {
            "previous": gr.Button("←", min_width=60, elem_id="previous"),
            "accept": gr.Button("Accept", variant="primary", min_width=80, elem_id="accept"),
            "reject": gr.Button("Reject", variant="stop", min_width=80, elem_id="reject"),
            "next": gr.Button("→", min_width=60, elem_id="next"),
        }


def _connect(blocks: gr.Blocks, page: Page, state: gr.State, shown: list[Any], buttons: dict[str, gr.Button]) -> None:
    fields, reason = shown[3:-1], shown[-1]
    outputs = [state, *shown]
    once: dict[str, Any] = {**HIDDEN, "trigger_mode": "once"}
    blocks.load(page.begin, None, outputs, **HIDDEN)
    buttons["accept"].click(page.accept, [state, *fields], outputs, **once)
    for begin in (buttons["reject"].click, reason.submit):
        begin(page.reject, [state, reason], outputs, **once)
    buttons["previous"].click(lambda state: page.move(state, -1), state, outputs, **once)
    buttons["next"].click(lambda state: page.move(state, 1), state, outputs, **once)


class Page:
    """What the page's events do. A page's state is {"id": of the row that is shown, "shown": its fields}, or None
    before anything is shown; each event returns a new state and the values of the components."""

    def __init__(self, review: ReviewSet):
        self.review = review

    def begin(self) -> list[Any]:
        """Show the first row that nobody has seen."""
        return self._next(-1)

    def move(self, state: dict[str, Any] | None, by: int) -> list[Any]:
        """Show the row before or behind."""
        if state is None:
            return self.begin()
        return self._show((self.review.position(state["id"]) + by) % len(self.review))

    def accept(self, state: dict[str, Any] | None, *texts: str | None) -> list[Any]:
        """Accept the row with the changes in its fields, and show the next one."""
        given = dict(zip(FIELDS, [text or "" for text in texts], strict=True))
        return self._decide(state, lambda shown: self.review.accept(shown["id"], shown["shown"], given))

    def reject(self, state: dict[str, Any] | None, reason: str | None) -> list[Any]:
        """Reject the row, and show the next one."""
        return self._decide(state, lambda shown: self.review.reject(shown["id"], reason or ""))

    def _decide(self, state: dict[str, Any] | None, decide: Callable[[dict[str, Any]], object]) -> list[Any]:
        if state is None:  # the page is older than the server
            return self.begin()
        try:
            decide(state)
        except UserError as error:
            return [gr.skip(), gr.skip(), message_html(str(error)), *[gr.skip()] * (len(FIELDS) + 2)]
        return self._next(self.review.position(state["id"]))

    def _next(self, after: int) -> list[Any]:
        number = self.review.next_unseen(after)
        return self._show(max(after, 0), ALL_SEEN) if number is None else self._show(number)

    def _show(self, number: int, words: str = "") -> list[Any]:
        entry, counts = self.review.entries[number], self.review.counts()
        about = f"Row {number + 1} of {len(self.review)}, {entry.id}: {entry.state or 'not seen'}"
        words = f"{words} Rejected: {entry.reason}" if entry.state == REJECTED_STATE else words
        progress = progress_html(counts["seen"], counts["rows"], f"{about}. {describe_progress(counts)}.")
        fields = entry.fields()
        state = {"id": entry.id, "shown": fields}
        return [state, progress, message_html(words.strip()), self._photo(entry), *fields.values(), ""]

    def _photo(self, entry: Entry) -> str:
        try:
            photo = read_photo(resolve_photo_path(self.review.folder, entry.values["file_name"]))
        except (BadImage, OSError, ValueError) as error:
            return message_html(f"The photo cannot be shown: {error}")
        return picture_html(photo, str(entry.values.get("original_name", "")), MOST_SIDE, "JPEG")
