"""Importers of public data sets: the real column names, small files of the very forms, and no edited image opened."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run as npedit
from edit_sets import NO_PICTURE, photo, pixels_of, rows_of, write_file, write_lines, write_parquet
from opened_files import opened_files

from npedit.cli.import_set import FORMATS
from npedit.errors import UserError
from npedit.interop.edit_words import read_edit_type, read_removed_object
from npedit.interop.import_set import import_set, report_lines
from npedit.interop.set_forms import FORMS

# ---- parquet sets


def test_omniedit(tmp_path):
    source = tmp_path / "omni"
    common = {"edited_img": NO_PICTURE, "width": 16, "height": 12, "sc_score_1": 9, "pq_score": 9, "o_score": 9.0}
    rows = [
        {"omni_edit_id": "task_obj_add_1", "task": "addition", "src_img": photo(1), **common}
        | {"edited_prompt_list": ["Add a red kite in the sky", "A red kite should fly there"]},
        {"omni_edit_id": "task_obj_remove_2", "task": "removal", "src_img": photo(2, "JPEG"), **common}
        | {"edited_prompt_list": ["Remove the small dog from the grass."]},
        {"omni_edit_id": "env_3", "task": "env", "src_img": photo(1), **common}
        | {"edited_prompt_list": ["Make it a snowy day"]},
    ]
    write_parquet(source / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(source / "data" / "train-00001-of-00002.parquet", rows[2:])
    write_parquet(source / "data" / "dev-00000-of-00001.parquet", rows)
    report = import_set("omniedit", source, tmp_path / "set")
    found = rows_of(tmp_path / "set")
    assert [(r["id"], r["edit_type"], r["object"], r["instruction"]) for r in found] == [
        ("task_obj_add_1", "add", "", "Add a red kite in the sky"),
        ("task_obj_remove_2", "remove", "small dog", "Remove the small dog from the grass."),
        ("env_3", "tone", "", "Make it a snowy day"),
    ]
    assert [pixels_of(tmp_path / "set", r) for r in found] == [photo(1), photo(2, "JPEG"), photo(1)]
    assert found[0]["group"] == found[2]["group"] != found[1]["group"] and found[1]["file_name"].endswith(".jpg")
    assert report.rows == 3 and report.photos == 2
    said = "\n".join(report_lines(report))
    assert "target_caption is empty in 3 of 3 rows" in said and "source_caption is empty in 3 of 3" in said
    assert "dev-00000-of-00001.parquet" in said and "edited_img" in said
    assert found[0]["licence"] == "MIT" and found[0]["target_caption"] == ""


def test_magicbrush_takes_the_turns_that_edit_a_photo(tmp_path):
    rows = [
        {"img_id": "7", "turn_index": turn, "source_img": photo(turn), "mask_img": NO_PICTURE}
        | {"instruction": f"turn {turn}", "target_img": NO_PICTURE}
        for turn in (1, 2, 3)
    ]
    report = import_set("magicbrush", write_parquet(tmp_path / "train-0.parquet", rows), tmp_path / "set")
    (row,) = rows_of(tmp_path / "set")
    assert (row["id"], row["instruction"], row["edit_type"]) == ("7-1", "turn 1", "other")
    assert report.skipped == {"a later turn: it edits an edited image": 2}
    assert [r["pass"] for r in rows_of(tmp_path / "set", "rejected.jsonl")] == ["import"] * 2


@pytest.mark.parametrize(
    ("form", "row"),
    [
        (
            "instructpix2pix",
            {"original_prompt": "a lake", "original_image": photo(1), "edit_prompt": "make it night"}
            | {"edited_prompt": "a lake at night", "edited_image": NO_PICTURE},
        ),
        (
            "ultraedit",
            {"clip_sim_source": 0.3, "dinov2_sim": 0.9, "ssim": 0.5, "source_caption": "a lake", "idx": 5}
            | {"target_caption": "a lake at night", "edit_prompt": "make it night", "source_image": photo(1)}
            | {"edited_image": NO_PICTURE},
        ),
        (
            "promptrl",
            {"image": photo(1), "prompt": "make it night", "caption": "a lake", "target_caption": "a lake at night"},
        ),
    ],
)
def test_sets_with_captions(tmp_path, form, row):
    report = import_set(form, write_parquet(tmp_path / "train-0.parquet", [row]), tmp_path / "set")
    (found,) = rows_of(tmp_path / "set")
    words = {k: found[k] for k in ("instruction", "source_caption", "target_caption")}
    assert words == {"instruction": "make it night", "source_caption": "a lake", "target_caption": "a lake at night"}
    assert pixels_of(tmp_path / "set", found) == photo(1) and not report.missing


def test_the_first_pix2pix_samples_have_other_names(tmp_path):
    row = {"input_image": photo(1), "edit_prompt": "make it night", "edited_image": NO_PICTURE}
    import_set("instructpix2pix", write_parquet(tmp_path / "train.parquet", [row]), tmp_path / "set")
    assert pixels_of(tmp_path / "set", rows_of(tmp_path / "set")[0]) == photo(1)


def test_the_edited_column_of_a_parquet_file_is_not_read_from_disk(tmp_path):
    """Its bytes in the file are destroyed, so that reading the column fails."""
    row = {"source_image": photo(1), "edit_prompt": "make it night", "edited_image": NO_PICTURE * 40}
    path = write_parquet(tmp_path / "train-0.parquet", [row, row])
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    content = bytearray(path.read_bytes())
    for chunk in chunks:
        if chunk.path_in_schema == "edited_image.bytes":
            start = chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    assert import_set("ultraedit", path, tmp_path / "set").rows == 2


# ---- lists of files


def pico_files(folder: Path) -> dict[str, Path]:
    files = {name: write_file(folder / "openimages" / name, photo(i)) for i, name in enumerate(("1_o.jpg", "2_o.jpg"))}
    write_file(folder / "images" / "positive-edit" / "1.png", NO_PICTURE)
    return files


def pico_line(number: int, **more: str) -> dict:
    return {
        "open_image_input_url": f"https://farm8.staticflickr.com/29/{number}_o.jpg",
        "text": "Remove the red flag from the sky, filling it with blue and white.",
        "output_image": f"images/positive-edit/{number}.png",
        "edit_type": "Remove an existing object",
        "summarized_text": "Flag removed.",
        **more,
    }


def test_pico_banana(tmp_path):
    files = pico_files(tmp_path)
    lines = [pico_line(1), pico_line(2, local_input_image=str(files["2_o.jpg"])), pico_line(3)]
    path = write_lines(tmp_path / "jsonl" / "sft.jsonl", lines)
    with opened_files() as opened:
        report = import_set("pico-banana", path, tmp_path / "set", tmp_path / "openimages")
    found = rows_of(tmp_path / "set")
    assert [(r["id"], r["edit_type"], r["object"]) for r in found] == [
        ("1", "remove", "red flag"),
        ("2", "remove", "red flag"),
    ]
    assert [pixels_of(tmp_path / "set", r) for r in found] == [photo(0), photo(1)]
    assert (tmp_path / "set" / found[0]["file_name"]).samefile(files["1_o.jpg"])  # a hard link
    assert any("1_o.jpg" in p for p in opened) and not any("positive-edit" in p for p in opened)
    (bad,) = rows_of(tmp_path / "set", "bad_photos.jsonl")
    assert "3_o.jpg" in bad["reason"] and report.bad_photos == 1


def test_pico_banana_of_several_turns(tmp_path):
    pico_files(tmp_path)
    files = [{"id": f"edit_turn{i}", "url": f"images/multi-turn/9_turn{i}.png"} for i in (1, 2)]
    files += [{"id": "original_input_image", "url": "https://farm8.staticflickr.com/29/1_o.jpg"}]
    prompts = ["Replace the red car with a blue van", "Outpaint the canvas", "Translate the text"]
    path = write_lines(tmp_path / "multi.jsonl", [{"files": files, "metadata_edit_turn_prompts": prompts}])
    report = import_set("pico-banana", path, tmp_path / "set", tmp_path / "openimages")
    (row,) = rows_of(tmp_path / "set")
    assert row["instruction"] == prompts[0] and pixels_of(tmp_path / "set", row) == photo(0)
    assert report.skipped == {"a later turn: it edits an edited image": 2}


def test_a_folder_of_pico_banana_is_read_completely(tmp_path):
    pico_files(tmp_path)
    turns = {"local_input_image": "2_o.jpg", "metadata_edit_turn_prompts": ["Add a hat"], "files": []}
    write_lines(tmp_path / "jsonl" / "sft_with_local_source_image_path.jsonl", [pico_line(1)])
    write_lines(tmp_path / "jsonl" / "multi_turn_with_local_source_image_path.jsonl", [turns])
    report = import_set("pico-banana", tmp_path / "jsonl", tmp_path / "set", tmp_path / "openimages")
    assert [pixels_of(tmp_path / "set", r) for r in rows_of(tmp_path / "set")] == [photo(0), photo(1)]
    assert not any("left out" in note for note in report.notes)
    assert "Edited images are ignored and never opened: output_image." in report.notes


def test_gpt_image_edit_metadata(tmp_path):
    root = tmp_path / "gpt-edit"
    for task, words in (("addition", "Add a hat"), ("removal", "Remove the hat")):
        folder = root / "omniedit" / task
        write_file(folder / "input" / "1.png", photo(len(task)))
        write_file(folder / "output" / "1.png", NO_PICTURE)
        record = {
            "id": f"omniedit_{task}_1", "dataset_source": "omniedit", "task": task, "input": "input/1.png",
            "output": "output/1.png", "instruction": words, "instruction_type": "original",
            "input_description": "a man",
        }  # fmt: skip
        write_file(folder / "metadata" / f"omniedit_{task}.json", [record])
    with opened_files() as opened:
        import_set("gpt-image-edit", root, tmp_path / "set")
    found = rows_of(tmp_path / "set")
    assert [(r["edit_type"], r["object"], r["source_caption"]) for r in found] == [
        ("add", "", "a man"),
        ("remove", "hat", "a man"),
    ]
    assert pixels_of(tmp_path / "set", found[0]) == photo(len("addition"))
    assert not any(Path(p).parent.name == "output" for p in opened)


def test_gpt_image_edit_training_files(tmp_path):
    write_file(tmp_path / "omniedit" / "input" / "1.png", photo(1))
    record = {
        "image": ["input/1.png", "output/1.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nAdd a hat to the man."},
            {"from": "gpt", "value": "<image>"},
        ],
    }
    path = write_file(tmp_path / "training_json" / "omniedit_gpt.json", [record])
    import_set("gpt-image-edit", path, tmp_path / "set", tmp_path / "omniedit")
    (row,) = rows_of(tmp_path / "set")
    assert row["instruction"] == "Add a hat to the man." and pixels_of(tmp_path / "set", row) == photo(1)


def test_the_reimplementations_merged_list(tmp_path):
    write_file(tmp_path / "pico" / "1.jpg", photo(1))
    record = {
        "id": "a1", "input_image_path": "pico/1.jpg", "edit_instruction": "take it off", "edited_caption": "a man",
        "input_description": "a man with a hat", "edit_type": "removal", "category": "hat",
        "dataset_source": "picobanana", "instruction_type": "original", "width": 16, "height": 12,
    }  # fmt: skip
    more = [
        {**record, "id": "a2", "category": "", "edit_type": "remove"},
        {**record, "id": "a3", "edit_type": "local color change"},
        {**record, "id": "a4", "edit_type": "complex-edit", "edit_instruction": " "},
    ]
    path = write_file(tmp_path / "merged.json", [record, *more])
    report = import_set("merged-list", path, tmp_path / "set", held_out=1)
    found = rows_of(tmp_path / "set")
    assert [(r["id"], r["edit_type"], r["object"]) for r in found] == [
        ("a1", "remove", "hat"),
        ("a2", "other", ""),
        ("a3", "recolour", "hat"),
    ]
    assert found[0]["source_caption"] == "a man with a hat" and found[0]["target_caption"] == "a man"
    assert report.skipped == {"no instruction": 1} and report.photos == 1
    assert "name no object plainly, now of the edit type 'other': 1" in "\n".join(report_lines(report))


# ---- the set


def test_the_set_opens_in_datasets_and_holds_out_whole_photos(tmp_path, tmp_path_factory):
    rows = [
        {
            "source_image": photo(i // 2),
            "edit_prompt": f"edit {i}",
            "source_caption": "a",
            "target_caption": "b",
            "idx": i,
        }
        for i in range(8)
    ]
    import_set("ultraedit", write_parquet(tmp_path / "train.parquet", rows), tmp_path / "set", held_out=3)
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=cache)
    assert len(loaded) == 8 and loaded[0]["image"].size == (16, 12)
    held_out = set((tmp_path / "set" / "held_out.txt").read_text().split())
    groups = {r["group"] for r in rows_of(tmp_path / "set") if r["id"] in held_out}
    assert len(held_out) == 4 and all(
        (r["group"] in groups) == (r["id"] in held_out) for r in rows_of(tmp_path / "set")
    )
    facts = json.loads((tmp_path / "set" / "prepare.json").read_text())
    assert facts["rows"] == 8 and facts["photos"] == 4 and facts["never_read"] == ["edited_image", "mask_image"]
    assert "CC BY 4.0" in (tmp_path / "set" / "README.md").read_text()
    assert not (tmp_path / "set.importing").exists()


def test_training_reads_the_imported_set(tmp_path):
    from photo_sets import opened

    row = {"source_image": photo(1), "edit_prompt": "edit", "source_caption": "a", "target_caption": "b", "idx": 1}
    import_set("ultraedit", write_parquet(tmp_path / "train.parquet", [row]), tmp_path / "set")
    assert opened(tmp_path / "set", sizes=((16, 16),)).batch(0, 1).instructions == ("edit",)


def test_a_name_that_leads_out_is_a_bad_photo(tmp_path):
    write_file(tmp_path / "secret.png", photo(9))
    write_file(tmp_path / "data" / "1.png", photo(1))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "", "1.png", "gone.png"]
    lines = [{"source_image": name, "instruction": "p"} for name in names]
    report = import_set("pref-grpo", write_lines(tmp_path / "data" / "rows.jsonl", lines), tmp_path / "set")
    assert report.rows == 1 and report.bad_photos == 5
    reasons = [entry["reason"] for entry in rows_of(tmp_path / "set", "bad_photos.jsonl")]
    assert [("out of the folder" in r, "is not in" in r) for r in reasons[:3]] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_a_stopped_import_leaves_no_set_and_goes_on(tmp_path):
    rows = [{"src_img": photo(i), "edited_prompt_list": [f"edit {i}"], "omni_edit_id": "same"} for i in range(4)]
    path = write_parquet(tmp_path / "train.parquet", rows)

    def stop(rows_so_far):
        if rows_so_far == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_set("omniedit", path, tmp_path / "set", on_row=stop)
    assert not (tmp_path / "set").exists()
    written = tmp_path / "set.importing" / "images" / "0000" / "000.png"
    before = written.stat().st_mtime_ns
    (written.parent / "001.png").write_bytes(photo(8)[: len(photo(1))].ljust(len(photo(1)), b"x"))  # of another import
    write_file(written.parent / "900.png", photo(9))
    assert import_set("omniedit", path, tmp_path / "set").rows == 4
    assert (tmp_path / "set" / "images" / "0000" / "000.png").stat().st_mtime_ns == before
    assert sorted(p.name for p in (tmp_path / "set").rglob("*.png")) == [f"00{i}.png" for i in range(4)]
    assert [pixels_of(tmp_path / "set", r) for r in rows_of(tmp_path / "set")] == [photo(i) for i in range(4)]
    assert [r["id"] for r in rows_of(tmp_path / "set")] == ["same", "same-2", "same-3", "same-4"]
    assert import_set("omniedit", path, tmp_path / "two", first=2).rows == 2


def test_what_cannot_be_imported_is_named(tmp_path):
    good = write_lines(tmp_path / "rows.jsonl", [{"source_image": "1.png", "instruction": "p"}])
    broken = write_file(tmp_path / "broken.jsonl", "{")
    listed = write_file(tmp_path / "dict.json", {"a": 1})
    fake = write_file(tmp_path / "fake.parquet", "no parquet")
    other = write_parquet(tmp_path / "other.parquet", [{"picture": photo(1), "words": "p"}])
    cases = [
        ("omni-edit", good, "Did you mean 'omniedit'"),
        ("omniedit", tmp_path / "nowhere", "does not exist"),
        ("omniedit", tmp_path / "rows.jsonl", "expected a column src_img"),
        ("pref-grpo", broken, "can be read"),
        ("pref-grpo", listed, "JSON array"),
        ("ultraedit", fake, "expected a parquet file"),
        ("ultraedit", other, "--column photo=NAME"),
        ("pref-grpo", good, "there is no file '1.png'"),
        ("pref-grpo", write_file(tmp_path / "rows.xml", "<x/>"), "expected a list"),
    ]
    for form, source, said in cases:
        with pytest.raises(UserError) as caught:
            import_set(form, source, tmp_path / "set")
        assert said in str(caught.value), (form, source, str(caught.value))
    write_file(tmp_path / "full" / "x", "x")
    with pytest.raises(UserError, match="new or empty folder"):
        import_set("pref-grpo", good, tmp_path / "full")


# ---- words, command


def test_edit_types_and_objects():
    words = {
        "addition": "add", "local color change": "recolour", "background_swap": "background", "texture": "material",
        "Remove an existing object": "remove", "Add a new object to the scene": "add", "complex-edit": "other",
        "": "other", "style, removal": "other", "Change an object's attribute (e.g., color/material)": "recolour",
    }  # fmt: skip
    assert {word: read_edit_type(word) for word in words} == words
    removed = {
        "Remove the fence.": "fence", "please delete all of the red cars in the street, and paint it": "red cars",
        "Erase the man with a hat": "man", "make it red": "", "Remove it": "", "Remove": "",
        "remove the one that I have always thought of as rather ugly": "",
    }  # fmt: skip
    assert {text: read_removed_object(text) for text in removed} == removed


@pytest.mark.parametrize(
    "instruction",
    [
        "Remove the red and white flag", "Remove the man and the dog", "Remove the cat, the dog and the bird",
        "Remove the black and white cat from the sofa", "Remove the sign and add a tree", "Remove the cat, the dog",
        "Remove the cat from the sofa and the dog", "Remove the sign, and add a tree", "Remove the cat or the dog",
        "Remove the sign then add a tree", "REMOVE THE MAN AND THE DOG", "Remove the big, red flag",
    ],
)  # fmt: skip
def test_a_removal_that_may_name_several_objects_names_none_plainly(instruction):
    assert read_removed_object(instruction) == ""


def test_the_command(tmp_path):
    assert [name.strip() for name in FORMATS.split(",")] == list(FORMS)
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    assert [name for name in FORMS if f"| `{name}` |" not in page] == []
    write_file(tmp_path / "1.png", photo(1))
    path = write_lines(tmp_path / "rows.jsonl", [{"before": "1.png", "prompt": "remove the dog"}])
    said = npedit("import", "columns", path, "--out", tmp_path / "set", "--column", "photo=before", "--licence", "mine")
    assert "Rows: 1. Photos: 1." in said and "target_caption is empty" in said
    assert rows_of(tmp_path / "set")[0]["licence"] == "mine"
    assert "FIELD=COLUMN" in npedit("import", "columns", path, "--out", tmp_path / "b", "--column", "x", code=2)
