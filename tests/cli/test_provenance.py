"""What the files of edited pictures say about their making."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from npedit.provenance import EDITED_BY_AI, MOST_CHARACTERS, xmp_packet
from tests.support.command_line import picture, run

EXTENSION = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"


def properties(packet: bytes | str) -> dict[str, str]:
    """The properties of an XMP packet, by name."""
    text = packet.decode() if isinstance(packet, bytes) else packet
    (description,) = ElementTree.fromstring(text.strip("\0")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    return {element.tag: element.text or "" for element in description}


def read_properties(path: Path | io.BytesIO) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return properties(image.info["xmp"]) if "xmp" in image.info else {}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_edited_picture_says_that_an_ai_model_edited_it(here: Path, suffix: str) -> None:
    picture(here / "a.png")
    run("edit", "a.png", "make it night", "-o", f"out.{suffix}")
    found = read_properties(here / f"out.{suffix}")
    assert found[f"{EXTENSION}DigitalSourceType"] == EDITED_BY_AI
    assert "embedded" in found[f"{EXTENSION}AISystemUsed"] and found[TOOL].startswith("npedit ")
    assert "night" not in str(found)


def test_the_instruction_is_written_on_request_and_nothing_on_request(here: Path) -> None:
    picture(here / "a.png")
    run("edit", "a.png", "make it <night> & day", "-o", "told.png", "--provenance", "instruction")
    assert read_properties(here / "told.png")[f"{EXTENSION}AIPromptInformation"] == "make it <night> & day"
    run("edit", "a.png", "make it night", "-o", "silent.png", "--provenance", "none")
    assert not read_properties(here / "silent.png")
    assert "Did you mean 'none'" in run("edit", "a.png", "make it night", "-o", "o.png", "--provenance", "nome", code=2)
    assert not (here / "o.png").exists()


def test_the_name_of_an_editor_holds_no_path(here: Path) -> None:
    picture(here / "a.png")
    run("export", "embedded", "secret/mine")
    run("edit", "a.png", "make it night", "-m", "secret/mine", "-o", "o.png")
    assert read_properties(here / "o.png")[f"{EXTENSION}AISystemUsed"] == "mine"


def test_a_long_instruction_and_control_characters_fit_in_a_jpeg() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", xmp=xmp_packet("\x00editor", "\u4e2d" * 60_000))
    found = read_properties(buffer)
    assert found[f"{EXTENSION}AISystemUsed"] == "editor"
    assert len(found[f"{EXTENSION}AIPromptInformation"]) == MOST_CHARACTERS


def test_standard_output_carries_the_same_metadata(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npedit.output_pictures import write_to_stdout

    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stream)
    write_to_stdout(Image.new("RGB", (8, 8)), xmp_packet("mine"))
    buffer: io.BytesIO = stream.buffer  # type: ignore[assignment]
    buffer.seek(0)
    assert read_properties(buffer)[f"{EXTENSION}AISystemUsed"] == "mine"
