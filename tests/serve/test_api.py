"""The HTTP interface of `npedit serve`, against a real server with the embedded editor."""

import base64
import io
import random
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import npedit
from npedit.benchmarks import toy
from npedit.data._photos import to_pil
from npedit.toy.world import render


def scene(seed=0):
    (tensor,) = render([toy.sample_items(seed + 1)[seed].reference])
    return to_pil(tensor)


def file_of(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)


def count(client, name, **labels):
    """The sum of a counter over the label values that are not given."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for f in families for s in f.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def test_an_edit_equals_the_editors_own(client):
    photo, editor = scene(), npedit.Editor.open()
    sent = {"instruction": "paint the circle red", "seed": "7", "steps": "2"}
    answer = client.post("/v1/edits", files={"image": file_of(photo)}, data=sent)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    (own,) = editor.edit(photo, "paint the circle red", seed=7, steps=2)
    assert np.abs(pixels(answer.content) - np.asarray(own, int)).max() <= 1
    other = client.post("/v1/edits", files={"image": file_of(photo)}, data={**sent, "seed": "8"})
    assert (pixels(other.content) != pixels(answer.content)).any()


def test_openais_own_client_edits_a_picture(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["embedded"]
        photo = ("a.png", file_of(scene()), "image/png")
        answer = client.images.edit(image=photo, prompt="paint the circle red", n=2, output_format="webp")
        results = [pixels(base64.b64decode(one.b64_json)) for one in answer.data]
        editor = npedit.Editor.open()
        own = [editor.edit(scene(), "paint the circle red", seed=seed)[0] for seed in (0, 1)]
        for result, expected in zip(results, own):
            assert np.abs(result - np.asarray(expected, int)).mean() < 6  # WebP loses a little
        assert (results[0] != results[1]).any()
        with pytest.raises(openai.BadRequestError, match="mask"):
            client.images.edit(image=photo, mask=photo, prompt="x")
        with pytest.raises(openai.BadRequestError, match="size"):
            client.images.edit(image=photo, prompt="x", size="1024x1024")


def png_head(width, height):
    """A PNG that declares a size and has no pixels: a decompression bomb's head."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animation():
    out = io.BytesIO()
    scene().save(out, "WEBP", save_all=True, append_images=[scene(1)])
    return out.getvalue()


GOOD = file_of(scene())
BAD_PICTURES = {
    "empty": (b"", 400, "empty"),
    "text": (b"hello", 400, "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', 400, "not a picture"),
    "html polyglot": (b"GIF89a<script>alert(1)</script>", 400, "not a picture"),
    "gif": (file_of(scene(), "GIF"), 400, "not a picture"),
    "truncated": (file_of(scene(), "JPEG")[:400], 400, "expected a picture"),
    "bomb": (png_head(60_000, 60_000), 400, "expected a picture"),
    "large": (png_head(2000, 1000), 413, "megapixels"),
    "long": (png_head(5000, 2), 400, "sides"),
    "noise": (random.Random(0).randbytes(5000), 400, "not a picture"),
    "animated": (animation(), 400, "frames"),
    "bytes": (GOOD + b"\0" * 2**20, 413, "MiB"),
}
BAD_FIELDS = {
    "no instruction": ({}, "instruction"),
    "empty instruction": ({"instruction": "  "}, "instruction"),
    "long instruction": ({"instruction": "x" * 3000}, "2000 characters"),
    "seed": ({"instruction": "x", "seed": "-1"}, "seed"),
    "large seed": ({"instruction": "x", "seed": "9" * 30}, "seed"),
    "steps": ({"instruction": "x", "steps": "1000"}, "steps"),
    "format": ({"instruction": "x", "output_format": "exe"}, "output_format"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused_and_never_reach_the_model(client, name):
    data, status, words = BAD_PICTURES[name]
    before = count(client, "npedit_batch_items_count")
    for path, field in (("/v1/edits", "instruction"), ("/v1/images/edits", "prompt")):
        answer = client.post(path, files={"image": data}, data={field: "x"})
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
    assert count(client, "npedit_batch_items_count") == before


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(client, name):
    data, words = BAD_FIELDS[name]
    before = count(client, "npedit_batch_items_count")
    answer = client.post("/v1/edits", files={"image": GOOD}, data=data)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert count(client, "npedit_batch_items_count") == before


def test_a_body_without_a_stated_size_is_limited_too(client):
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    sent = iter([head, *[b"\0" * 65536] * 20])
    answer = client.post("/v1/edits", content=sent, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/edits"])
def test_other_paths_and_methods(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 405) and answer.json()["error"]["type"] == "invalid_request_error"


def test_another_hosts_name_is_refused(client):
    """So that a page of another site cannot reach this server through a name of its own."""
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_concurrent_requests_share_batches_and_each_gets_its_own(client):
    before = count(client, "npedit_batch_items_count"), count(client, "npedit_batch_items_sum")

    def one(seed):
        data = {"instruction": "paint it red", "seed": str(seed)}
        return client.post("/v1/edits", files={"image": GOOD}, data=data).content

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(16)))
    deadline = time.monotonic() + 10  # a batch is noted just after its last result
    while count(client, "npedit_batch_items_sum") - before[1] < 16 and time.monotonic() < deadline:
        time.sleep(0.05)
    batches = count(client, "npedit_batch_items_count") - before[0]
    assert count(client, "npedit_batch_items_sum") - before[1] == 16 and batches < 16
    assert np.abs(pixels(together[5]) - pixels(one(5))).max() <= 1


def test_state_and_description(client):
    assert client.get("/health").json()["status"] == "ok"
    described = client.get("/openapi.json").json()["paths"]
    assert {"/v1/edits", "/v1/images/edits", "/health", "/metrics"} <= set(described)
    before = count(client, "npedit_requests_total", path="/health", status="200")
    client.get("/health")
    assert count(client, "npedit_requests_total", path="/health", status="200") == before + 1


def test_a_client_that_goes_away_does_not_stop_the_others(client, server):
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url) as hasty:
            hasty.post("/v1/edits", files={"image": GOOD}, data={"instruction": "x", "steps": "16"}, timeout=0.02)
    answer = client.post("/v1/edits", files={"image": GOOD}, data={"instruction": "x"})
    assert answer.status_code == 200
    deadline = time.monotonic() + 20
    while count(client, "npedit_requests_in_progress") > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert count(client, "npedit_requests_in_progress") == 1  # the request that asks
    assert client.get("/health").json()["waiting"] == 0
