"""Which folder becomes a set: no command replaces a set of another one; merges of shards."""

import json
import shutil

import pytest
from command_line import run
from judge_server import images_of
from writer_server import photo, prepare, rows_of, writing

from npedit.prepare.photos import choose_shard

MODEL = ("--writer", "http://localhost:1/v1", "--writer-model", "m")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of photos, and of each kind of set one: prepared, its two shards, captioned, imported."""
    folder = tmp_path_factory.mktemp("sets")
    for name, start in (("photos", 0), ("others", 20)):
        for number in range(6):
            photo(folder / name / f"{number}.png", start + number)
    texts = {"instruction": "mine", "source_caption": "x", "target_caption": "y"}
    rows = [json.dumps({"file_name": f"{k}.png", **texts}) for k in range(6)]
    (folder / "others" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    run("import", "columns", folder / "others" / "metadata.jsonl", "--out", folder / "imported")
    with writing() as server:
        prepare(server, folder / "photos", folder / "prepared")
        for i in range(2):
            prepare(server, folder / "photos", folder / f"s{i}", "--shard", f"{i}/2")
    run("caption", folder / "others", "--out", folder / "captioned", *MODEL)  # nothing is missing, nothing is asked
    return folder


def all_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {
    "prepare": ["prepare", "others", "--out"],
    "dry run": ["prepare", "others", "--dry-run", 1, "--out"],
    "own photos": ["prepare", "imported/images", "--out"],
    "caption": ["caption", "imported", "--out"],
    "merge": ["merge-shards", "OUT", "s0", "s1"],
}


@pytest.mark.parametrize("made", ["prepared", "s0", "captioned", "imported"])
@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_set_is_not_replaced_by_another_one(sets, tmp_path, monkeypatch, command, older, made):
    """`older`: the set has no begun.json. Then its photos are not known, and the command that began it goes on."""
    begun_by = {"prepared": "prepare", "s0": "prepare", "captioned": "caption"}.get(made)
    if older and COMMANDS[command][0] == begun_by:
        pytest.skip("older sets can be resumed")
    folder = shutil.copytree(sets, tmp_path / "sets")
    monkeypatch.chdir(folder)
    for name in ("prepared", "s0", "s1", "captioned") if older else ():
        (folder / name / "begun.json").unlink()
    before = all_bytes(folder / made)
    words = COMMANDS[command]
    words = [made if word == "OUT" else word for word in words] if "OUT" in words else [*words, made]
    said = run(*words, *(MODEL if command != "merge" else ()), code=2)
    assert "expected a new folder for the set" in said or "outside" in said
    assert all_bytes(folder / made) == before


def test_sets_that_an_older_npedit_began_go_on(sets, tmp_path):
    """Finished, merged, and stopped before prepare.json was written."""
    folder = shutil.copytree(sets, tmp_path / "sets")
    for name in ("prepared", "s0", "s1", "captioned"):
        (folder / name / "begun.json").unlink()
    with writing() as server:
        for lost in ((), ("prepare.json",), ("photos.jsonl",)):
            for name in lost:
                (folder / "prepared" / name).unlink()
            prepare(server, folder / "photos", folder / "prepared")
            (folder / "prepared" / "begun.json").unlink()
        run("merge-shards", folder / "merged", folder / "s0", folder / "s1")
        prepare(server, folder / "photos", folder / "merged")
        assert not server.bodies
    assert rows_of(folder / "merged") == rows_of(folder / "prepared") == rows_of(sets / "prepared")


def test_a_merge_that_was_killed_is_repeated_and_then_prepare_goes_on(sets, tmp_path):
    shards = [sets / "s0", sets / "s1"]
    run("merge-shards", tmp_path / "set", *shards)
    rows = rows_of(tmp_path / "set")
    (tmp_path / "killed").mkdir()
    begun = {"command": "merge-shards", "sources": [str(shard.resolve()) for shard in shards]}
    (tmp_path / "killed" / "begun.json").write_text(json.dumps(begun))
    (tmp_path / "killed" / "answers.jsonl.tmp").write_text("half")
    assert "begun from" in run("merge-shards", tmp_path / "killed", *shards[::-1], code=2)
    run("merge-shards", tmp_path / "killed", *shards)
    assert rows_of(tmp_path / "killed") == rows
    assert "has begun from" in run("merge-shards", tmp_path / "set", *shards, code=2)


@pytest.mark.parametrize("photos_left", [True, False])
def test_shards_of_subjects_merge_although_a_photo_has_no_row(tmp_path, photos_left):
    """The photo is in no shard; the merge takes it from the folder of photos, or leaves it out."""

    def change(name, answer, body):
        (sent,) = images_of({"messages": [m for m in body["messages"] if m["role"] == "user"]})
        return {"proposals": []} if name == "write" and sent.size[0] == 49 else answer

    source = tmp_path / "photos"
    for number in range(6):
        photo(source / "dog" / f"{number}.png", number, (48 + number, 32))
    photo(source / next(n for n in (f"cat/{k}.png" for k in range(99)) if choose_shard([n], (1, 3))), 7, (70, 32))
    assert choose_shard([f"dog/{k}.png" for k in range(6)], (1, 3)) == ["dog/1.png"]  # so the merge needs the folder
    words = ("--types", "scene", "--subjects", "--per-photo", 1, "--rounds", 1, "--held-out", 0)
    with writing(change) as server:
        prepare(server, source, tmp_path / "whole", *words)
        for i in range(3):
            prepare(server, source, tmp_path / f"s{i}", *words, "--shard", f"{i}/3")
    if not photos_left:
        source.rename(tmp_path / "moved")
    run("merge-shards", tmp_path / "merged", *(tmp_path / f"s{i}" for i in range(3)))
    (unused,) = [p["id"] for p in rows_of(tmp_path / "whole", "photos.jsonl") if p["width"] == 49]
    merged, whole = rows_of(tmp_path / "merged"), rows_of(tmp_path / "whole")
    dogs = [row for row in whole if row["reference_file_names"]]
    assert all(any(unused in name for name in row["reference_file_names"]) for row in dogs)
    if not photos_left:
        assert sorted(len(row["reference_file_names"]) for row in merged) == [0, 4, 4, 4, 4, 4]
        assert not any(unused in name for row in merged for name in row["reference_file_names"])
    else:
        assert merged == whole
    for row in merged:
        assert all((tmp_path / "merged" / name).is_file() for name in row["reference_file_names"])
