"""A person's review of a prepared set: what each decision leaves in the set's files."""

import json
import shutil

import pytest
from photo_sets import opened, plain, row, save, write_metadata
from writer_server import photos, prepare, rows_of, writing

from npedit.errors import UserError
from npedit.prepare.card import write_card
from npedit.runs.lock import hold
from npedit.serve.review_set import describe_progress, open_review, questions_as_text, questions_from_text

FILES = ("metadata.jsonl", "rejected.jsonl", "held_out.txt")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")

    def change(name, answer, body):
        return {**answer, "edit_possible": False} if name == "verify" and "style" in json.dumps(body) else answer

    with writing(change) as server:
        words = ("--types", "add,style,recolour", "--held-out", 0.3, "--rounds", 1)
        prepare(server, photos(folder / "photos", 8), folder / "set", *words)
    assert rows_of(folder / "set", "rejected.jsonl") and (folder / "set" / "held_out.txt").read_text()
    return folder / "set"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "set")


def texts(folder):
    return {name: (folder / name).read_text() for name in FILES}


def facts(folder):
    return json.loads((folder / "prepare.json").read_text())


def card(folder):
    return (folder / "README.md").read_text()


def decisions(folder):
    return [(d["id"], d["state"]) for d in rows_of(folder, "review.jsonl")]


def test_an_accepted_row_stays_as_it_is_and_the_review_goes_on_there(folder):
    before = texts(folder)
    with open_review(folder) as review:
        ids = [entry.id for entry in review.entries]
        assert review.next_unseen() == 0
        shown = review.entries[0].fields()
        assert review.accept(ids[0], shown, shown) == "accepted"
        assert review.accept(ids[2]) == "accepted"
    assert texts(folder) == before and decisions(folder) == [(ids[0], "accepted"), (ids[2], "accepted")]
    with open_review(folder) as review:
        assert review.next_unseen() == 1 and review.next_unseen(1) == 3
        assert review.counts() == {"rows": len(ids), "seen": 2, "accepted": 2, "mended": 0, "rejected": 0}
        for id in ids:
            review.accept(id)
        assert review.next_unseen() is None
        assert describe_progress(review.counts()).startswith(f"{len(ids)} of {len(ids)} rows seen")
    assert "No person has read them" not in card(folder)
    assert f"A person has read {len(ids)} of {len(ids)} rows" in card(folder)


def test_mending_changes_the_fields_of_one_row_alone(folder):
    before = (folder / "metadata.jsonl").read_text().splitlines()
    with open_review(folder) as review:
        entry = review.entries[1]
        shown = entry.fields()
        given = shown | {"instruction": " make it  blé ", "questions": "No | is it red?\nyes | is it blue?"}
        assert review.accept(entry.id, shown, given) == "mended"
        assert review.accept(entry.id) == "mended"  # a second look keeps what was said
    after = (folder / "metadata.jsonl").read_text().splitlines()
    old, new = json.loads(before[1]), json.loads(after[1])
    assert after[:1] + after[2:] == before[:1] + before[2:] and list(new) == list(old)
    questions = [{"question": "is it red?", "answer": "no"}, {"question": "is it blue?", "answer": "yes"}]
    assert new == old | {"instruction": "make it  blé", "questions": questions}
    first = rows_of(folder, "review.jsonl")[0]
    assert first["before"] == {"instruction": old["instruction"], "questions": old["questions"]}
    assert opened(folder).rows[1].instruction == "make it  blé"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edit_type": "remove", "object": ""}, "expected an 'object'"),
        ({"edit_type": "recolor it"}, "no question is known"),
        ({"instruction": " "}, "empty"),
        ({"instruction": "a \ud800"}, "surrogate"),
        ({"questions": "perhaps | is it red?"}, "'yes | QUESTION'"),
        ({"questions": "yes, all | is it red?"}, "'yes, both | QUESTION'"),
        ({"questions": "yes, | is it red?"}, "'yes, both | QUESTION'"),
    ],
)
def test_a_mended_row_must_be_one_that_training_takes(folder, changes, words):
    before = texts(folder)
    with open_review(folder) as review:
        entry = review.entries[0]
        with pytest.raises(UserError, match=words):
            review.accept(entry.id, entry.fields(), entry.fields() | changes)
        assert not entry.state and review.next_unseen() == 0
    assert texts(folder) == before and not (folder / "review.jsonl").exists()


def test_a_rejected_row_leaves_the_set_and_can_be_taken_back_later(folder):
    before, old = texts(folder), facts(folder)
    held = before["held_out.txt"].split()
    with open_review(folder) as review:
        ids = [entry.id for entry in review.entries]
        with pytest.raises(UserError, match="reason"):
            review.reject(held[0], "  ")
        for id in (held[0], ids[0], ids[-1]):
            review.reject(id, "wrong object: chair")
    gone = {held[0], ids[0], ids[-1]}
    assert [r["id"] for r in rows_of(folder)] == [id for id in ids if id not in gone]
    assert held[0] not in (folder / "held_out.txt").read_text().split()
    rejected = rows_of(folder, "rejected.jsonl")
    assert (folder / "rejected.jsonl").read_text().startswith(before["rejected.jsonl"])
    assert {r["id"] for r in rejected if r["pass"] == "review"} == gone
    new = facts(folder)
    assert new["counts"]["rows"] == old["counts"]["rows"] - len(gone)
    assert new["counts"]["rejected"] == old["counts"]["rejected"] + len(gone)
    assert new["counts"]["reasons"]["review: wrong object"] == len(gone)
    assert sum(new["counts"]["rows_by_type"].values()) == new["counts"]["rows"]
    assert new["held_out"] == len((folder / "held_out.txt").read_text().split())
    assert card(folder).startswith(write_card(new).rstrip()) and f"{len(gone)} rejected" in card(folder)
    opened(folder, held_out="held_out.txt")  # training reads the set without the rejected rows
    with open_review(folder) as review:
        assert [entry.id for entry in review.entries] == ids and review.counts()["rejected"] == len(gone)
        for id in gone:
            assert review.accept(id) == "accepted"
    assert (folder / "metadata.jsonl").read_text() == before["metadata.jsonl"]
    assert (folder / "rejected.jsonl").read_text() == before["rejected.jsonl"]
    assert sorted((folder / "held_out.txt").read_text().split()) == sorted(held)
    assert facts(folder)["counts"] == old["counts"]


def test_a_row_that_a_power_failure_left_in_both_files_is_one_of_the_set(folder):
    before = texts(folder)
    with open_review(folder) as review:
        review.reject(review.entries[0].id, "dark")
        review.reject(review.entries[1].id, "dark")
    (folder / "metadata.jsonl").write_text(before["metadata.jsonl"])
    with open_review(folder) as review:
        assert [entry.line for entry in review.entries] == before["metadata.jsonl"].splitlines()
        assert review.counts()["seen"] == 0
        review.reject(review.entries[0].id, "dark")
    assert len(rows_of(folder)) == len(before["metadata.jsonl"].splitlines()) - 1


def test_a_failed_write_changes_nothing_and_can_be_repeated(folder):
    before = texts(folder)
    with open_review(folder) as review:
        entry = review.entries[0]
        given = entry.fields() | {"instruction": "make it blue"}
        blocked = folder / "metadata.jsonl.tmp"
        blocked.mkdir()
        for decide in (lambda: review.accept(entry.id, entry.fields(), given), lambda: review.reject(entry.id, "bad")):
            with pytest.raises(UserError, match="can be written"):
                decide()
            assert not entry.state and entry.fields()["instruction"] != "make it blue"
        blocked.rmdir()
        assert (folder / "metadata.jsonl").read_text() == before["metadata.jsonl"]
        assert review.accept(entry.id, entry.fields(), given) == "mended"
    assert rows_of(folder)[0]["instruction"] == "make it blue"


def test_one_process_at_a_time_and_no_new_set_over_a_review(folder, prepared):
    with hold(folder, "prepare"), pytest.raises(UserError, match="held by"), open_review(folder):
        pass
    with open_review(folder) as review, pytest.raises(UserError, match="held by"), hold(folder, "train"):
        pass
    with open_review(folder) as review:
        review.accept(review.entries[0].id)
    with writing() as server:
        said = prepare(server, prepared.parent / "photos", folder, code=2)
    assert "no person has reviewed" in said


def test_a_set_of_another_origin_keeps_its_columns_and_its_card(tmp_path):
    save(tmp_path, "a.png", plain(64, 64)), save(tmp_path, "b.png", plain(64, 64))
    write_metadata(tmp_path, [row("a.png", id=1, weight=0.1), row("b.png", id="b", reason="mine", position=9)])
    (tmp_path / "README.md").write_text("# Mine\n")
    with open_review(tmp_path) as review:
        shown = review.entries[1].fields()
        review.accept("b", shown, shown | {"object": "", "source_caption": "grey"})
        review.reject("1", "dull")
        with pytest.raises(UserError, match="last one"):
            review.reject("b", "dull")
    assert rows_of(tmp_path) == [row("b.png", id="b", reason="mine", position=9, source_caption="grey")]
    assert card(tmp_path).startswith("# Mine\n\n## Review by a person\n\nA person has read 2 of 2 rows")
    assert card(tmp_path).count("## Review") == 1 and not (tmp_path / "prepare.json").exists()
    with open_review(tmp_path) as review:
        review.accept("1")
    assert rows_of(tmp_path)[0] == row("a.png", id=1, weight=0.1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("a.png")], "each row an id"),
        ([row("a.png", id="1"), row("b.png", id="1")], "each id once"),
        (["{"], "expected JSON"),
    ],
)
def test_a_set_that_cannot_be_reviewed_is_told(tmp_path, rows, words):
    write_metadata(tmp_path, rows)
    with pytest.raises(UserError, match=words), open_review(tmp_path):
        pass


def test_a_table_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,instruction,id\na.png,make it blue,1\n")
    with pytest.raises(UserError, match=r"one metadata\.jsonl"), open_review(tmp_path):
        pass


def test_questions_as_text_and_back():
    questions = [{"question": "is it | red?", "answer": "no"}, {"question": "blue?", "answer": "yes"}]
    assert questions_from_text(questions_as_text(questions)) == questions
    assert questions_as_text(json.dumps(questions)) == questions_as_text(questions)
    assert questions_as_text(None) == "" and questions_from_text("\n \n") == []


def test_a_mended_question_leaves_the_pictures_of_all_questions(tmp_path):
    both = {"question": "the same dog, or both?", "answer": "yes", "images": "both"}
    asked = [{"question": "a hat ther?", "answer": "yes"}, both, both | {"answer": "no"}]
    save(tmp_path, "a.png", plain(64, 64))
    write_metadata(tmp_path, [row("a.png", id="a", questions=asked)])
    with open_review(tmp_path) as review:
        shown = review.entries[0].fields()
        assert shown["questions"].splitlines()[1] == "yes, both | the same dog, or both?"
        review.accept("a", shown, shown | {"questions": shown["questions"].replace("ther?", "there?")})
    assert rows_of(tmp_path)[0]["questions"] == [asked[0] | {"question": "a hat there?"}, *asked[1:]]
    assert questions_from_text("No,BOTH| a | b") == [{"question": "a | b", "answer": "no", "images": "both"}]


@pytest.mark.parametrize("first", ["", "\ufeff"], ids=["", "BOM"])
def test_windows_line_ends_stay(tmp_path, first):
    for name in "abc":
        save(tmp_path, f"{name}.png", plain(64, 64))
    lines = [json.dumps(row(f"{name}.png", id=name)) + "\r\n" for name in "abc"]
    write = (tmp_path / "metadata.jsonl").write_bytes
    write((first + "".join(lines)).encode())
    (tmp_path / "rejected.jsonl").write_bytes(b'{"id": "x", "pass": "write", "reason": "r"}\r\n')
    with open_review(tmp_path) as review:
        shown = review.entries[1].fields()
        review.accept("b", shown, shown | {"instruction": "y"})
        review.reject("c", "dull")
    lines[1] = lines[1].replace("make it blue", "y")
    assert (tmp_path / "metadata.jsonl").read_bytes().decode() == first + "".join(lines[:2])
    assert (tmp_path / "rejected.jsonl").read_bytes().startswith(b'{"id": "x", "pass": "write", "reason": "r"}\r\n{')
    with open_review(tmp_path) as review:
        review.accept("c")
    assert (tmp_path / "metadata.jsonl").read_bytes().decode() == first + "".join(lines)


@pytest.mark.parametrize("text", ["\ufeffa\nb\nc\n", "a\r\nb\r\nc\r\n", "\ufeff a \r\n\r\nb\t\r\nc"], ids=ascii)
def test_held_out_ids_are_read_as_training_reads_them(tmp_path, text):
    for name in "abcdef":
        save(tmp_path, f"{name}.png", plain(64, 64))
    write_metadata(tmp_path, [row(f"{name}.png", id=f" {name} ") for name in "abcdef"])
    (tmp_path / "held_out.txt").write_bytes(text.encode())
    with open_review(tmp_path) as review:
        review.reject("a", "dull"), review.reject("b", "dull")
        assert (tmp_path / "held_out.txt").read_text() == "c\n"
        assert [entry.held_out for entry in review.entries[:3]] == [True, True, False]
        opened(tmp_path, held_out="held_out.txt")
        review.accept("a")
    assert (tmp_path / "held_out.txt").read_text() == "c\na\n"
    opened(tmp_path, held_out="held_out.txt")
