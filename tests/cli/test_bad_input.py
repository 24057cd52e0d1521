"""What people bring that is wrong: each fault ends in a message that names it, and never in a traceback or silence.

The table is in `bad_input.py`: each entry is one fault met by one command. The good rows and photos beside a bad one
are still used, and photos of unusual kinds are read with the right colours.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from npedit.data import imagefolder
from npedit.judges.chat_client import ChatClient
from tests.support.bad_input import FAULTS, HERE, NAMES_OUTSIDE, OWN, RECIPE, TRAIN, Fault, row, write_data
from tests.support.bad_photos import BAD, SIZE, colours_of, write_bad, write_good
from tests.support.command_line import run
from tests.support.judge_server import images_of
from tests.support.writer_server import photo, rows_of, writing


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_its_message(here: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bad.yaml").write_text(RECIPE)
    fault.bring(here)
    short_waits = (0.3, 3, 0.01, None, lambda line: None)  # in place of minutes
    monkeypatch.setattr(inspect.unwrap(ChatClient.__init__), "__defaults__", short_waits)
    began = time.monotonic()
    with fault.around() as url:
        said = run(*(url if word == HERE else word for word in fault.words), code=fault.code)
    assert time.monotonic() - began < fault.seconds
    assert not [words for words in fault.says if words not in said], said


def test_the_table_is_long_enough() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


# ----------------------------------------------------------------------------------------- what is good is still used


def near(found: Any, wanted: Any) -> bool:
    """Whether two pairs of colours are equal as far as JPEG and rounding allow."""
    return all(abs(a - b) < 6 for one, other in zip(found, wanted) for a, b in zip(one, other))


def seen_by_training(data: Path, names: list[str]) -> dict[str, Image.Image]:
    settings = imagefolder.Settings(path=str(data), sizes=((SIZE[1], SIZE[0]),), nothing_share=0, prefetch=0)
    batch = imagefolder.Source(settings, 0).batch(0, len(names))
    pixels = (batch.references * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return {name: Image.fromarray(picture) for name, picture in zip(batch.ids, pixels, strict=True)}


def seen_by_prepare(data: Path, names: list[str]) -> dict[str, Image.Image]:
    (data / "metadata.jsonl").unlink()
    found = {}
    for name in names:
        place = data.parent / f"only-{name}"
        place.mkdir()
        (data / name).rename(place / name)
        with writing() as server:
            words = ("--writer", server.url, "--writer-model", "m", "--jpeg-quality", 0, "--no-verify")
            run("prepare", place, "--out", data.parent / f"set-{name}", *words)
            (found[name],) = images_of({"messages": [server.bodies[0]["messages"][-1]]})
    return found


def seen_by_own(data: Path, names: list[str]) -> dict[str, Image.Image]:
    run(*OWN)
    return {name: Image.open(next(data.parent.glob(f"own/**/{name}.png"))) for name in names}


def seen_after_import(data: Path, names: list[str]) -> dict[str, Image.Image]:
    words = ("--column", "photo=file_name", "--column", "id=id")
    run("import", "columns", "data/metadata.jsonl", "--out", "new", *words)
    return seen_by_training(data.parent / "new", names)


@pytest.mark.parametrize("see", [seen_by_training, seen_by_prepare, seen_by_own, seen_after_import])
def test_photos_of_unusual_kinds_are_read_rightly(here: Path, see: Callable[..., dict[str, Image.Image]]) -> None:
    wanted = write_good(here / "data")
    (here / "data" / "metadata.jsonl").write_text("".join(json.dumps(row(name, id=name)) + "\n" for name in wanted))
    found = see(here / "data", list(wanted))
    assert {picture.size for picture in found.values()} == {SIZE}, "rotated photos are upright"
    wrong = {name: colours_of(found[name]) for name in wanted if not near(colours_of(found[name]), wanted[name])}
    assert set(found) == set(wanted) and not wrong, wrong


def test_photos_of_unusual_kinds_are_edited(here: Path) -> None:
    names = list(write_good(here / "data"))
    run("edit", *(f"data/{name}" for name in names), "make it night", "-o", "out/")
    made = [Image.open(path) for path in sorted((here / "out").iterdir())]
    assert len(made) == len(names) and {picture.size for picture in made} == {SIZE}


def test_good_rows_are_trained_on_beside_all_the_bad_ones(here: Path) -> None:
    (here / "bad.yaml").write_text(RECIPE)
    names = [*BAD, *NAMES_OUTSIDE.values()]
    data = write_data(here, row(), *(row(name) for name in names))
    for name in BAD:
        write_bad(data, name)
    run(*TRAIN, "data.max_bad_share=0.99")
    listed = {entry["file"]: entry["reason"] for entry in rows_of(here / "run", "bad_rows.jsonl")}
    assert set(names) - {"cut.jpg"} <= set(listed) <= set(names)  # this one's header is good: found once it is decoded
    assert all(listed.values())
    assert [entry["step"] for entry in rows_of(here / "run", "metrics.jsonl")][-1] == 2


def test_good_photos_are_prepared_beside_all_the_bad_ones(here: Path) -> None:
    photo(here / "data" / "good.png", 0)
    for name in BAD:
        write_bad(here / "data", name)
    with writing() as server:
        said = run("prepare", "data", "--out", "set", "--writer", server.url, "--writer-model", "m", "--no-verify")
    assert "2 edits of 1 photos" in said
    listed = {entry["file"]: entry["reason"] for entry in rows_of(here / "set", "bad_photos.jsonl")}
    assert set(listed) == set(BAD) - {"missing.png", "folder.png"} and all(listed.values())
