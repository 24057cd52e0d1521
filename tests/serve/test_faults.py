"""What clients and `/metrics` see when the editor fails or the queue is full. The app runs in this process."""

import asyncio
import io
import threading

import httpx
import pytest
from PIL import Image

import npedit
from npedit.serve.api import ServerSettings, make_app
from npedit.serve.queue import EditQueue


def picture():
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(out, "PNG")
    return out.getvalue()


def call(app, *requests):
    """The answers to requests (method, path, further arguments), one after the other."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def editor():
    return npedit.Editor.open()


def test_a_fault_of_the_editor_is_counted_and_its_words_are_not_shown(editor, monkeypatch):
    def fail(*_):
        raise RuntimeError("no room in folder alice")

    monkeypatch.setattr(editor, "edit_tensor", fail)
    queue = EditQueue(lambda: editor)
    edit = ("POST", "/v1/edits", {"files": {"image": picture()}, "data": {"instruction": "x"}})
    failed, figures = call(make_app(queue, ServerSettings()), edit, ("GET", "/metrics", {}))
    queue.close()
    assert failed.status_code == 500 and "RuntimeError" in failed.text and "alice" not in failed.text
    assert 'npedit_requests_total{path="/v1/edits",status="500"} 1.0' in figures.text


def test_a_request_for_more_results_than_fit_leaves_none_in_the_queue(editor):
    gate, sizes = threading.Event(), []

    def open_editor():
        gate.wait(30)
        return editor

    queue = EditQueue(open_editor, most_waiting=2)
    app = make_app(queue, ServerSettings())
    queue.on_batch = lambda size, _: sizes.append(size)
    several = {"files": {"image": picture()}, "data": {"prompt": "x", "n": "3"}}
    (refused,) = call(app, ("POST", "/v1/images/edits", several))
    gate.set()
    queue.close()
    assert refused.status_code == 429 and refused.headers["retry-after"]
    assert not sizes
