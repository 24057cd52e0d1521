"""`npedit caption`: captions for the rows of a set that has instructions, with the toy's real writer."""

import json
import os
import random
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npedit.data import imagefolder
from npedit.prepare.answers import UnreadableAnswer, parse_caption
from npedit.toy.dataset import write_dataset
from npedit.toy.edits import EDIT_TYPES, sample_edit
from npedit.toy.language import is_target_caption, read_instruction
from npedit.toy.world import Scene
from npedit.toy.writer import ErrorRates, caption, read_photo, row_faults
from tests.support.command_line import run
from tests.support.toy_writer_server import scene_picture, serving_writer
from tests.support.writer_server import form_of, good_look, passes_of, photo, prompt_of, rows_of, writing

FILLED = ("object", "source_caption", "target_caption", "questions")
GOOD = {
    "edit_possible": True,
    "object": "red chair",
    "target_caption": "an empty room",
    "questions": [{"question": "is the room empty?", "answer": "yes"}],
}


def bare_set(folder: Path, *rows: dict, **columns) -> Path:
    """A set of one photo and these rows."""
    photo(folder / "images" / "a.png", 0)
    rows = rows or ({"instruction": "remove the chair"}, {"instruction": "paint it blue"})
    lines = [json.dumps({"file_name": "images/a.png", "id": f"r{i}", **columns, **row}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captions(url, source, out, *words, code=0):
    model = ("--writer", url, "--writer-model", "m", "--jpeg-quality", 0, "--workers", 2)
    return run("caption", source, "--out", out, *model, *words, code=code)


def captioning(change=lambda name, answer, body: answer):
    """A server that completes rows; `change(pass, answer, body)` as in `writing`."""

    def answer(name, found, body):
        return change(name, GOOD if name == "caption" else found, body)

    return writing(answer)


def rows_without_words(folder: Path, rows: list[dict]) -> None:
    kept = [{k: v for k, v in row.items() if k not in FILLED} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def scene_of(folder: Path, row: dict) -> Scene:
    from PIL import Image

    return read_photo(Image.open(folder / row["file_name"]))


# ------------------------------------------------------------------------------------------------------- end to end


def test_a_set_of_instructions_becomes_one_that_can_be_trained_on(tmp_path):
    source = write_dataset(tmp_path / "rows", 24, 0)
    before = rows_of(source)
    rows_without_words(source, before)
    with serving_writer() as (url, writer):
        said = captions(url, source, tmp_path / "set")
        made = rows_of(tmp_path / "set")
        assert "24 of 24 rows are complete; 0 were before. 0 rows rejected" in said
        assert writer.counts["look"] == writer.counts["caption"] == writer.counts["verify"] == 24
        counts = dict(writer.counts)
        assert "0 requests in this run" in captions(url, source, tmp_path / "set")  # a second run asks nothing
        assert dict(writer.counts) == counts and rows_of(tmp_path / "set") == made
    assert [(r["id"], r["instruction"], r["edit_type"]) for r in made] == [
        (r["id"], r["instruction"], r["edit_type"]) for r in before
    ]
    assert [fault for row in made for fault in row_faults(scene_of(tmp_path / "set", row), row)] == []
    settings = imagefolder.Settings(path=str(tmp_path / "set"), sizes=((32, 32),), prefetch=0)
    data = imagefolder.Source(settings, 0)
    assert data.has_source_captions and data.has_target_captions and data.batch(0, 4).references.shape == (4, 3, 32, 32)


def test_wrong_captions_are_rejected_by_the_verification(tmp_path):
    source = write_dataset(tmp_path / "rows", 24, 0)
    rows_without_words(source, rows_of(source))
    with serving_writer(ErrorRates(mistakes=0.5)) as (url, _):
        captions(url, source, tmp_path / "checked")
        captions(url, source, tmp_path / "unchecked", "--no-verify")
    faulty = {
        name: sum(bool(row_faults(scene_of(tmp_path / name, row), row)) for row in rows_of(tmp_path / name))
        for name in ("checked", "unchecked")
    }
    assert faulty["checked"] == 0 < faulty["unchecked"]
    for name in faulty:
        assert len(rows_of(tmp_path / name)) + len(rows_of(tmp_path / name, "rejected.jsonl")) == 24
    rejected = rows_of(tmp_path / "checked", "rejected.jsonl")
    reasons = [row["reason"] for row in rejected if row["pass"] == "verify"]  # a caption may repeat the source's
    assert len(reasons) > 6 and any("caption wrong" in reason for reason in reasons)


# ------------------------------------------------------------------------------------------------------- what is asked


def test_only_what_is_missing_is_asked_for_and_what_is_there_is_kept(tmp_path):
    full = {"source_caption": "a chair", "target_caption": "a room", "object": "chair", "edit_type": "remove"}
    source = bare_set(
        tmp_path / "rows",
        {"instruction": "complete", **full},
        {"instruction": "no source", **full, "source_caption": ""},
        {"instruction": "no target", **full, "target_caption": "", "object": "seat"},
        {"instruction": "no object", **full, "object": ""},
        licence="MIT",
        edited_image="edited/a.png",
    )
    (source / "held_out.txt").write_text("r0\nr3\n")
    (source / "prepare.json").write_text(json.dumps({"kind": "import", "licence": "MIT"}))
    (source / "README.md").write_text("# My set\n")
    with captioning() as server:
        captions(server.url, source, tmp_path / "set")
        assert Counter(passes_of(server)) == {"look": 1, "caption": 2, "verify": 2}
    complete, no_source, no_target, no_object = rows_of(tmp_path / "set")
    assert [complete[name] for name in FILLED] == ["chair", "a chair", "a room", []]
    assert no_source["source_caption"] == good_look()["caption"] and no_source["target_caption"] == "a room"
    assert (no_target["object"], no_target["target_caption"]) == ("seat", GOOD["target_caption"])
    assert (no_object["object"], no_object["target_caption"]) == ("red chair", "a room")
    assert no_target["questions"] == GOOD["questions"]
    assert all(row["licence"] == "MIT" and "edited_image" not in row for row in rows_of(tmp_path / "set"))
    assert (tmp_path / "set" / "held_out.txt").read_text() == "r0\nr3\n"
    facts = json.loads((tmp_path / "set" / "prepare.json").read_text())
    assert facts["licence"] == "MIT" and facts["captions"]["complete_before"] == 1 and facts["captions"]["rows"] == 4
    card = (tmp_path / "set" / "README.md").read_text()
    assert card.startswith("# My set") and "| target_caption | 3 | 4 |" in card
    assert (tmp_path / "set" / "images" / "a.png").samefile(source / "images" / "a.png")


def test_what_is_in_a_photo_is_asked_once_for_all_of_its_rows(tmp_path):
    with captioning() as server:
        captions(server.url, bare_set(tmp_path / "rows"), tmp_path / "set")
        assert Counter(passes_of(server)) == {"look": 1, "caption": 2, "verify": 2}
        asked = [prompt_of(body) for body in server.bodies if form_of(body)[0] == "caption"]
    assert "instruction: remove the chair" in asked[0] and "caption of this photo: a red chair in a room" in asked[0]


def test_masks_come_along(tmp_path):
    """A set in a sub-folder of the source: names of masks are relative to the new folder, as those of photos are."""
    source = bare_set(tmp_path / "rows" / "part", mask_file_name="masks/a.png").parent
    photo(source / "part" / "masks" / "a.png", 1)
    with captioning() as server:
        captions(server.url, source, tmp_path / "set")
        (source / "part" / "masks" / "a.png").unlink()
        assert "no such file" in captions(server.url, source, tmp_path / "none", code=2)
    rows = rows_of(tmp_path / "set")
    assert [row["mask_file_name"] for row in rows] == ["part/masks/a.png"] * 2
    assert (tmp_path / "set" / "part" / "masks" / "a.png").is_file()


@pytest.mark.parametrize(
    ("change", "step", "reason"),
    [
        ({"edit_possible": False}, "caption", "edit not possible"),
        ({"target_caption": "a red chair in a room"}, "caption", "the target caption repeats the source caption"),
        ({"target_caption": "a room without the red chair"}, "caption", "mentions the object that is removed"),
        ({"questions": []}, "caption", "expected 1 to 3 questions"),
        ({"target_caption": 7}, "caption", "unreadable: expected a text in 'target_caption'"),
        ({}, "verify", "caption wrong"),
    ],
)
def test_a_row_that_cannot_be_completed_is_kept_aside(tmp_path, change, step, reason):
    def answer(name, found, body):
        removal = "remove the chair" in prompt_of(body)
        if name == "verify" and removal and not change:
            return {**found, "caption_right": False}
        return {**found, **change} if name == "caption" and removal else found

    rows = ({"instruction": "remove the chair", "edit_type": "remove"}, {"instruction": "paint it blue"})
    with captioning(answer) as server:
        said = captions(server.url, bare_set(tmp_path / "rows", *rows), tmp_path / "set")
    assert "1 of 2 rows are complete" in said
    assert [row["id"] for row in rows_of(tmp_path / "set")] == ["r1"]
    (rejected,) = rows_of(tmp_path / "set", "rejected.jsonl")
    assert (rejected["id"], rejected["pass"]) == ("r0", step) and reason in rejected["reason"]


def test_the_ceiling_of_cost_and_the_resume(tmp_path):
    rows = [{"instruction": f"paint it in colour {i}"} for i in range(20)]
    source, prices = bare_set(tmp_path / "rows", *rows), ("--price-in", 10, "--price-out", 10)
    for i in range(20):
        photo(source / "images" / f"{i}.png", i)
    lines = [json.dumps({**row, "file_name": f"images/{i}.png"}) for i, row in enumerate(rows)]
    (source / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    with captioning() as server:
        said = captions(server.url, source, tmp_path / "set", *prices, "--max-cost", 0.08, code=2)
        sent = len(server.bodies)
        assert "--max-cost 0.08" in said and 0 < sent < 60 and 0.00107 * sent <= 0.08
        assert 0 < len(rows_of(tmp_path / "set")) < 20
        captions(server.url, source, tmp_path / "set", *prices, "--max-cost", 9)
        assert len(server.bodies) == 60 and len(rows_of(tmp_path / "set")) == 20


def test_bad_input(tmp_path):
    source = bare_set(tmp_path / "rows", {"instruction": "x"}, {"instruction": "y", "file_name": "gone.png"})
    with captioning() as server:
        captions(server.url, source, tmp_path / "set")
    (rejected,) = rows_of(tmp_path / "set", "rejected.jsonl")
    assert rejected["reason"] == "no such file: gone.png"
    assert "expected a shard of npedit prepare" in run("merge-shards", tmp_path / "m", tmp_path / "set", code=2)
    outside = bare_set(tmp_path / "outside", {"instruction": "x", "file_name": "../a.png"})
    assert "metadata.jsonl:1: the name leads out" in captions(server.url, outside, tmp_path / "o", code=2)
    assert "does not exist" in captions(server.url, tmp_path / "nowhere", tmp_path / "o", code=2)
    assert "outside the folder" in captions(server.url, source, source / "set", code=2)


def test_a_photo_of_the_same_size_but_other_content_is_replaced(tmp_path):
    """A set that was stopped, or whose photos have changed since; the dates of the files say nothing."""
    source = bare_set(tmp_path / "rows", {"instruction": "x", "file_name": "a.bmp"})
    for seed in (1, 2):
        photo(tmp_path / "new.bmp", seed)
        (tmp_path / "new.bmp").replace(source / "a.bmp")
        os.utime(source / "a.bmp", (1, 1))
        with captioning() as server:
            captions(server.url, source, tmp_path / "set")
        assert (tmp_path / "set" / "a.bmp").read_bytes() == (source / "a.bmp").read_bytes()


TABLES = {
    "metadata.csv": 'file_name,instruction,reference_file_names,mask_file_name\nimages/a.png,x,"[""images/b.png""]",'
    'images/b.png\nimages/a.png,y,,\nimages/a.png,z,[]," "\n',
    "metadata.jsonl": "".join(
        json.dumps({"file_name": "images/a.png", "instruction": "x", **more}) + "\n"
        for more in (
            {"reference_file_names": ["images/b.png"], "mask_file_name": "images/b.png"},
            {"reference_file_names": None, "mask_file_name": None},
            {"reference_file_names": "[]", "mask_file_name": " "},
        )
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_empty_references_and_masks_are_none(tmp_path, table):
    source = bare_set(tmp_path / "rows")
    photo(source / "images" / "b.png", 1)
    (source / "metadata.jsonl").unlink()
    (source / table).write_text(TABLES[table])
    with captioning() as server:
        captions(server.url, source, tmp_path / "set")
    rows = rows_of(tmp_path / "set")
    assert [row["reference_file_names"] for row in rows] == [["images/b.png"], [], []]
    assert [row["mask_file_name"] for row in rows] == ["images/b.png", "", ""]


@pytest.mark.parametrize("value", [datetime(2024, 1, 1), Decimal("1.5"), [timedelta(1)]], ids=str)
def test_a_value_without_a_form_in_json_is_told_before_the_first_request(tmp_path, value):
    source = bare_set(tmp_path / "rows")
    (source / "metadata.jsonl").unlink()
    table = pa.table({"file_name": ["images/a.png"] * 2, "instruction": ["x", "y"], "taken": [None, value]})
    pq.write_table(table, source / "metadata.parquet")
    with captioning() as server:
        said = captions(server.url, source, tmp_path / "set", code=2)
        assert "metadata.parquet:2: expected values that JSON can hold" in said and "'taken'" in said
        assert not server.bodies


def test_half_a_character_in_any_column_is_told_before_the_first_request(tmp_path):
    source = bare_set(tmp_path / "rows", {"instruction": "x", "note": {"by": "a \ud83d"}})
    with captioning() as server:
        assert "metadata.jsonl:1: expected values" in captions(server.url, source, tmp_path / "set", code=2)
        assert not server.bodies


HELD_OUT_FILES = ["r0\nr2\n", "\ufeffr0\nr2\n", "r0\r\nr2\r\n", " r0 \n\n r2", "\ufeffr0 \r\n\r\nr2\t\r\n"]


@pytest.mark.parametrize("text", [*HELD_OUT_FILES, "", "\ufeff\r\n"], ids=ascii)
def test_held_out_rows_stay_held_out(tmp_path, text):
    rows = [{"instruction": f"paint it {k}", "file_name": f"images/{k}.png"} for k in range(4)]
    source = bare_set(tmp_path / "rows", *rows)
    for k in range(4):
        photo(source / "images" / f"{k}.png", k)
    (source / "held_out.txt").write_bytes(text.encode())
    with captioning() as server:
        captions(server.url, source, tmp_path / "set")
    assert (tmp_path / "set" / "held_out.txt").read_text() == ("r0\nr2\n" if text in HELD_OUT_FILES else "")


# ---------------------------------------------------------------------------------------------------- the toy's writer


def test_the_toys_captions_are_true_for_every_edit_type():
    rng = random.Random(0)
    for number in range(90):
        edit = sample_edit(rng, EDIT_TYPES[number % len(EDIT_TYPES)], held_out=number % 2 == 1)
        scene = read_photo(scene_picture(edit.reference))
        asked = {"edit_type": edit.edit_type, "instruction": edit.instruction, "source_caption": edit.source_caption}
        found = caption(scene, asked, rng, ErrorRates())
        request = read_instruction(edit.edit_type, edit.instruction)
        assert found["edit_possible"] and request
        assert is_target_caption(found["target_caption"], scene, request), (edit.instruction, found)
        assert not row_faults(scene, {**asked, **found})
    assert not caption(scene, {"edit_type": "add", "instruction": "sing a song"}, rng, ErrorRates())["edit_possible"]


def test_reading_of_a_completed_row():
    assert parse_caption(f"Sure: ```{json.dumps(GOOD)}```") == GOOD
    empty = {"object": "", "target_caption": "", "questions": []}
    assert parse_caption('{"edit_possible": "no"}') == {"edit_possible": False, **empty}
    for text in ('{"edit_possible": true}', '{"target_caption": "a"}', "no"):
        with pytest.raises(UnreadableAnswer):
            parse_caption(text)
