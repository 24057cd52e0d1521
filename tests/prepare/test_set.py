"""The set: shares, near-duplicates, shards and their merge, the data card, own types and prompts, wrong options."""

import json
import shutil
from collections import Counter

import datasets
import pytest
import yaml
from command_line import run
from PIL import Image
from writer_server import (
    good_proposal,
    passes_of,
    photo,
    photos,
    prepare,
    prompt_of,
    rows_of,
    wanted_of,
    writing,
)

from npedit.cli.prepare_progress import TimeLeft, progress_line
from npedit.errors import UserError
from npedit.prepare.prepare import Progress
from npedit.prepare.prompts import PACKAGED, load_prompts, parse_shares


def test_rejected_edits_are_replaced_by_other_types_in_a_second_round(tmp_path):
    def change(name, answer, body):
        return {**answer, "edit_possible": False} if name == "verify" and "type: text" in prompt_of(body) else answer

    words = ("--types", "add,remove,style,text", "--per-photo", 2)
    with writing(change) as server:
        prepare(server, photos(tmp_path / "photos", 10), tmp_path / "one", *words, "--rounds", 1)
        prepare(server, tmp_path / "photos", tmp_path / "two", *words)
    first, second = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(first) < 20 and len(second) == 20
    assert max(Counter(row["file_name"] for row in second).values()) == 2
    assert len({row["id"] for row in second}) == 20


def test_near_duplicates_are_left_out_or_marked_and_never_straddle(tmp_path):
    source = photos(tmp_path / "photos", 4)
    for number in range(4):
        with Image.open(source / f"{number:03d}.png") as image:
            image.save(source / f"{number:03d}-again.jpg", quality=90)
    with writing() as server:
        said = prepare(server, source, tmp_path / "one")
        assert len(rows_of(tmp_path / "one")) == 8 and "4 near-duplicates" in said
        prepare(server, source, tmp_path / "mark", "--duplicates", "mark", "--held-out", 0.25, "--types", "style")
        rows = rows_of(tmp_path / "mark")
    assert len(rows) == 16 and len({row["group"] for row in rows}) == 4
    held = (tmp_path / "mark" / "held_out.txt").read_text().split()
    assert len(held) == 4
    assert len({row["group"] for row in rows if row["id"] in held}) == 1


def test_shards_merge_to_the_set_that_one_run_makes(tmp_path):
    source = photos(tmp_path / "photos", 9)
    with Image.open(source / "000.png") as image:
        image.save(source / "aaa.jpg", quality=95)  # a near-duplicate, perhaps in another shard
    shutil.copy(source / "001.png", source / "zzz.png")  # the same bytes
    (source / "bad.png").write_bytes(b"x")
    (tmp_path / "r.csv").write_text("file_name,licence,source\n003.png,CC0,here\n")
    words = ("--rounds", 1, "--held-out", 0.3, "--licences", tmp_path / "r.csv")
    with writing() as server:
        prepare(server, source, tmp_path / "whole", *words)
        asked = len(server.bodies)
        for i in range(3):
            prepare(server, source, tmp_path / f"s{i}", *words, "--shard", f"{i}/3")
        said = run("merge-shards", tmp_path / "merged", tmp_path / "s0", tmp_path / "s1", tmp_path / "s2")
        assert "edits of 9 photos" in said
        assert rows_of(tmp_path / "merged") == rows_of(tmp_path / "whole")
        assert (tmp_path / "merged" / "held_out.txt").read_text() == (tmp_path / "whole" / "held_out.txt").read_text()
        bad = [sorted(rows_of(tmp_path / n, "bad_photos.jsonl"), key=str) for n in ("merged", "whole")]
        assert bad[0] == bad[1] and len(bad[0]) == 2
        before = len(server.bodies)
        assert before >= 2 * asked  # each shard keeps its own answers
        prepare(server, source, tmp_path / "merged", *words)
        assert len(server.bodies) == before  # the merged set holds them all
    opened = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "merged"), cache_dir=str(tmp_path / "cache"))
    assert len(opened["train"]) == 18
    run("merge-shards", tmp_path / "m", tmp_path / "s0", tmp_path / "s1", code=2)
    facts = json.loads((tmp_path / "s2" / "prepare.json").read_text())
    (tmp_path / "s2" / "prepare.json").write_text(json.dumps({**facts, "shares": {"add": 1.0}}))
    said = run("merge-shards", tmp_path / "m", *(tmp_path / f"s{i}" for i in range(3)), code=2)
    assert "shares differs" in said


def test_the_data_card_says_what_the_set_is(tmp_path):
    def change(name, answer, body):
        return {**answer, "caption_right": False} if name == "verify" and "type: add" in prompt_of(body) else answer

    source = photos(tmp_path / "photos", 4)
    photo(source / "sub" / "test" / "train.jpg", 9)
    (tmp_path / "r.csv").write_text("file_name,licence,source\n000.png,CC0,flickr\nsub/test/train.jpg,MIT,me|you\n")
    with writing(change) as server:
        words = ("--types", "add=0.25,style=0.75", "--licences", tmp_path / "r.csv", "--rounds", 1, "--per-photo", 4)
        prepare(server, source, tmp_path / "set", *words)
    card = (tmp_path / "set" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["size_categories"] == ["n<1K"] and "image-editing" in head["tags"]
    assert "| style | 0.750 | 15 | 1.000 |" in card and "5 proposed edits were rejected, 25.0%" in card
    assert f"| write | tiny | {load_prompts().write.version} |" in card and "| verify: caption wrong | 5 |" in card
    assert "| CC0 | 1 |" in card and "| me\\|you | 1 |" in card and "| not stated | 3 |" in card
    opened = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert list(opened) == ["train"] and len(opened["train"]) == 15  # a name with "test" makes no split
    assert {row["licence"] for row in opened["train"]} == {"CC0", "MIT", ""}


def test_names_in_the_table_of_licences_that_are_no_photos_are_told(tmp_path, caplog):
    """Also in a shard, where photos of the other shards are known."""
    table, source = tmp_path / "r.csv", photos(tmp_path / "photos", 6)
    names = [f"{k:03d}.png" for k in range(6)]
    with writing() as server:
        for unknown in ([], ["photos/000.png", ".\\001.png"]):
            lines = [f"{name},CC0,here" for name in [*names[2:], *(unknown or names[:2])]]
            table.write_text("\n".join(["file_name,licence,source", *lines]) + "\n")
            prepare(server, source, tmp_path / "set", "--licences", table, "--shard", "0/2")
            assert ("--licences: expected names" in caplog.text) == bool(unknown)
    assert "2 of 6 are none, such as '.\\\\001.png'" in caplog.text


def test_an_own_edit_type_with_examples_and_another_language(tmp_path):
    custom = {
        "edit_types": {"rain": {"description": "let it rain", "trained_as": "tone"}},
        "examples": ["make it pour"],
        "styles": ["in capitals"],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(custom))
    with writing() as server:
        words = ("--custom", tmp_path / "own.yaml", "--types", "rain,add", "--language", "German")
        prepare(server, photos(tmp_path / "photos", 2), tmp_path / "set", *words)
        (text, _) = [prompt_of(b) for b, name in zip(server.bodies, passes_of(server)) if name == "write"]
    assert "- rain: let it rain. Wording: in capitals." in text and "make it pour" in text and "in German" in text
    rows = rows_of(tmp_path / "set")
    assert {(row["asked_type"], row["edit_type"]) for row in rows} == {("rain", "tone"), ("add", "add")}


def test_a_scene_gets_the_other_photos_of_its_subject(tmp_path):
    for subject in ("dog", "cat"):
        photos(tmp_path / "photos" / subject, 1)
        for number in range(3):
            photo(tmp_path / "photos" / subject / f"{number}.png", 10 * number + len(subject) * (subject == "dog"))
    with writing() as server:
        words = ("--types", "scene", "--subjects", "--per-photo", 1, "--duplicates", "off", "--held-out", 0.5)
        prepare(server, tmp_path / "photos", tmp_path / "set", *words)
    rows = rows_of(tmp_path / "set")
    subject_of = {row["file_name"]: row["original_name"].partition("/")[0] for row in rows}
    for row in rows:
        assert row["edit_type"] == "scene" and len(row["reference_file_names"]) >= 2
        assert {subject_of[name] for name in row["reference_file_names"]} == {subject_of[row["file_name"]]}
        assert row["file_name"] not in row["reference_file_names"]
    assert len({row["group"] for row in rows}) == 2


def test_checks_that_need_no_model(tmp_path):
    faults = {
        "remove": {"target_caption": "a room with the red chair"},
        "style": {"target_caption": "A red chair in a room."},
        "add": {"questions": []},
        "text": {"instruction": "word " * 61},
        "shape": {"edit_type": "tone"},
        "action": {"object": ""},
    }

    def change(name, answer, body):
        if name != "write":
            return answer
        return {"proposals": [good_proposal(kind) | faults[kind] for kind in wanted_of(body)]}

    words = ("--types", ",".join(faults), "--per-photo", len(faults), "--rounds", 1)
    with writing(change) as server:
        said = prepare(server, photos(tmp_path / "photos", 1), tmp_path / "set", *words, code=2)
    assert "expected edits; got none of 1 photos" in said
    rejected = rows_of(tmp_path / "set", "rejected.jsonl")
    reasons = " | ".join(sorted(row["reason"] for row in rejected))
    for words in (
        "mentions the object that is removed",
        "repeats the source caption",
        "1 to 3 questions",
        "60 words",
        "not asked for",
        "not offered",
        "expected a text in 'object'",
    ):
        assert words in reasons
    assert all(row["pass"] == "write" for row in rejected) and "verify" not in passes_of(server)


def test_the_progress_says_time_left_counts_and_cost():
    progress = Progress("edits", 30, 90, Counter(add=20, style=3), 4, 1.234)
    line = "writing edits: 30 of 90 photos, about 4 min left | add 20 style 3 | rejected 4"
    assert progress_line(progress, False, 240) == line and progress_line(progress, True, 240) == line + " | cost 1.23"
    assert progress_line(Progress("photos", 0, 5), True, None) == "reading photos: 0 of 5 photos"


@pytest.mark.parametrize("kept", [0, 500])
def test_the_time_left_is_told_when_it_is_known_and_is_right_for_bursts(kept):
    """The workers of a cluster start for 60 s, then finish 8 photos every 10 s; kept answers are finished at once."""
    now, told = 60.0, []
    left = TimeLeft(lambda: now)
    for done in range(1, kept + 1):
        left.add(done)
    for burst in range(1, 21):
        now = 60 + 10 * burst
        for k in range(1, 9):
            left.add(kept + 8 * (burst - 1) + k)
            told.append(left.seconds(kept + 400))
    assert told[0] is None and told[7] is None and told[8] is not None
    for done, seconds in enumerate(told, 1):
        assert seconds is None or seconds == pytest.approx((400 - done) * 10 / 8, abs=10)


def test_shares_of_types():
    known = ["add", "remove", "style"]
    assert parse_shares("add=1, remove=3", known) == {"add": 0.25, "remove": 0.75}
    assert parse_shares("add,style", known) == {"add": 0.5, "style": 0.5}
    for wrong in ("ad=1", "add=x", "add=-1", "add=0", "add=nan", "add,add", "", ",", "add=inf"):
        with pytest.raises(UserError, match="--types"):
            parse_shares(wrong, known)


def test_prompts_of_the_users_own(tmp_path):
    folder = shutil.copytree(PACKAGED, tmp_path / "own")
    look = yaml.safe_load((folder / "look.yaml").read_text())
    (folder / "look.yaml").write_text(yaml.safe_dump({**look, "version": "mine-2", "user": "Look! $$5"}))
    found = load_prompts(folder)
    assert found.look.fill() == "Look! $5" and found.to_record()["look"]["version"] == "mine-2"
    assert (
        found.hashes["look"] != load_prompts().hashes["look"]
        and found.hashes["verify"] == load_prompts().hashes["verify"]
    )
    (folder / "look.yaml").write_text(yaml.safe_dump({**look, "user": "see $photo"}))
    with pytest.raises(UserError, match=r"look\.yaml; got \$photo"):
        load_prompts(folder)
    (folder / "look.yaml").write_text("version: 1\n")
    with pytest.raises(UserError, match=r"(?s)look\.yaml: system: .*user: "):
        load_prompts(folder)
    (folder / "look.yaml").unlink()
    with pytest.raises(UserError, match="expected a file"):
        load_prompts(folder)
    (tmp_path / "c.yaml").write_text("langage: French\n")
    with pytest.raises(UserError, match="Did you mean 'language'"):
        load_prompts(custom=tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("edit_types: {rain: {trained_as: ton}}\n")
    with pytest.raises(UserError, match="Did you mean 'tone'"):
        load_prompts(custom=tmp_path / "c.yaml")


WRONG_VALUES = [
    {"temperature": "warm"}, {"temperature": -1}, {"max_tokens": None}, {"edit_types": ["add"]}, {"edit_types": "add"},
    {"edit_types": {"add": 3}}, {"styles": "plain"}, {"examples": "hello"}, {"language": ["French"]}, {"verson": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_VALUES, ids=str)
def test_a_wrong_value_in_a_prompts_file_is_named(tmp_path, change):
    """In a folder of prompts; the keys that a small file may have, there too."""
    (key,) = change
    folder = shutil.copytree(PACKAGED, tmp_path / "own")
    write = yaml.safe_load((folder / "write.yaml").read_text())
    (folder / "write.yaml").write_text(yaml.safe_dump(write | change))
    with pytest.raises(UserError, match=rf"--prompts, .*write\.yaml: {key}"):
        load_prompts(folder)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(UserError, match=rf"--custom, .*c\.yaml: {key}"):
        load_prompts(custom=tmp_path / "c.yaml")


SERVER = ("--writer", "http://localhost:1/v1")
MODEL = (*SERVER, "--writer-model", "m")


@pytest.mark.parametrize(
    "words, message",
    [
        (["photos"], "--out SET"),
        (["photos", "--out", "set"], "expected --writer"),
        (["nowhere", "--out", "set", *MODEL], "folder of photos"),
        (["photos", "--out", "photos/set", *MODEL], "outside"),
        (["photos", "--out", "full", *MODEL], "new folder"),
        (["photos", "--out", "set", *SERVER], "--writer-model"),
        (["photos", "--out", "set", "--writer", "nowhere", "--writer-model", "m"], "local model"),
        (["photos", "--out", "set", *SERVER, "--max-cost", 3], "--price-in"),
        (["photos", "--out", "set", *SERVER, "--shard", "3/3"], "--shard"),
        (["photos", "--out", "set", *SERVER, "--duplicates", "some"], "one, mark or off"),
        (["photos", "--out", "set", *SERVER, "--types", "ad"], "Did you mean 'add'"),
        (["photos", "--out", "set", *MODEL, "--writer-parameters", "[]"], "--writer-parameters: expected"),
        (["photos", "--out", "set", *MODEL, "--dry-run", 2, "--json"], "leave one out"),
        (["photos", "--out", "set", *MODEL, "--licences", "nowhere.csv"], "csv file"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert message in run("prepare", *words, code=2)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    assert "finished shard in" in run("merge-shards", tmp_path / "set", tmp_path / "nowhere", code=2)
