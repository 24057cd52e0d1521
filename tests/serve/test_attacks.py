"""What an attacker or a broken client sends to `npedit serve`: slow and half-open connections, files that need more
time or memory than their size says, requests of other sites."""

import asyncio
import gc
import io
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from uvicorn import Config
from uvicorn import Server as Uvicorn

from npedit.serve.body_limit import TOGETHER, BodyLimit
from npedit.serve.connections import TimedConnection
from npedit.serve.limits import MOST_SCANS, BadRequest, Limits, read_picture
from npedit.serve.memory import MemoryFull, PictureMemory, memory_needed


def file_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


GOOD = file_of(Image.new("RGB", (32, 32), "blue"))
HEAD = (
    b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    b"Content-Length: 900000\r\n\r\n"
)
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


def connect(server):
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


def open_files(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def wait_until(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.1)
    return check()


# ------------------------------------------------------------------------------------------------------------ files


def many_scans(count):
    """A progressive JPEG whose last scan is there many times."""
    data = file_of(Image.effect_noise((64, 64), 40), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded():
    assert read_picture(many_scans(20), Limits()).size == (64, 64)
    with pytest.raises(BadRequest, match="scans"):
        read_picture(many_scans(MOST_SCANS + 1), Limits())


def test_a_very_large_colour_profile_is_refused():
    """Profiles are kept in a cache, so a client could fill the memory with them."""
    photo = Image.new("RGB", (32, 32))
    assert read_picture(file_of(photo, "JPEG", icc_profile=bytes(10_000)), Limits()).size == (32, 32)
    with pytest.raises(BadRequest, match="profile"):
        read_picture(file_of(photo, "JPEG", icc_profile=bytes(5 * 2**20)), Limits())


def test_the_memory_of_all_pictures_together_is_limited():
    limits = Limits(memory=PictureMemory(2 * memory_needed(32 * 32)))
    first, second = read_picture(GOOD, limits), read_picture(GOOD, limits)
    assert first.size == second.size
    with pytest.raises(BadRequest, match="wait") as told:
        read_picture(GOOD, limits)
    assert told.value.status == 429
    del second, told
    gc.collect()
    with pytest.raises(BadRequest, match="picture"):
        read_picture(GOOD[:60], limits)  # a broken one is counted out again
    assert limits.memory.held == memory_needed(32 * 32) == 32 * 32 * 12
    assert read_picture(GOOD, limits).size == (32, 32)


def test_every_result_counts_as_memory_and_what_never_fits_need_not_wait():
    limits = Limits(memory=PictureMemory(memory_needed(32 * 32, 4)))
    kept = read_picture(GOOD, limits, results=4)
    assert kept.size == (32, 32) and limits.memory.held == limits.memory.most == 32 * 32 * 36
    with pytest.raises(BadRequest, match="fewer results") as told:
        read_picture(GOOD, limits, results=5)
    assert told.value.status == 413


def test_no_picture_is_decoded_when_memory_is_full():
    with pytest.raises(MemoryFull):
        PictureMemory(10).decode(lambda: pytest.fail("decoded"), 1)


# ------------------------------------------------------------------------------------------------------ connections


def test_uploads_that_are_broken_off_leave_no_file_open(server, client):
    client.get("/health")
    before = open_files(server)
    for _ in range(10):
        with connect(server) as one:
            one.sendall(HEAD + PART + bytes(300_000))
    assert wait_until(lambda: open_files(server) <= before)
    assert client.post("/v1/edits", files={"image": GOOD}, data={"instruction": "x"}).status_code == 200


class ShortTimes(TimedConnection):
    most_connections, most_seconds, seconds_between_looks = 4, 0.5, 0.1
    least_bytes_per_second = 2**20


async def reads_body(scope, receive, send):
    """An app that reads a body, works for longer than a client may take, and answers with much."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"30000000")]})
    await send({"type": "http.response.body", "body": bytes(30_000_000)})


@pytest.fixture(scope="module")
def short_times():
    """A server whose clients may take half a second."""
    import threading

    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn = Uvicorn(Config(reads_body, http=ShortTimes, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=uvicorn.run, args=([listening],))
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    uvicorn.should_exit = True
    thread.join(20)


def is_closed(one):
    """Whether the server closes the connection within some seconds."""
    one.settimeout(10)
    try:
        while one.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a", HEAD, HEAD + PART + b"a"])
def test_a_client_that_stops_sending_is_disconnected(short_times, sent):
    with connect(short_times) as one:
        one.sendall(sent)
        assert is_closed(one)


def test_a_client_that_does_not_read_is_disconnected_and_others_are_not(short_times):
    with connect(short_times) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(3)  # the answer is begun, and does not fit into the sockets' buffers
        received = 0
        try:
            while part := one.recv(2**20):
                received += len(part)
        except ConnectionResetError:
            pass
        assert received < 30_000_000
    assert len(httpx.get(short_times.url, timeout=20).content) == 30_000_000


def test_a_client_that_reads_or_sends_slowly_but_steadily_is_served(short_times):
    """Both take several times the limit for a client that does nothing."""
    with connect(short_times) as one:
        one.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            one.sendall(bytes(400_000))
            time.sleep(0.1)
        received = 0
        while part := one.recv(2**20):
            received += len(part)
            time.sleep(len(part) / 1e7)
    assert received > 30_000_000


def test_a_client_that_sends_much_and_reads_nothing_is_disconnected(short_times):
    with connect(short_times) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        one.settimeout(1)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                one.send(bytes(200_000))
                time.sleep(0.1)


def test_a_client_that_sends_a_little_again_and_again_is_disconnected(short_times):
    with connect(short_times) as one:
        one.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\n\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                one.sendall(b"a")
                time.sleep(0.1)


def test_further_connections_are_closed_at_once(short_times):
    with connect(short_times), connect(short_times), connect(short_times), connect(short_times):
        with connect(short_times) as fifth:
            begun = time.monotonic()
            assert is_closed(fifth) and time.monotonic() - begun < 0.4


def test_the_bodies_of_all_requests_together_are_limited():
    """Each is within the limit; the one that goes beyond the sum is refused, and the sum falls when requests end."""
    limit, gate, statuses = 100, asyncio.Event(), []

    async def app(scope, receive, send):
        await receive()
        await gate.wait()
        await send({"type": "http.response.start", "status": 200})

    async def ask(middleware):
        async def receive():
            return {"type": "http.request", "body": bytes(limit)}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await middleware({"type": "http", "method": "POST", "headers": []}, receive, send)

    async def ask_all():
        middleware = BodyLimit(app, limit)
        waiting = [asyncio.create_task(ask(middleware)) for _ in range(TOGETHER)]
        await asyncio.sleep(0)
        await ask(middleware)
        assert statuses == [429]
        gate.set()
        await asyncio.gather(*waiting)
        await ask(middleware)
        assert statuses == [429, *[200] * (TOGETHER + 1)]

    asyncio.run(ask_all())


def test_no_upload_is_taken_while_the_disk_is_almost_full(monkeypatch):
    """The page keeps uploads for hours."""
    statuses = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    for free in (2**29, 2**31):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free, total=2**36))
        for method in ("POST", "GET"):
            asyncio.run(BodyLimit(app, 100)({"type": "http", "method": method, "headers": []}, receive, send))
    assert statuses == [507, 200, 200, 200]


# --------------------------------------------------------------------------------------------------------- requests


def test_a_page_of_another_site_cannot_edit(client, server):
    """A browser sends such a form without asking the server first."""
    sent = {"files": {"image": GOOD}, "data": {"instruction": "x"}}
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert client.post("/v1/edits", **sent, headers={"origin": origin}).status_code == 403
    assert client.post("/v1/edits", **sent, headers={"origin": server.url}).status_code == 200


def test_answers_name_no_place_on_this_computer(client):
    for path in ("/v1/../../etc/passwd", "/v1/%2e%2e/x", "/v1/nothing"):
        assert str(Path.home()) not in client.get(path).text
    huge = {"image": ("../../a.png", GOOD[:50])}
    told = client.post("/v1/edits", files=huge, data={"instruction": "x"}).text
    assert "object at" not in told and "site-packages" not in told and "/" not in told.replace("\\/", "")


def test_unknown_paths_and_methods_make_no_new_label(client):
    for i in range(20):
        client.get(f"/v1/unknown-{i}")
        client.get(f"/unknown-{i}")
        client.request("BREW", f"/v1/{i}")
    assert "unknown-" not in client.get("/metrics").text


def test_a_form_of_very_many_fields_is_refused(client):
    field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/edits", content=field * 5000 + b"--x--\r\n", headers=headers)
    assert answer.status_code == 400 and "fields" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_results_say_that_an_ai_model_edited_them(client, kind):
    sent = {"instruction": "paint it red", "output_format": kind}
    answer = client.post("/v1/edits", files={"image": GOOD}, data=sent)
    with Image.open(io.BytesIO(answer.content)) as image:
        image.load()
        assert b"compositeWithTrainedAlgorithmicMedia" in image.info["xmp"]
        assert b"npedit embedded toy editor" in image.info["xmp"]


def test_keep_resolution_keeps_the_photos_own_pixels(client):
    """At eight times the working size, an edit that changes nothing blurs the picture; with the field it does not."""
    photo = Image.effect_noise((256, 256), 60).convert("RGB")
    sent = {"instruction": "paint the circle red", "keep_resolution": "true"}
    answer = client.post("/v1/edits", files={"image": file_of(photo)}, data=sent)
    assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).size == (256, 256)
    refused = client.post("/v1/edits", files={"image": GOOD}, data={**sent, "keep_resolution": "maybe"})
    assert refused.status_code == 400 and "keep_resolution" in refused.json()["error"]["message"]
