"""What the pages for one person at this machine share: the app, pictures inside the page, keys for its buttons."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from npedit.serve.access import LOCAL_HOSTS
from npedit.serve.page_headers import PageHeaders
from npedit.serve.remote_files import refuse_remote_files

FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the reader's own fonts
THEME = gr.themes.Default(primary_hue="indigo", font=FONT, font_mono=MONO)
STYLE = """
.shown { margin: 0; text-align: center; }
.shown img { width: 100%; max-height: 66vh; object-fit: contain; background: #8881; }
.bar, .bar div { height: 6px; border-radius: 3px; background: #8883; }
.bar div { background: #4f46e5; }
kbd { border: 1px solid #8888; border-radius: 3px; padding: 0 4px; }
"""
SCRIPT = """<script>
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (typing && event.key === "Escape") { event.target.blur(); return; }
  if (typing && event.key === "Enter" && event.target.closest(".submits")) setTimeout(() => event.target.blur());
  const target = KEYS[event.key];
  if (typing || !target || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const found = document.getElementById(target);
  if (!found) return;
  event.preventDefault();
  const field = found.querySelector("textarea, input");
  if (field) field.focus(); else found.click();
});
</script>"""
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # arguments of all events


def make_local_app(blocks: gr.Blocks, keys: Mapping[str, str]) -> FastAPI:
    """An app with a page at "/", for browsers on this machine. `keys` maps a key to the element (by its id) that the
    key clicks, or focuses if the element is a field. Enter leaves a field of the class "submits"."""
    app = FastAPI(openapi_url=None)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False,
        theme=THEME, css=STYLE, head=SCRIPT.replace("KEYS", json.dumps(dict(keys))),
    )  # fmt: skip
    app.state.page = refuse_remote_files(app)
    app.add_middleware(PageHeaders)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_HOSTS), www_redirect=False)
    return app


def picture_html(picture: Image.Image, words: str, most_side: int, kind: str = "PNG") -> str:
    """A picture inside the page, with `words` below. The picture has no name and no address, and its file no metadata.
    `most_side` is the longest side in pixels; larger pictures are scaled down."""
    shown = picture.convert("RGB")
    shown.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
    shown.info = {}
    buffer = io.BytesIO()
    shown.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    words = escape(words)
    return (
        f'<figure class="shown"><img alt="{words}" src="data:image/{kind.lower()};base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def progress_html(done: int, total: int, words: str) -> str:
    """A bar, and words below."""
    share = 100 * done / max(1, total)
    return f'<div class="bar"><div style="width: {share:.1f}%"></div></div><p id="progress">{escape(words)}</p>'


def message_html(words: str) -> str:
    """A message to the person; "" shows nothing."""
    return f'<p id="message"><b>{escape(words)}</b></p>' if words else '<p id="message"></p>'
