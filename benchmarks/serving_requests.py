"""The requests of the load test of `npedit serve`: good ones, bad ones, and clients that go away."""

from __future__ import annotations

import io
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from PIL import Image

MEGAPIXELS, MIB = 2.0, 2.0  # the limits of the server under test
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star")
GONE = 0  # in place of an HTTP status: the client closed the connection


@dataclass
class Outcome:
    """What became of a request: its kind, its HTTP status, and its seconds."""

    kind: str
    status: int
    seconds: float


@dataclass
class Load:
    """The files that clients send, by kind. `good` are pictures; `bad` are a file and the status that answers it."""

    good: Sequence[bytes]
    bad: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)


def make_load(seed: int = 0, pictures: int = 24) -> Load:
    """Random pictures of several sizes and formats, and one file of each bad kind."""
    draw = random.Random(seed)
    good = [_picture(draw) for _ in range(pictures)]
    return Load(good, _bad_files(good[0]))


def _picture(draw: random.Random) -> bytes:
    size = draw.choice(((32, 32), (64, 64), (96, 64), (200, 300), (640, 480)))
    small = Image.frombytes("RGB", (4, 4), draw.randbytes(48))
    return encode(small.resize(size, Image.Resampling.BICUBIC), draw.choice(("PNG", "JPEG", "WEBP")))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture's file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _bad_files(good: bytes) -> dict[str, tuple[bytes, int]]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    noise = random.Random(1).randbytes(30_000)
    return {
        "decompression bomb": (png_head(60_000, 60_000), 400),
        "too many pixels": (png_head(4000, 4000), 413),
        "too many bytes": (good + bytes(int(MIB * 2**20)), 413),
        "truncated": (encode(Image.effect_noise((300, 300), 50), "JPEG")[:9000], 400),
        "SVG": (svg, 400),
        "polyglot of GIF and HTML": (b"GIF89a<script>alert(1)</script>" + noise, 400),
        "PNG head before noise": (png_head(64, 64)[:40] + noise, 400),
        "JPEG of 1000 scans": (many_scans(1000), 400),
        "noise": (noise, 400),
        "empty": (b"", 400),
    }


def png_head(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    data = encode(Image.effect_noise((64, 64), 40), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


class Client:
    """One client of a server, with one connection. Each call makes one request and returns what became of it."""

    def __init__(self, url: str, load: Load) -> None:
        self.url, self.load = url, load
        self._http = httpx.Client(base_url=url, timeout=120)

    def close(self) -> None:
        self._http.close()

    def edit(self, number: int) -> Outcome:
        """A good request; its instruction, seed and picture follow from its number."""
        draw = random.Random(number)
        text = f"paint the {draw.choice(SHAPES)} {draw.choice(COLOURS)}, number {number}"
        return self._post("edit", draw.choice(self.load.good), {"instruction": text, "seed": str(number)})

    def edit_slowly(self, number: int) -> Outcome:
        """A good request of many steps."""
        data = {"instruction": "make it night", "seed": str(number), "steps": "16"}
        return self._post("edit", self.load.good[0], data)

    def send_bad(self, number: int) -> Outcome:
        """A bad request."""
        kind = list(self.load.bad)[number % len(self.load.bad)]
        return self._post(kind, self.load.bad[kind][0], {"instruction": "x"})

    def go_away(self, number: int) -> Outcome:
        """Close the connection: in the middle of the upload, or just after it."""
        request = self._http.build_request(
            "POST", "/v1/edits", files={"image": self.load.good[0]}, data={"instruction": "paint it red"}
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        sent = f"POST /v1/edits HTTP/1.1\r\n{head}\r\n".encode() + request.read()
        place = urlsplit(self.url)
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            connection.sendall(sent if number % 2 else sent[: len(sent) - 100])
        return Outcome("client goes away", GONE, 0.0)

    def _post(self, kind: str, file: bytes, data: Mapping[str, str]) -> Outcome:
        begun = time.perf_counter()
        try:
            answer = self._http.post("/v1/edits", files={"image": file}, data=data)
        except httpx.TransportError:
            return Outcome(kind, GONE, time.perf_counter() - begun)
        return Outcome(kind, answer.status_code, time.perf_counter() - begun)


def mixed_request(client: Client, number: int) -> Outcome:
    """Of ten requests seven are good, two are bad, and in one the client goes away."""
    calls: Sequence[Callable[[int], Outcome]] = (*[client.edit] * 7, *[client.send_bad] * 2, client.go_away)
    return calls[number * 7 % 10](number // 10 if number * 7 % 10 > 6 else number)
