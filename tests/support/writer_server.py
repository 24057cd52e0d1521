"""A real HTTP server that writes and verifies edits for `npedit prepare`, and small folders of photos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from command_line import run
from judge_server import Server, serving
from PIL import Image


def photo(path: Path, seed: int, size: tuple[int, int] = (48, 32), **save: Any) -> Path:
    """A smooth random picture as a file: different seeds are no near-duplicates."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return path


def photos(folder: Path, count: int) -> Path:
    for number in range(count):
        photo(folder / f"{number:03d}.png", number)
    return folder


def form_of(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, schema) of the structured output that a request asks for."""
    form = body["response_format"]["json_schema"]
    return form["name"], form["schema"]


def prompt_of(body: dict[str, Any]) -> str:
    (user,) = (m["content"] for m in body["messages"] if m["role"] == "user")
    return " ".join(part["text"] for part in user if part["type"] == "text")


def good_look() -> dict[str, Any]:
    return {
        "objects": [{"name": "red chair", "where": "left", "attributes": ["red", "wood"]}],
        "caption": "a red chair in a room",
    }


def wanted_of(body: dict[str, Any]) -> list[str]:
    """The edit types of a request of the second pass, in order."""
    lines = (line.strip() for line in prompt_of(body).splitlines())
    return [line[2:].partition(":")[0] for line in lines if line.startswith("- ")]


def good_proposal(kind: str) -> dict[str, Any]:
    return {
        "edit_type": kind,
        "instruction": f"please {kind} the chair",
        "object": "red chair",
        "target_caption": f"a room after {kind}",
        "questions": [{"question": f"has {kind} happened?", "answer": "yes"}],
    }


def good_verification() -> dict[str, Any]:
    return {"object_present": True, "edit_possible": True, "caption_right": True, "answers": ["no"], "reason": ""}


def good_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A right answer to any of the three passes."""
    name, _ = form_of(body)
    if name == "look":
        return good_look()
    if name == "write":
        return {"proposals": [good_proposal(kind) for kind in wanted_of(body)]}
    return good_verification()


@contextmanager
def writing(change: Callable[[str, dict[str, Any], dict[str, Any]], Any] | None = None) -> Iterator[Server]:
    """The server. `change(pass, answer, body)` returns what is sent in place of a right answer."""

    def answer(_: int, body: dict[str, Any]) -> Any:
        found = good_answer(body)
        changed = change(form_of(body)[0], found, body) if change else found
        return changed if isinstance(changed, str) or callable(changed) else json.dumps(changed)

    with serving(answer) as server:
        yield server


def passes_of(server: Server) -> list[str]:
    return [form_of(body)[0] for body in server.bodies]


def rows_of(folder: Path, name: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def prepare(server, source, out, *words, code=0):
    return run(
        "prepare",
        source,
        "--out",
        out,
        "--writer",
        server.url,
        "--writer-model",
        "tiny",
        "--workers",
        4,
        *words,
        code=code,
    )
