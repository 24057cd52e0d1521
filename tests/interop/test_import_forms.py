"""Importers of the forms of other trainers, and of tables with named columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edit_sets import NO_PICTURE, photo, pixels_of, rows_of, write_file, write_lines, write_shard
from opened_files import opened_files

from npedit.errors import UserError
from npedit.interop.import_set import import_set, report_lines
from npedit.interop.set_writer import open_writer
from npedit.questions import EDIT_TYPES, OBJECT_OF
from npedit.runs.lock import require_free

GENERIC = {
    "edit-r1": ("train_metadata.jsonl", {"prompt": "p", "image": "1.png", "requirement": "r"}, "images/1.png"),
    "flow-factory": ("train.jsonl", {"prompt": "p", "images": ["1.png", "2.png"]}, "images/1.png"),
    "pref-grpo": ("rows.jsonl", {"instruction": "p", "source_image": "1.png", "target_image": "t.png"}, "1.png"),
    "diffusers": ("metadata.jsonl", {"image": "t.png", "cond_image": "1.png", "caption": "p"}, "1.png"),
    "diffsynth": ("metadata.json", [{"image": "t.png", "prompt": "p", "edit_image": "1.png"}], "1.png"),
    "musubi": ("rows.jsonl", {"image_path": "t.png", "control_path_0": "1.png", "caption": "p"}, "1.png"),
}


@pytest.mark.parametrize("form", GENERIC)
def test_forms_of_other_trainers(tmp_path, form):
    name, record, place = GENERIC[form]
    source = tmp_path / "data"
    write_file(source / place, photo(1))
    write_file(source / Path(place).with_name("2.png"), photo(2))
    write_file(source / "t.png", NO_PICTURE)
    write_file(source / name, record if isinstance(record, list) else json.dumps(record) + "\n")
    with opened_files() as opened:
        import_set(form, source, tmp_path / "set")
    (row,) = rows_of(tmp_path / "set")
    assert row["instruction"] == "p" and pixels_of(tmp_path / "set", row) == photo(1)
    assert not any(p.endswith("t.png") for p in opened)
    more = [(tmp_path / "set" / n).read_bytes() for n in row.get("reference_file_names", [])]
    assert more == ([photo(2)] if form == "flow-factory" else [])


def test_a_photo_that_no_row_names_is_not_in_the_set(tmp_path):
    write_file(tmp_path / "images" / "1.png", photo(1))
    write_file(tmp_path / "images" / "2.png", photo(2))
    lines = [{"prompt": "p", "images": ["1.png", "gone.png"]}, {"prompt": "p", "images": ["2.png"]}]
    report = import_set("flow-factory", write_lines(tmp_path / "train.jsonl", lines), tmp_path / "set")
    assert (report.rows, report.bad_photos) == (1, 1)
    assert [p.read_bytes() for p in (tmp_path / "set").rglob("*.png")] == [photo(2)]


def test_diffsynth_csv(tmp_path):
    write_file(tmp_path / "1.png", photo(1))
    path = write_file(tmp_path / "metadata.csv", "image,prompt,edit_image\nt.png,make it night,1.png\n")
    import_set("diffsynth", path, tmp_path / "set")
    assert rows_of(tmp_path / "set")[0]["instruction"] == "make it night"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1.png,Remove the cat, the dog and the bird", "rows.csv:3: expected 2 fields, as in the header; got 3"),
        ('1.png,"make it "night", please"', "rows.csv:3: expected csv"),
        ('1.png,"make it night', "expected csv"),
    ],
)
def test_a_csv_line_that_would_be_cut_off_is_refused(tmp_path, line, said):
    write_file(tmp_path / "1.png", photo(1))
    path = write_file(tmp_path / "rows.csv", f'file_name,instruction\n1.png,"make it day, please"\n{line}\n')
    with pytest.raises(UserError) as caught:
        import_set("columns", path, tmp_path / "set")
    assert said in str(caught.value) and not (tmp_path / "set").exists()


def test_caption_files(tmp_path):
    write_file(tmp_path / "edited" / "a.txt", "make it night\n")
    write_file(tmp_path / "edited" / "a.png", NO_PICTURE)
    write_file(tmp_path / "control" / "a.png", photo(1))
    with opened_files() as opened:
        import_set("caption-files", tmp_path / "edited", tmp_path / "set", tmp_path / "control")
    (row,) = rows_of(tmp_path / "set")
    assert (row["id"], row["instruction"]) == ("a", "make it night") and pixels_of(tmp_path / "set", row) == photo(1)
    assert str(tmp_path / "edited" / "a.png") not in opened
    with pytest.raises(UserError, match="expected --photos"):
        import_set("caption-files", tmp_path / "edited", tmp_path / "other")


@pytest.mark.parametrize("name", ["shot 3.5.jpg", "v1.0.final.PNG", "plain.bmp", "a.b.TIFF", "a.jpg.webp"])
def test_caption_files_whose_names_have_dots(tmp_path, name):
    kinds = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP"}
    content = photo(1, kinds[name.rpartition(".")[2].lower()])
    write_file(tmp_path / "photos" / name, content)
    write_file(tmp_path / "texts" / f"{name.rpartition('.')[0]}.txt", "make it night")
    report = import_set("caption-files", tmp_path / "texts", tmp_path / "set", tmp_path / "photos")
    assert report.bad_photos == 0 and pixels_of(tmp_path / "set", rows_of(tmp_path / "set")[0]) == content


def test_a_folder_of_photos_and_instructions(tmp_path):
    write_file(tmp_path / "photos" / "a.png", photo(1))
    write_file(tmp_path / "photos" / "more" / "b.jpg", photo(2, "JPEG"))
    write_file(tmp_path / "photos" / "instructions.txt", "make it night\n\nremove the sky\n")
    report = import_set("folder", tmp_path / "photos", tmp_path / "set")
    found = rows_of(tmp_path / "set")
    assert [(r["id"], r["instruction"]) for r in found] == [
        ("a.png-1", "make it night"),
        ("a.png-2", "remove the sky"),
        ("more/b.jpg-1", "make it night"),
        ("more/b.jpg-2", "remove the sky"),
    ]
    assert report.photos == 2 and pixels_of(tmp_path / "set", found[2]) == photo(2, "JPEG")


def test_a_folder_gives_every_picture(tmp_path):
    kinds = {"JPEG": ("jpg", "JPG", "jpeg"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",)}
    kinds |= {"TIFF": ("tif", "tiff"), "GIF": ("gif",)}
    names = [(kind, suffix) for kind, suffixes in kinds.items() for suffix in suffixes]
    for number, (kind, suffix) in enumerate(names):
        write_file(tmp_path / "photos" / f"{number}.{suffix}", photo(number, kind))
    write_file(tmp_path / "photos" / "instructions.txt", "make it night\n")
    report = import_set("folder", tmp_path / "photos", tmp_path / "set")
    assert (report.rows, report.bad_photos) == (len(names), 0)
    shard = {f"{n}.{suffix}": photo(n, kind) for n, (kind, suffix) in enumerate(names)}
    texts = {f"{n}.txt": b"make it night" for n in range(len(names))}
    members = {k: v for n in range(len(names)) for k, v in (shard | texts).items() if k.startswith(f"{n}.")}
    report = import_set("webdataset", write_shard(tmp_path / "0.tar", members), tmp_path / "tar")
    assert (report.rows, report.bad_photos) == (len(names), 0)


def test_lists_of_another_kind_are_named(tmp_path):
    write_file(tmp_path / "data" / "1.png", photo(1))
    write_lines(tmp_path / "data" / "rows.jsonl", [{"source_image": "1.png", "instruction": "p"}])
    for number in range(5):
        write_file(tmp_path / "data" / f"{number}.json", [{"source_image": "1.png", "instruction": "p"}])
    report = import_set("pref-grpo", tmp_path / "data", tmp_path / "set")
    assert report.rows == 1
    assert "Lists of another kind are left out: 0.json, 1.json, 2.json and 2 more." in report.notes


def test_webdataset_shards(tmp_path):
    fields = {"instruction": "make it night", "edit_type": "style", "target_caption": "night"}
    members = {"a.jpg": photo(1, "JPEG"), "a.json": json.dumps(fields).encode(), "a.edited.jpg": NO_PICTURE}
    members |= {"b.png": photo(2), "b.txt": b"remove the dog", "c.jpg": NO_PICTURE, "c.txt": b"broken photo"}
    report = import_set("webdataset", write_shard(tmp_path / "0.tar", members), tmp_path / "set")
    found = rows_of(tmp_path / "set")
    assert [(r["id"], r["instruction"], r["target_caption"]) for r in found] == [
        ("a", "make it night", "night"),
        ("b", "remove the dog", ""),
    ]
    assert pixels_of(tmp_path / "set", found[1]) == photo(2)
    assert report.bad_photos == 1


def test_texts_about_the_source_are_no_pictures(tmp_path):
    write_file(tmp_path / "1.png", photo(1))
    texts = ("source_caption", "original_prompt", "input_description", "source_image_id", "original_width", "edit")
    path = write_lines(tmp_path / "rows.jsonl", [{"image": "1.png", "instruction": "p"} | dict.fromkeys(texts, "t")])
    assert import_set("columns", path, tmp_path / "set").rows == 1


def test_an_edited_member_of_a_shard_is_no_photo(tmp_path):
    members = {"a.edited.jpg": NO_PICTURE, "a.jpg": photo(1, "JPEG"), "a.txt": b"make it night"}
    with pytest.raises(UserError, match="never opened"):
        import_set(
            "webdataset", write_shard(tmp_path / "0.tar", members), tmp_path / "set", None, {"photo": "edited.jpg"}
        )


def test_columns_that_are_named_or_plain(tmp_path):
    write_file(tmp_path / "1.png", photo(1))
    path = write_lines(tmp_path / "rows.jsonl", [{"input_image": "1.png", "prompt": "p", "after": "t.png"}])
    report = import_set("columns", path, tmp_path / "plain")
    assert "Photos: column 'input_image', by its name." in report.notes
    named = write_lines(tmp_path / "named.jsonl", [{"before": "1.png", "words": "p", "says": "c"}])
    columns = {"photo": "before", "instruction": "words", "target_caption": "says"}
    import_set("columns", named, tmp_path / "named", columns=columns)
    assert rows_of(tmp_path / "named")[0]["target_caption"] == "c"


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"image": "a", "edited_image": "b", "prompt": "p"}, {}, "give --column photo"),
        ({"image": "a", "edit_image": "b", "prompt": "p"}, {}, "give --column photo"),
        *(
            ({name: "a", other: "b", "prompt": "p"}, {}, f"{name!r} is the edited image; give --column photo")
            for name in ("image", "file_name", "image_path")
            for other in ("conditioning_image", "reference_image", "control_image_0", "original", "source", "img")
        ),
        ({"image": "a", "original_image": "b", "text": "p"}, {}, "give --column photo"),
        ({"image": "a", "after_image": "b", "text": "p"}, {}, "give --column photo"),
        ({"edit_image": "a", "before": "b", "text": "p"}, {}, "'edit_image' is the edited image; give --column photo"),
        ({"image": "a", "result_1": "b", "text": "p"}, {}, "give --column photo"),
        ({"image": "a", "result": "b", "text": "p"}, {"photo": "result"}, "never opened"),
        ({"image": "a", "prompt": "p", "caption": "c"}, {}, "give --column instruction"),
        ({"image": "a", "edited_image": "b", "prompt": "p"}, {"photo": "edited_image"}, "never opened"),
        ({"image": "a", "prompt": "p"}, {"photo": "imge"}, "Did you mean 'image'"),
        ({"image": "a", "prompt": "p"}, {"foto": "image"}, "Did you mean 'photo'"),
    ],
)
def test_columns_that_are_not_clear_are_refused(tmp_path, row, columns, said):
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        import_set("columns", path, tmp_path / "set", columns=columns)
    assert said in str(caught.value)
    assert not (tmp_path / "set").exists()


# ---- what holds for every form


def test_copies_of_a_photo_are_one_group_and_are_held_out_together(tmp_path):
    for number, name in enumerate(("x.png", "copies/y.png", "z.png")):
        write_file(tmp_path / name, photo(number // 2))
    names = ["x.png", "copies/y.png", "z.png", "x.png"]
    rows = [{"source_image": name, "instruction": f"edit {i}"} for i, name in enumerate(names)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    report = import_set("pref-grpo", path, tmp_path / "set", held_out=1)
    found = rows_of(tmp_path / "set")
    assert report.photos == 2 and [r["group"] == found[0]["group"] for r in found] == [True, True, False, True]
    held_out = (tmp_path / "set" / "held_out.txt").read_text().split()
    assert held_out in ([r["id"] for r in found if r["group"] == group] for group in {r["group"] for r in found})
    assert len(list((tmp_path / "set").rglob("*.png"))) == 2
    with open_writer(tmp_path / "other", [tmp_path]) as writer:
        assert len({writer.save_photo(p, tmp_path, ["."]) for p in ("x.png", photo(0), "copies/y.png")}) == 1


def test_two_imports_into_one_folder_do_not_mix(tmp_path):
    for folder, seed in (("A", 1), ("B", 2)):
        write_file(tmp_path / folder / "1.png", photo(seed))
        write_lines(tmp_path / folder / "rows.jsonl", [{"source_image": "1.png", "instruction": folder}] * 2)

    def import_other(rows_so_far):
        with pytest.raises(UserError, match="set.importing to be free; got a folder that is held by .*import"):
            import_set("pref-grpo", tmp_path / "B" / "rows.jsonl", tmp_path / "set")

    import_set("pref-grpo", tmp_path / "A" / "rows.jsonl", tmp_path / "set", on_row=import_other)
    found = rows_of(tmp_path / "set")
    assert [(r["instruction"], pixels_of(tmp_path / "set", r)) for r in found] == [("A", photo(1))] * 2
    assert not (tmp_path / "set" / ".holder.json").exists() and not (tmp_path / "set.importing").exists()
    require_free(tmp_path / "set")


@pytest.mark.parametrize("out", [".", "new/..", "../here/new", "link"])
def test_the_folder_may_be_named_in_any_way(tmp_path, monkeypatch, out):
    write_file(tmp_path / "1.png", photo(1))
    path = write_lines(tmp_path / "rows.jsonl", [{"source_image": "1.png", "instruction": "p"}])
    (tmp_path / "here").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if out == "link":
        Path("link").symlink_to(tmp_path / "empty")
    place = Path(out).resolve()
    import_set("pref-grpo", path, Path(out))
    assert pixels_of(place, rows_of(place)[0]) == photo(1)


@pytest.mark.parametrize("edit_type", [*EDIT_TYPES, "customization", "removal", "no such type"])
def test_training_reads_every_edit_type_without_an_object(tmp_path, edit_type):
    from photo_sets import opened

    write_file(tmp_path / "1.png", photo(1))
    row = {"file_name": "1.png", "instruction": "Take this dog to the moon", "edit_type": edit_type}
    report = import_set("columns", write_lines(tmp_path / "rows.jsonl", [row]), tmp_path / "set")
    (batch,) = [opened(tmp_path / "set", sizes=((16, 16),)).batch(0, 1)]
    needs_object = edit_type in {*OBJECT_OF, "customization", "removal"}
    assert report.without_object == ({"other": 1} if needs_object else {})
    assert batch.instructions == ("Take this dog to the moon",)


@pytest.mark.parametrize(
    ("form", "photos", "bad"),
    [
        ("pico-banana", "local_input_image", {"metadata_edit_turn_prompts": None}),
        ("pico-banana", "local_input_image", {"metadata_edit_turn_prompts": ["p"], "files": 3}),
        ("gpt-image-edit", "input", {"conversations": None}),
        ("gpt-image-edit", "input", {"conversations": ["p"]}),
        ("gpt-image-edit", "input", {"conversations": [{"from": "human", "value": None}]}),
        ("magicbrush", "source_img", {"turn_index": "two"}),
    ],
)
def test_a_record_of_another_form_costs_one_row(tmp_path, form, photos, bad):
    write_file(tmp_path / "1.png", photo(1))
    good = {photos: "1.png", "text": "p", "instruction": "p"}
    report = import_set(form, write_lines(tmp_path / "rows.jsonl", [good, good | bad, good]), tmp_path / "set")
    assert report.rows == 2 and report.skipped == {"a record whose values are not those of the format": 1}
    assert [r["id"] for r in rows_of(tmp_path / "set", "rejected.jsonl")] == ["rows.jsonl:2"]


@pytest.mark.parametrize("field", ["instruction", "object", "source_caption", "target_caption", "id"])
def test_a_lone_surrogate_costs_one_row(tmp_path, field):
    write_file(tmp_path / "1.png", photo(1))
    good = {"file_name": "1.png", "instruction": "make it red", "id": "a"}
    path = write_lines(tmp_path / "rows.jsonl", [good, good | {field: "half \ud83d"}, good | {"id": "\u00e9"}])
    report = import_set("columns", path, tmp_path / "set")
    assert report.rows == 2 and report.skipped == {"a text with half a character (a lone surrogate)": 1}
    (rejected,) = rows_of(tmp_path / "set", "rejected.jsonl")
    assert "lone surrogate" in rejected["reason"]
    assert "Edits that are left out: 1 (a text with half a character" in "\n".join(report_lines(report))
