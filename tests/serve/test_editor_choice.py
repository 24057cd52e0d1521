"""A request names the run whose editor it wants. The app runs in this process."""

import asyncio
import base64
import io
import os

import httpx
import pytest
from PIL import Image
from served_runs import make_runs

from npedit.editor import Editor
from npedit.runs.resolve import resolve_editor
from npedit.serve.api import ServerSettings, make_app
from npedit.serve.queue import EditQueue
from npedit.serve.runs import Runs


def picture():
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(out, "PNG")
    return out.getvalue()


def call(app, *requests):
    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


def edit(**fields):
    return "POST", "/v1/edits", {"files": {"image": picture()}, "data": {"instruction": "paint it red"} | fields}


def openai_edit(**fields):
    return "POST", "/v1/images/edits", {"files": {"image": picture()}, "data": {"prompt": "paint it red"} | fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_runs(tmp_path_factory.mktemp("choice") / "runs", "one", "two")
    os.utime(made / "one" / "final", (1e9, 1e9))
    return made


@pytest.fixture
def served(folder):
    """The app of the two runs, and the folders of the editors that were opened."""
    opened = []
    runs = Runs(folder, lambda path: opened.append(path) or Editor.open(path))
    queue = EditQueue(lambda: runs.open("two"), open_run=runs.open)
    yield make_app(queue, ServerSettings("two", editor="two"), runs), opened
    queue.close(30)


def test_a_run_is_chosen_and_named_in_the_result(served, folder):
    app, opened = served
    models, first, one, other = call(app, ("GET", "/v1/models", {}), edit(), edit(run="one"), openai_edit(model="one"))
    assert [model["id"] for model in models.json()["data"]] == ["two", "one"]
    assert opened == [str(resolve_editor(folder / name).folder) for name in ("two", "one")]
    results = [first.content, one.content, base64.b64decode(other.json()["data"][0]["b64_json"])]
    pixels = [Image.open(io.BytesIO(data)).tobytes() for data in results]
    assert pixels[0] == pixels[1] == pixels[2]  # copies of one editor
    for data, name in zip(results, ("two", "one", "one"), strict=True):
        assert f">{name}<" in Image.open(io.BytesIO(data)).info["XML:com.adobe.xmp"]


@pytest.mark.parametrize("name", ["three", "../one", "one/final", "x" * 5000])
def test_an_unknown_run_gets_status_404_with_the_names(served, name):
    app, opened = served
    for answer, field in zip(call(app, edit(run=name), openai_edit(model=name)), ("run", "model"), strict=True):
        error = answer.json()["error"]
        assert answer.status_code == 404 and "two, one" in error["message"] and error["param"] == field
        assert len(answer.content) < 400
    assert len(opened) == 1


def test_a_server_of_one_editor_takes_its_own_name_only():
    queue = EditQueue(Editor.open)
    app = make_app(queue, ServerSettings())
    own, other, openais = call(app, edit(run="embedded"), edit(run="one"), openai_edit(model="gpt-image-1"))
    queue.close(30)
    assert (own.status_code, other.status_code, openais.status_code) == (200, 404, 200)
    assert "'embedded'" in other.json()["error"]["message"]
