"""`npedit prepare` from photos to a set that `datasets` opens, with a real server on this machine."""

from collections import Counter

import datasets
import pytest
from judge_server import images_of
from PIL import Image
from writer_server import passes_of, photo, photos, prepare, prompt_of, rows_of, writing

from npedit.data import imagefolder


def test_photos_become_a_set_that_datasets_and_training_open(tmp_path):
    with writing() as server:
        said = prepare(server, photos(tmp_path / "photos", 6), tmp_path / "set", "--held-out", 0.2)
    rows = rows_of(tmp_path / "set")
    assert len(rows) == 12 and "12 edits of 6 photos" in said
    assert Counter(passes_of(server)) == {"look": 6, "write": 6, "verify": 12}
    opened = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert set(opened) == {"train"} and len(opened["train"]) == 12
    first = opened["train"][0]
    assert first["image"].size == (48, 32) and first["questions"][0]["answer"] == "yes"
    settings = imagefolder.Settings(path=str(tmp_path / "set"), sizes=((32, 48),), held_out="held_out.txt", prefetch=0)
    source = imagefolder.Source(settings, 0)
    held = (tmp_path / "set" / "held_out.txt").read_text().split()
    assert held and source.batch(0, 2).references.shape == (2, 3, 32, 48)


def test_a_set_of_rare_suffixes_is_opened_too(tmp_path):
    for number, (suffix, kind) in enumerate(((".jpe", "JPEG"), (".jfif", "JPEG"), (".avif", "AVIF"))):
        photo(tmp_path / "photos" / f"{number}{suffix}", number, format=kind)
    with writing() as server:
        prepare(server, tmp_path / "photos", tmp_path / "set", "--types", "add,style", "--held-out", 0)
    opened = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert [row["image"].size for row in opened["train"]] == [(48, 32)] * 6
    settings = imagefolder.Settings(path=str(tmp_path / "set"), sizes=((32, 48),), prefetch=0)
    assert imagefolder.Source(settings, 0).batch(0, 6).references.shape == (6, 3, 32, 48)


def test_what_is_sent_is_small_and_without_exif(tmp_path):
    exif = Image.Exif()
    exif[0x8298] = "somebody"
    exif.get_ifd(0x8825)[1] = "N"
    photo(tmp_path / "photos" / "a.jpg", 1, (300, 200), exif=exif)
    with writing() as server:
        prepare(server, tmp_path / "photos", tmp_path / "set", "--side", 64)
    for body in server.bodies:
        user = {"messages": [m for m in body["messages"] if m["role"] == "user"]}
        (sent,) = images_of(user)
        assert sent.size == (64, 43) and not dict(sent.getexif()) and "exif" not in sent.info
    assert rows_of(tmp_path / "set")[0]["licence"] == "somebody"


def test_a_second_run_asks_nothing(tmp_path):
    with writing() as server:
        prepare(server, photos(tmp_path / "photos", 3), tmp_path / "set")
        before = (tmp_path / "set" / "metadata.jsonl").read_bytes(), len(server.bodies)
        said = prepare(server, tmp_path / "photos", tmp_path / "set")
        assert ((tmp_path / "set" / "metadata.jsonl").read_bytes(), len(server.bodies)) == before
        assert "0 requests in this run" in said


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"object_present": False}, "object not present"),
        ({"edit_possible": False, "reason": "no sky"}, "edit not possible (no sky)"),
        ({"caption_right": False}, "caption wrong"),
        ({"answers": ["yes"]}, "no question tells"),
        ({"answers": []}, "unreadable"),
    ],
)
def test_rejected_rows_are_kept_aside(tmp_path, fault, reason):
    def change(name, answer, body):
        return {**answer, **fault} if name == "verify" and "type: remove" in prompt_of(body) else answer

    with writing(change) as server:
        prepare(server, photos(tmp_path / "photos", 2), tmp_path / "set", "--types", "remove,style", "--rounds", 1)
    assert {row["edit_type"] for row in rows_of(tmp_path / "set")} == {"style"}
    rejected = rows_of(tmp_path / "set", "rejected.jsonl")
    assert len(rejected) == 2 and all(row["pass"] == "verify" and reason in row["reason"] for row in rejected)
    assert "photo" in rejected[0] and rejected[0]["file"].endswith(".png")
