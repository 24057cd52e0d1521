"""A request that names a URL as an upload is refused, and nothing is fetched, whichever way Gradio would fetch it."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gradio as gr
import httpx
import pytest
import safehttpx
from fastapi import FastAPI

from npedit.serve.remote_files import has_remote_file, refuse_remote_files

META = {"_type": "gradio.FileData"}


@pytest.fixture
def other():
    """Another server; it notes what was fetched from it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            made.fetched.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.fetched = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def all_public(monkeypatch):
    """Gradio refuses private addresses itself. Here they count as public ones, as there is no network."""
    monkeypatch.setattr(safehttpx, "is_public_ip", lambda ip: True)


def page_app(is_guarded):
    """A page that opens what it is sent."""
    with gr.Blocks() as blocks:
        photo, text = gr.Image(type="filepath"), gr.Textbox()
        photo.change(lambda photo, text: text, [photo, text], text)
    app = FastAPI()
    gr.mount_gradio_app(app, blocks, "/", ssr_mode=False, mcp_server=False)
    if is_guarded:
        assert refuse_remote_files(app).get_blocks() is blocks
    return app


def send(app, *requests):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


def fetching_requests(url):
    """Requests that make Gradio fetch a URL."""
    photo = {"path": url, "orig_name": "a.png", "meta": META}
    event = {"data": [photo, "x"], "fn_index": 0, "session_hash": "abc"}
    return {
        "run": ("POST", "/gradio_api/run/predict", {"json": event}),
        "text field": ("POST", "/gradio_api/run/predict", {"json": event | {"data": [None, {"a": [photo]}]}}),
        "other encoding": ("POST", "/gradio_api/run/predict", {
            "content": json.dumps(event).encode("utf-16"), "headers": {"content-type": "application/json"},
        }),
        "file path": ("GET", f"/gradio_api/file={url}", {}),
        "head": ("HEAD", f"/gradio_api/file={url}", {}),
        "encoded path": ("GET", f"/gradio_api/file%3D{url.replace(':', '%3a')}", {}),
        "older path": ("GET", f"/gradio_api/file/{url}", {}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", fetching_requests(""))
def test_a_url_is_never_fetched(other, all_public, kind):
    url = f"http://127.0.0.1:{other.server_address[1]}/x.png"
    request = fetching_requests(url)[kind]
    (refused,) = send(page_app(is_guarded=True), request)
    assert refused.status_code == 400 and other.fetched == []


@pytest.mark.parametrize("kind", ["run", "file path"])
def test_gradio_alone_fetches_it(other, all_public, kind):
    """Where this fails, Gradio has changed, and `remote_files.py` may no longer be needed."""
    url = f"http://127.0.0.1:{other.server_address[1]}/x.png"
    send(page_app(is_guarded=False), fetching_requests(url)[kind])
    assert other.fetched == ["/x.png"]


def test_other_requests_pass():
    event = {"data": [None, "make it http://example.org/a.png"], "fn_index": 0, "session_hash": "abc"}
    page, answer, empty = send(
        page_app(is_guarded=True), ("GET", "/", {}), ("POST", "/gradio_api/run/predict", {"json": event}),
        ("POST", "/gradio_api/queue/join", {"content": b""}),
    )  # fmt: skip
    assert page.status_code == 200 and answer.json()["data"] == [event["data"][1]] and empty.status_code == 422


def test_what_counts_as_a_remote_file():
    deep = b'{"data":' + b"[" * 200 + b"]" * 200 + b"}"
    remote = [{"path": "http://a/x"}, {"data": [{"b": {"path": "HTTPS://a", "meta": META}}]}, [{"path": " https://a"}]]
    local = [{"path": "/tmp/a.png", "url": "http://127.0.0.1/gradio_api/file=/tmp/a.png"}, ["http://a"], 3, {"path": 1}]
    assert all(has_remote_file(json.dumps(one).encode()) for one in remote) and has_remote_file(b"[" * 200_000)
    assert not any(has_remote_file(json.dumps(one).encode()) for one in local)
    assert not has_remote_file(b"\xff") and not has_remote_file(deep)
