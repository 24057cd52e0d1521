"""The page on which people compare two editors' results without knowing which is which (Gradio).

Pictures are inside the page as data. They have no names and no addresses, and nothing that their files say is sent.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from fastapi import FastAPI

from npedit.errors import UserError
from npedit.serve.local_page import HIDDEN, make_local_app, message_html, picture_html, progress_html
from npedit.serve.people import ANSWERS, LEFT, RIGHT, TIE, Comparison, Presentation, clean_name

MOST_SIDE = 1536  # of the shown pictures, in pixels
KEYS = {"ArrowLeft": LEFT, "ArrowRight": RIGHT, "ArrowDown": TIE, "u": "back"}
WORDS = {LEFT: "← Left is better", TIE: "↓ Equally good", RIGHT: "Right is better →"}
HELP = (
    "Which result does better what the instruction says, and leaves the rest of the photo as it is? "
    "<kbd>←</kbd> left · <kbd>→</kbd> right · <kbd>↓</kbd> equally good · <kbd>u</kbd> back to the item before. "
    "You can stop at any time, and go on later under the same name."
)
ALL_DONE = "All items are answered. Thank you."
State = dict[str, Any]


def make_people_app(comparison: Comparison) -> FastAPI:
    """The app of the page."""
    return make_local_app(make_people_page(comparison), KEYS)


def make_people_page(comparison: Comparison) -> gr.Blocks:
    """The page, not mounted yet."""
    with gr.Blocks(title="npedit: compare pictures", analytics_enabled=False, fill_width=True) as blocks:
        state, message = gr.State(None), gr.HTML(message_html(""))
        with gr.Column() as start:
            name = gr.Textbox(label="Your name", max_lines=1, elem_id="rater", elem_classes="submits")
            begin = gr.Button("Begin", variant="primary", elem_id="begin")
        with gr.Column(visible=False) as rating:
            progress, instruction = gr.HTML(), gr.HTML()
            with gr.Row():
                pictures = [gr.HTML(min_width=160) for _ in range(3)]
            with gr.Row():
                buttons = {answer: gr.Button(WORDS[answer], elem_id=answer) for answer in (LEFT, TIE, RIGHT)}
                buttons["back"] = gr.Button("Back", elem_id="back", min_width=60)
        gr.HTML(HELP)
        outputs = [state, message, start, rating, progress, instruction, *pictures]
        _connect(Page(comparison), (name, begin), buttons, outputs)
    return blocks


def _connect(page: Page, start: tuple[Any, Any], buttons: dict[str, gr.Button], outputs: list[Any]) -> None:
    state, (name, begin) = outputs[0], start
    once: dict[str, Any] = {**HIDDEN, "trigger_mode": "once"}
    for event in (begin.click, name.submit):
        event(page.begin, name, outputs, **once)
    for answer in ANSWERS:
        buttons[answer].click(page.answering(answer), state, outputs, **once)
    buttons["back"].click(page.back, state, outputs, **once)


class Page:
    """What the page's events do. A page's state is {"rater", "number": of the item that is shown}, or None before the
    rater has given a name; each event returns a new state and the values of the components."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison

    def begin(self, name: str | None) -> list[Any]:
        """Show a rater's first item without an answer."""
        try:
            rater = clean_name(name or "")
        except UserError as error:
            return self._start(str(error))
        return self._show(rater, self.comparison.next(rater))

    def answering(self, answer: str) -> Any:
        """The event that keeps an answer about the shown item, and shows the next one."""

        def keep(state: State | None) -> list[Any]:
            shown = self._shown(state)
            if state is None or shown is None:
                return self._start("") if state is None else self._show(state["rater"], None)
            try:
                self.comparison.record(state["rater"], shown, answer)
            except UserError as error:
                return [gr.skip(), message_html(str(error)), *[gr.skip()] * 7]
            return self._show(state["rater"], self.comparison.next(state["rater"]))

        return keep

    def back(self, state: State | None) -> list[Any]:
        """Show the item before, so that it can be answered again."""
        if state is None:
            return self._start("")
        shown = self.comparison.before(state["rater"], state["number"])
        return self._show(state["rater"], shown or self._shown(state))

    def _shown(self, state: State | None) -> Presentation | None:
        if state is None or state["number"] is None:
            return None
        return next(s for s in self.comparison.order(state["rater"]) if s.number == state["number"])

    def _start(self, words: str) -> list[Any]:
        show, hide = gr.update(visible=True), gr.update(visible=False)
        return [None, message_html(words), show, hide, *[""] * 5]

    def _show(self, rater: str, shown: Presentation | None) -> list[Any]:
        """The values of the components for an item; None: all are answered."""
        done, total = self.comparison.done(rater), len(self.comparison.order(rater))
        progress = progress_html(done, total, f"{rater}: {done} of {total} items answered")
        hide, show = gr.update(visible=False), gr.update(visible=True)
        state = {"rater": rater, "number": shown.number if shown else None}
        if shown is None:
            return [state, message_html(ALL_DONE), hide, show, progress, *[""] * 4]
        reference, *edited = shown.pair.pictures()
        left, right = edited[::-1] if shown.swapped else edited
        words = (("Photo", reference), ("Left", left), ("Right", right))
        pictures = [picture_html(picture, title, MOST_SIDE) for title, picture in words]
        instruction = f'<h3 id="instruction">{escape(shown.pair.instruction)}</h3>'
        return [state, message_html(""), hide, show, progress, instruction, *pictures]
