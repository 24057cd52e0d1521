"""Metadata in csv and parquet, and names of files as people write them: the rows that `datasets` finds."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.photo_sets import opened, plain, refused, row, save, write_metadata


def write_csv(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_parquet(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


WRITERS = {"jsonl": write_metadata, "csv": write_csv, "parquet": write_parquet}
NAMES = ["a.png", "./b.png", "sub/c.png", "./sub//d.png", "sub\\e.png"]


def make(folder, kind, names=NAMES, **more):
    for number, name in enumerate(names):
        save(folder, name.replace("\\", "/"), plain(64, 64, (40 * number, 0, 90)))
    texts = ["rot, blau", 'say "hi"', "two\nlines", "grün", "5"]
    return WRITERS[kind](folder, [row(n, id=f"i{k}", instruction=texts[k], **more) for k, n in enumerate(names)])


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_has_the_rows_and_pictures_that_datasets_finds(tmp_path, kind):
    folder = make(tmp_path / "photos", kind)
    source = opened(folder)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    assert [(r.id, r.instruction) for r in source.rows] == [(r["id"], r["instruction"]) for r in loaded]
    assert not source.bad_rows
    pictures = {i: b.references[0, :, 0, 0] for b in (source.batch(k, 1) for k in range(5)) for i in b.ids}
    for item in loaded:
        assert tuple((pictures[item["id"]] * 255).round().int().tolist()) == item["image"].getpixel((0, 0))


def test_every_format_gives_the_same_examples_in_the_same_order(tmp_path):
    orders = []
    for kind in WRITERS:
        source = opened(make(tmp_path / kind, kind), nothing_share=0.3)
        orders.append([(b.ids, b.instructions) for b in (source.batch(k, 2) for k in range(12))])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, kind):
    rows = [row("a.png"), row("b.png", edit_type="recolor")]
    place = {"jsonl": "metadata.jsonl:2:", "csv": "metadata.csv:3:", "parquet": "metadata.parquet:2:"}[kind]
    assert place in refused(WRITERS[kind](tmp_path, rows))


def test_a_csv_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "metadata.csv"
    file.write_text("file_name,instruction\na.png,one, two\n")
    assert "metadata.csv:2: expected 2 fields" in refused(tmp_path)
    file.write_bytes("file_name,instruction\na.png,färbe\n".encode("latin-1"))
    assert "csv in UTF-8" in refused(tmp_path)
    file.write_text('file_name,instruction\na.png,"open\n')
    assert "metadata.csv:2: expected csv" in refused(tmp_path)
    file.write_text("file_name,instruction\n")
    assert "at least one row" in refused(tmp_path)


def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and nothing else")
    assert "metadata.parquet: expected a parquet file" in refused(tmp_path)


def test_a_missing_caption_is_named_by_file_and_line(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, name, plain(64, 64))
    source = opened(write_csv(tmp_path, [row("a.png"), row("b.png") | {"target_caption": ""}]))
    assert not source.has_target_captions and not source.has_source_captions
    assert source.rows_without("target_caption") == f"1 of 2 rows without it: {tmp_path / 'metadata.csv'}:3"
    assert source.rows_without("source_caption").startswith("2 of 2 rows")


QUESTIONS = [{"question": "Is it blue?", "answer": "Yes"}, {"question": "Is a dog there?", "answer": "no"}]


@pytest.mark.parametrize("kind", WRITERS)
def test_questions_and_further_references_are_carried_through(tmp_path, kind):
    extra, questions = ["sub/c.png", "./b.png"], QUESTIONS
    if kind == "csv":
        extra, questions = json.dumps(extra), json.dumps(questions)
    source = opened(make(tmp_path, kind, reference_file_names=extra, questions=questions))
    batch = source.batch(0, 2)
    assert batch.extra_references.shape == (2, 2, 3, 64, 64)
    assert [round(float(v) * 255) for v in batch.extra_references[0, :, 0, 0, 0]] == [80, 40]
    assert json.loads(batch.questions[0]) == [dict(q, answer=q["answer"].lower()) for q in QUESTIONS]
    assert len(batch.slice(0, 1).extra_references) == 1


def test_a_batch_has_examples_with_one_number_of_references(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path, name, plain(64, 64))
    rows = [row("a.png", id="a"), row("b.png", id="b", reference_file_names=["c.png"]), row("c.png", id="c")]
    source = opened(write_metadata(tmp_path, rows))
    batches = [source.batch(i, 2) for i in range(12)]
    assert {(set(b.ids) <= {"b"}, b.extra_references is not None) for b in batches} == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reference_file_names": "c.png"}, "list of file names"),
        ({"reference_file_names": [3]}, "list of file names"),
        ({"questions": [{"question": "Is it blue?"}]}, '"answer"'),
        ({"questions": "is it blue?"}, '"question"'),
        ({"instruction": "half \ud800"}, "lone surrogate"),
    ],
)
def test_wrong_lists_are_named(tmp_path, more, words):
    save(tmp_path, "a.png", plain(64, 64))
    message = refused(write_metadata(tmp_path, [row("a.png"), row("a.png", **more)]))
    assert "metadata.jsonl:2:" in message and words in message


def test_a_reference_that_is_missing_or_leads_out_makes_a_bad_row(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    rows = [row("a.png"), row("a.png", reference_file_names=["gone.png"]), row("a.png", reference_file_names=["../x"])]
    reasons = [bad["reason"] for bad in opened(write_metadata(tmp_path, rows), max_bad_share=0.9).bad_rows]
    assert reasons == ["reference 'gone.png': no such file", "reference '../x': the name leads out of the data folder"]
