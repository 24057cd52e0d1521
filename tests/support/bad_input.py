"""The table of faults that people bring: what is wrong, the command that meets it, and the words of its message."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.bad_photos import BAD, noise, write_bad
from tests.support.judge_server import completion, send, serving
from tests.support.writer_server import good_answer

NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens
HERE = "HERE"  # in a command: the address of the fault's server
RECIPE = """
name: bad
family: {name: flux}
data: {name: imagefolder, path: data, sizes: [[32, 32]], prefetch: 0, max_bad_share: 0.0, nothing_share: 0.0,
       max_enlargement: 4}
stages:
  - {step: reference_copy, updates: 2, batch_size: 4, settings: {steps: 2}}
trainer: {benchmark: '', evaluate_every: 0, sample_every: 0, sample_items: 1, steps: 2}
"""
CHECK = ("check", "bad.yaml", "--only", "data", "--samples", 8, "--out", "report")
TRAIN = ("train", "bad.yaml", "--out", "run")
OWN = ("evaluate", "own", "data", "--out", "own", "--copy")
PREPARE = ("prepare", "data", "--out", "set", "--writer", NOBODY, "--writer-model", "m")


def row(name: str = "good.png", **more: Any) -> dict[str, Any]:
    texts = {"source_caption": "a room", "target_caption": "a room at night"}
    return {"file_name": name, "instruction": "make it night", "edit_type": "tone", **texts, **more}


@dataclass(frozen=True)
class Fault:
    """`bring` writes what is wrong into the working folder. Then `words` is the command, called inside `around`, which
    gives the address of a server; `says` are words of its message."""

    name: str
    bring: Callable[[Path], object]
    words: tuple[Any, ...]
    says: tuple[str, ...]
    code: int = 2
    around: Callable[[], AbstractContextManager[str | None]] = nullcontext
    seconds: float = 30.0


def write_data(here: Path, *rows: Any) -> Path:
    """A data folder `data` with a good photo; rows are objects, or lines as text or bytes."""
    data = here / "data"
    data.mkdir(exist_ok=True)
    noise().save(data / "good.png")
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    (data / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return data


# ---------------------------------------------------------------------------------------------------- the table: photos

PHOTO_WORDS = {  # what train, check, prepare and edit say; None: the command takes the photo
    "missing.png": ("no such file", None, "there is no"),
    "empty.jpg": ("an empty file", "an empty file", "is empty"),
    "page.jpg": ("not a picture", "not a picture", "is not one"),
    "folder.png": ("no such file", None, "is a folder"),
    "loop.png": ("no such file", "symbolic links", "there is no"),
    "cut.jpg": ("truncated", "truncated", "truncated"),
    "cut.png": ("Truncated", "truncated", "truncated"),
    "moving.gif": ("an animation of 2 frames", "an animation of 2 frames", "an animation of 2 frames"),
    "moving.png": ("an animation of 2 frames", "an animation of 2 frames", "an animation of 2 frames"),
    "moving.webp": ("an animation of 2 frames", "an animation of 2 frames", "an animation of 2 frames"),
    "pixel.png": ("is enlarged 32 times", "the shorter side is below 16", None),
    "strip.png": ("keeps 0.1% of itself", "the sides are not within 1:64", "expected sides within 1:64"),
    "huge.png": ("exceeds limit", "exceeds limit", "megapixels"),
    "nothing.png": ("not a picture", "not a picture", "is not one"),
    "floats.tif": ("floating-point", "floating-point", "floating-point"),
}


def bring_photo(name: str) -> Callable[[Path], object]:
    def bring(here: Path) -> None:
        write_bad(write_data(here, row(), row(name)), name)

    return bring


def bring_only(name: str) -> Callable[[Path], object]:
    return lambda here: write_bad(here / "data", name)


def photo_faults() -> Iterator[Fault]:
    for name in BAD:
        training, preparing, editing = PHOTO_WORDS[name]
        place = ("metadata.jsonl:2", name, training)
        yield Fault(f"check {name}", bring_photo(name), CHECK, place)
        if name not in ("pixel.png", "strip.png"):  # these can be scored
            yield Fault(f"own {name}", bring_photo(name), OWN, (name, "scores are missing in 1 of 2 rows"), code=0)
        if preparing is not None:
            yield Fault(f"prepare {name}", bring_only(name), PREPARE, (name, preparing))
        if editing is not None:
            words = ("edit", f"data/{name}", "make it night", "-o", "o.png")
            yield Fault(f"edit {name}", bring_only(name), words, (name, editing))


# ------------------------------------------------------------------------------------------------------ the table: rows

NAMES_OUTSIDE = {
    "upwards": "../good.png",
    "upwards in the middle": "a/../../good.png",
    "absolute": "/etc/hostname",
    "backslashes": "..\\good.png",
    "drive": "C:\\good.png",
    "address": "http://localhost/good.png",
}
ROWS: dict[str, tuple[Any, str]] = {
    "latin-1": ('{"file_name": "good.png", "instruction": "färbe es"}'.encode("latin-1"), "expected JSON in UTF-8"),
    "utf-16": (json.dumps(row()).encode("utf-16"), "expected JSON in UTF-8"),
    "broken JSON": ('{"file_name": "good.png", "instr', "expected JSON in UTF-8"),
    "a list": ('["good.png", "make it night"]', "expected a JSON object"),
    "deep JSON": ("[" * 100_000, "expected JSON in UTF-8"),
    "no instruction": (json.dumps({"file_name": "good.png"}), "expected a field 'instruction'"),
    "empty instruction": (row(instruction="  "), "expected text in 'instruction'; got an empty one"),
    "a number as instruction": (row(instruction=7), "expected text in 'instruction'; got 7"),
    "a list as caption": (row(target_caption=["a"]), "expected text in 'target_caption'"),
    "half a character": ('{"file_name": "good.png", "instruction": "\\ud83d"}', "half a character"),
    "unknown edit type": (row(edit_type="recolor"), "did you mean 'recolour'"),
    "scene": (row(edit_type="scene"), "fill 'object'"),
    "removal without object": (row(edit_type="remove"), "expected an 'object' for edit type 'remove'"),
    "wrong questions": (row(questions=[{"question": "?", "answer": "maybe"}]), '"answer": "yes" or "no"'),
    "wrong references": (row(reference_file_names=[3]), "expected a list of file names"),
}


def bring_rows(*rows: Any) -> Callable[[Path], object]:
    return lambda here: write_data(here, *rows)


def bring_csv(here: Path) -> None:
    (write_data(here) / "metadata.jsonl").unlink()
    (here / "data" / "metadata.csv").write_text("file_name,instruction\ngood.png,make it night, please\n")


def bring_parquet(here: Path) -> None:
    (write_data(here) / "metadata.jsonl").unlink()
    place = here / "data" / "metadata.parquet"
    pq.write_table(pa.table({"file_name": ["good.png"], "instruction": ["x"]}), place)
    place.write_bytes(place.read_bytes()[:-20])


def bring_words(here: Path) -> None:
    write_data(here, row(), row(instruction="make the room dark and then " * 200))


def row_faults() -> Iterator[Fault]:
    for name, (line, says) in ROWS.items():
        for words in (CHECK, OWN):
            yield Fault(f"{words[0]} {name}", bring_rows(row(), line), words, ("metadata.jsonl:2:", says))
    for name, file in NAMES_OUTSIDE.items():
        bring = bring_rows(row(), row(file))
        yield Fault(f"check {name}", bring, CHECK, ("metadata.jsonl:2", "leads out of the data folder"))
        yield Fault(f"own {name}", bring, OWN, ("metadata.jsonl:2", "leads out of the data folder"))
    both = bring_rows(row(id="a"), row(id="a"))
    yield Fault("own duplicate ids", both, OWN, ("metadata.jsonl:2", "each once; got 'a'"))
    yield Fault("check duplicate ids", both, CHECK, ("1 ids belong to several rows: a",), code=0)
    yield Fault("check long instruction", bring_words, CHECK, ("The text encoder cuts texts of 1 of 2 rows",), code=0)
    yield Fault("check csv", bring_csv, CHECK, ("metadata.csv:2", "put texts with commas in quotes"))
    yield Fault("check parquet", bring_parquet, CHECK, ("metadata.parquet", "expected a parquet file"))
    yield Fault("check no rows", bring_rows(), CHECK, ("at least one row",))
    broken = ("import", "columns", "data/metadata.jsonl", "--out", "new", "--column", "photo=file_name")
    yield Fault("import broken JSON", bring_rows(row(), "{"), broken, ("metadata.jsonl",))
    yield Fault("import a missing photo", bring_rows(row("gone.png")), broken, ("gone.png", "--photos"))
    yield Fault("import upwards", bring_rows(row("../good.png")), broken, ("leads out of the folder of photos",))


# ---------------------------------------------------------------------------------------------------- the table: places


def place_faults() -> Iterator[Fault]:
    commands = {
        "train": (("train", "bad.yaml", "data.path=nowhere"), "nowhere"),
        "check": ((*CHECK[:2], "data.path=nowhere", *CHECK[2:]), "nowhere"),
        "prepare": (("prepare", "nowhere", *PREPARE[2:]), "nowhere"),
        "own": (("evaluate", "own", "nowhere", *OWN[3:]), "nowhere"),
        "import": (("import", "columns", "nowhere", "--out", "new"), "nowhere"),
        "edit": (("edit", "nowhere/a.png", "make it night"), "nowhere"),
    }
    for name, (words, says) in commands.items():
        yield Fault(f"{name} wrong folder", lambda here: None, words, (says,), seconds=10.0)


# --------------------------------------------------------------------------------------------------- the table: servers


def sends(status: int, body: bytes, **headers: str) -> Callable[[Any], None]:
    return lambda handler: send(handler, status, body, **headers)


def cut_short(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("half an answer")[:20])


def silent(handler: Any) -> None:
    time.sleep(1.0)


def late(number: int, body: Any) -> str:
    time.sleep(0.1)
    return json.dumps(good_answer(body))


def busy_at_first(number: int, body: Any) -> Any:
    return sends(429, b"slow down", Retry_After="0") if number < 2 else json.dumps(good_answer(body))


PAGE = b"<!DOCTYPE html><html>Please log in</html>"
SERVERS: dict[str, tuple[Any, tuple[str, ...], int]] = {  # what it answers, words of the message, exit code
    "slow": (late, ("2 edits of 1 photos",), 0),
    "silent": (silent, ("transport_error", "timed out"), 2),
    "rate-limiting for a time": (busy_at_first, ("HTTP 429", "attempt 2", "2 edits of 1 photos"), 0),
    "rate-limiting for ever": (sends(429, b"slow down"), ("HTTP 429: slow down; attempt 3 of 3", "transport_error"), 2),
    "an error": (sends(500, b"out of memory"), ("HTTP 500: out of memory",), 2),
    "HTML": (sends(200, PAGE), ("expected", "a page that begins '<!DOCTYPE html>", "--writer"), 2),
    "HTML with an error": (sends(503, PAGE), ("HTTP 503",), 2),
    "refusing the key": (sends(401, b"bad key"), ("HTTP 401", "NPEDIT_WRITER_KEY"), 2),
    "without credit": (sends(402, b"pay"), ("expected credit left",), 2),
    "without the model": (sends(404, b"no such model"), ("HTTP 404", "--writer-model"), 2),
    "elsewhere": (sends(302, b"", Location="http://localhost:9/"), ("HTTP 302",), 2),
    "refusing the photo": ({"content": "", "finish_reason": "content_filter"}, ("look: refused",), 2),
    "rejecting the request": (sends(400, b"the picture is too large"), ("look: rejected",), 2),
    "no JSON": (sends(200, b"hello"), ("no chat completion: hello",), 2),
    "JSON of another kind": (sends(200, b'{"answer": 42}'), ("no chat completion",), 2),
    "half a body": (cut_short, ("IncompleteRead",), 2),
    "prose": ("I see a lovely room.", ("look: unreadable",), 2),
    "nothing": ("", ("look: unreadable",), 2),
    "another object": ('{"caption": 7, "objects": "chair"}', ("look: unreadable",), 2),
    "half an object": ('{"caption": "a room", "obj', ("look: unreadable",), 2),
}


@contextmanager
def server(answer: Any) -> Iterator[str]:
    def fixed(number: int, body: Any) -> Any:
        return dict(answer) if isinstance(answer, dict) else answer

    respond = answer if answer in (late, busy_at_first) else fixed
    with serving(respond) as found:
        yield found.url


def server_faults() -> Iterator[Fault]:
    words = ("prepare", "data", "--out", "set", "--writer", HERE, "--writer-model", "m", "--no-verify")
    for name, (answer, says, code) in SERVERS.items():
        yield Fault(f"server {name}", bring_rows(), words, says, code, partial(server, answer))
    for name, address, says in (
        ("down", NOBODY, "expected a server at"),
        ("no address", "http://", "expected a writer's address"),
        ("a key in the address", "http://me:secret@localhost/v1", "expected an address without a key"),
        ("no address and no model", "nowhere", "nowhere"),
    ):
        model = ("--writer-model", "m") if address.startswith("http") else ()
        yield Fault(f"server {name}", bring_rows(), (*words[:5], address, *model), (says,))


# --------------------------------------------------------------------------------------------------- the table: no room


@contextmanager
def full_disk(room: int = 1500) -> Iterator[None]:
    """No file may grow beyond `room` bytes; the error is that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def server_and_full_disk() -> Iterator[str]:
    with server(late) as url, full_disk():
        yield url


def room_faults() -> Iterator[Fault]:
    says = ("room on the disk",)
    prepare = (*PREPARE[:5], HERE, *PREPARE[6:])
    yield Fault("prepare full disk", bring_rows(), prepare, says, around=server_and_full_disk)
    yield Fault("train full disk", bring_rows(row()), TRAIN, says, around=full_disk)
    yield Fault("own full disk", bring_rows(row()), OWN, says, around=full_disk)
    words = ("edit", "data/good.png", "make it night")
    yield Fault("edit full disk", bring_rows(), words, ("expected to write data/good-edited.png",), around=full_disk)
    table = ("import", "columns", "rows.json", "--out", "new", "--photos", "data", "--column", "photo=photo")
    yield Fault("import full disk", bring_table, table, says, around=full_disk)


def bring_table(here: Path) -> None:
    write_data(here)
    texts = {"instruction": "make the room dark " * 20}
    (here / "rows.json").write_text(json.dumps([{"photo": "good.png", **texts} for _ in range(20)]))


FAULTS = [*photo_faults(), *row_faults(), *place_faults(), *server_faults(), *room_faults()]
