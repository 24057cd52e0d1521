"""A folder of photos as a data source: real photographs are read, edited images never, and what is wrong is said."""

import json
import logging
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from pydantic import ValidationError

from npedit.data import imagefolder
from npedit.errors import UserError
from tests.support.photo_sets import (
    SMALL,
    encoded,
    good_rows,
    opened,
    plain,
    refused,
    row,
    save,
    spy_on_files,
    write_metadata,
)

PHOTOS = {  # real photographs that scikit-image ships
    "astronaut": skimage.data.astronaut,  # 512 x 512
    "chelsea": skimage.data.chelsea,  # 300 x 451, a cat
    "coffee": skimage.data.coffee,  # 400 x 600
    "rocket": skimage.data.rocket,  # 427 x 640
    "camera": skimage.data.camera,  # 512 x 512, grey
}


@pytest.fixture
def photos(tmp_path):
    """Five real photographs as an ordinary data set."""
    rows = []
    for name, load in PHOTOS.items():
        save(tmp_path, f"images/{name}.jpg", Image.fromarray(load()))
        rows.append(row(f"images/{name}.jpg", id=name, source_caption=f"a photo of {name}"))
    return write_metadata(tmp_path, rows)


# ---- real photographs


def test_real_photographs_become_batches(photos):
    source = opened(photos)
    assert len(source) == 5
    assert source.has_target_captions
    assert source.sizes == list(SMALL)
    assert source.bad_rows == []
    seen = {}
    for index in range(5):
        batch = source.batch(index, 1)
        assert batch.references.dtype is torch.float32
        assert 0 <= batch.references.min() < batch.references.max() <= 1
        assert batch.edit_types == ("recolour",)
        assert batch.source_captions == (f"a photo of {batch.ids[0]}",)
        seen[batch.ids[0]] = tuple(batch.references.shape)
    square, wide = (1, 3, 64, 64), (1, 3, 48, 80)
    assert seen == {"astronaut": square, "camera": square, "chelsea": wide, "coffee": wide, "rocket": wide}


def test_a_photograph_is_the_photograph(photos):
    """Against plain numpy: block means of the same centred cut."""
    source = opened(photos, sizes=((64, 64),))
    batches = [source.batch(i, 1) for i in range(5)]
    batch = next(b for b in batches if b.ids == ("astronaut",))
    wanted = skimage.data.astronaut().reshape(64, 8, 64, 8, 3).mean((1, 3)) / 255
    assert np.abs(batch.references[0].permute(1, 2, 0).numpy() - wanted).mean() < 0.02


def test_the_default_sizes_take_real_photographs(photos):
    source = imagefolder.Source(imagefolder.Settings(path=str(photos)), seed=0)
    assert all(h % 64 == 0 and w % 64 == 0 for h, w in source.sizes)
    assert tuple(source.batch(0, 2).references.shape[2:]) in source.sizes


def test_hugging_face_opens_the_same_folder(photos, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=cache)
    assert len(loaded) == 5
    assert {r["id"] for r in loaded} == set(PHOTOS)
    assert {"image", "instruction", "edit_type", "target_caption"} <= set(loaded.column_names)
    assert loaded[0]["image"].size == Image.open(photos / "images" / f"{loaded[0]['id']}.jpg").size


def test_a_train_folder_is_found(tmp_path):
    save(tmp_path, "train/a.png", plain(64, 64))
    write_metadata(tmp_path / "train", [row("a.png")])
    assert opened(tmp_path).batch(0, 1).ids == ("000001",)


def test_optional_fields_may_be_missing_or_null(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    write_metadata(tmp_path, ["", {"file_name": "a.png", "instruction": "make it snow", "object": None, "id": 7}])
    source = opened(tmp_path)
    batch = source.batch(0, 1)
    assert (batch.ids, batch.edit_types, batch.objects, batch.target_captions) == (("7",), ("other",), ("",), ("",))
    assert not source.has_target_captions


# ---- edited images are never opened


@pytest.fixture
def files_opened(monkeypatch):
    return spy_on_files(monkeypatch)


TARGETS = ["edited_file_name", "edited_image", "edited", "target_image", "target_file_name", "target", "output",
           "output_image", "result", "after", "ground_truth_image"]  # fmt: skip


@pytest.mark.parametrize("column", TARGETS)
def test_edited_images_are_never_opened(tmp_path, caplog, files_opened, column):
    trap = tmp_path / "trap.png"
    trap.mkdir()  # opening it fails
    save(tmp_path, "a.png", plain(64, 64))
    write_metadata(tmp_path, [row("a.png", **{column: "trap.png"})] * 3)
    with caplog.at_level(logging.INFO):
        source = opened(tmp_path)
        batch = source.batch(0, 3)
        source.fingerprint()
    assert source.bad_rows == []
    assert len(batch) == 3
    assert any(p.endswith("a.png") for p in files_opened)
    assert not any("trap" in p for p in files_opened)
    said = [r.getMessage() for r in caplog.records if "never opened" in r.getMessage()]
    assert len(said) == 1
    assert column in said[0]


def test_captions_and_edit_types_are_no_edited_images(tmp_path, caplog):
    save(tmp_path, "a.png", plain(64, 64))
    write_metadata(tmp_path, [row("a.png", edit="make it blue", edited_caption="blue", target_object="x", edit_id="3")])
    with caplog.at_level(logging.INFO):
        opened(tmp_path)
    assert "never opened" not in caplog.text


def test_a_source_and_a_target_column_demand_a_mapping(tmp_path, files_opened):
    save(tmp_path, "in.png", plain(64, 64))
    save(tmp_path, "out.png", plain(64, 64))
    pair = {"input_image": "in.png", "output_image": "out.png", "instruction": "make it blue"}
    write_metadata(tmp_path, [pair])
    message = refused(tmp_path)
    assert "input_image" in message
    assert "output_image" in message
    assert "only you know the originals; set data.columns" in message
    source = opened(tmp_path, columns={"file_name": "input_image"})
    assert len(source.batch(0, 1)) == 1
    assert not any("out.png" in p for p in files_opened)


def test_a_mapping_to_edited_images_is_refused(tmp_path):
    save(tmp_path, "out.png", plain(64, 64))
    write_metadata(tmp_path, [{"source": "in.png", "edited_image": "out.png", "instruction": "make it blue"}])
    assert "edited images" in refused(tmp_path, columns={"file_name": "edited_image"})


def test_columns_can_have_other_names(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    write_metadata(tmp_path, [{"photo": "a.png", "text": "make it blue", "kind": "color"}])
    source = opened(tmp_path, columns={"file_name": "photo", "instruction": "text", "edit_type": "kind"})
    batch = source.batch(0, 1)
    assert (batch.instructions, batch.edit_types) == (("make it blue",), ("recolour",))


def test_a_mapping_to_no_column_names_the_nearest(tmp_path):
    write_metadata(tmp_path, [row("a.png", text="x")])
    message = refused(tmp_path, columns={"instruction": "txt"})
    assert "'txt'" in message
    assert "'text'" in message
    with pytest.raises(ValidationError):
        imagefolder.Settings(path="x", columns={"caption": "text"})


# ---- refused folders and lines


def test_folders_that_are_none(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in refused(empty)
    save(tmp_path, "bare/a.png", plain(8, 8))
    assert "no metadata.jsonl" in refused(tmp_path / "bare")
    assert "which is a file" in refused(tmp_path / "bare/a.png")
    assert "at least one row" in refused(write_metadata(tmp_path / "blank", ["", "  "]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'file_name': 'a.png'}", "JSON"),
        ('{"file_name": "a.png", "instr', "JSON"),
        ('["a.png", "make it blue"]', "JSON object"),
        (json.dumps({"file_name": "a.png"}), "'instruction'"),
        (json.dumps({"instruction": "make it blue"}), "'file_name'"),
        (json.dumps({"filename": "a.png", "instruction": "make it blue"}), "Did you mean 'filename'"),
        (json.dumps(row("a.png", instruction="  ")), "'instruction'"),
        (json.dumps(row("a.png", instruction=3)), "expected text"),
        (json.dumps(row("a.png", edit_type="recolor")), "'recolour'"),
        (json.dumps(row("a.png", edit_type="remove")), "'object'"),
        (json.dumps(row("a.png", edit_type="removal", object=" ")), "'object'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    save(tmp_path, "a.png", plain(8, 8))
    write_metadata(tmp_path, [row("a.png"), line])
    message = refused(tmp_path)
    assert "metadata.jsonl:2:" in message
    assert words in message


def test_a_line_in_another_encoding_is_named(tmp_path):
    write_metadata(tmp_path, [row("a.png")])
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write('{"file_name": "a.png", "instruction": "färbe es"}\n'.encode("latin-1"))
    assert "metadata.jsonl:2: expected JSON in UTF-8" in refused(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row("a.png")), encoding="utf-8-sig")
    assert len(opened(tmp_path)) == 1


def test_settings_out_of_range_are_refused():
    for wrong in ({"max_bad_share": 1.5}, {"sizes": ()}, {"sizes": ((0, 64),)}, {"nothing_share": -1}, {"pathh": "x"}):
        with pytest.raises(ValidationError):
            imagefolder.Settings(**{"path": "x"} | wrong)


# ---- bad rows


def png_header(width, height):
    """A PNG that claims a size, with no pixels to match."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return whole + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


BROKEN = {
    "missing": None,
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "truncated_jpeg": encoded("JPEG")[:9000],
    "truncated_png": encoded("PNG")[:9000],
    "zero_width": png_header(0, 64),
    "huge": png_header(20000, 20000),
    "large": png_header(9500, 9500),
    "bomb": png_header(60000, 60000),
    "no_pixels": png_header(64, 64),
}


@pytest.fixture
def good(tmp_path):
    return good_rows(tmp_path)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_a_bad_row(good, kind, recwarn):
    folder = good(f"{kind}.png", BROKEN[kind])
    source = opened(folder)
    ids = Counter(i for index in range(30) for i in source.batch(index, 3).ids)
    assert "bad" not in ids
    assert set(ids) == {f"good{i}" for i in range(29)}
    (bad,) = source.bad_rows
    assert (bad["id"], bad["file"], bad["line"]) == ("bad", f"{kind}.png", 30)
    assert bad["reason"]
    assert len(source) == 29
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


@pytest.mark.parametrize("kind", ["missing", "text", "huge", "zero_width"])
def test_most_broken_pictures_are_found_at_the_start(good, kind):
    assert len(opened(good("bad.png", BROKEN[kind])).bad_rows) == 1


OUTSIDE = ["../secret.png", "/etc/passwd", "sub/../../secret.png", "..\\secret.png", "C:\\secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_bad_rows(good, tmp_path, files_opened, name):
    plain(64, 64).save(tmp_path.parent / "secret.png")
    source = opened(good(name))
    assert [b["line"] for b in source.bad_rows] == [30]
    assert "leads out" in source.bad_rows[0]["reason"]
    assert not any("secret" in p or "passwd" in p for p in files_opened)


def test_odd_names_are_bad_rows_and_no_crash(good):
    good("nul\0byte.png")
    folder = good("n" * 5000 + ".png")
    assert [b["line"] for b in opened(folder, max_bad_share=0.1).bad_rows] == [30, 31]


def test_too_many_bad_rows_stop_it_at_the_start(good):
    good("gone1.png")
    folder = good("gone2.png")
    message = refused(folder, max_bad_share=0.05)
    assert "2 of 31" in message
    assert "metadata.jsonl:30: gone1.png: no such file" in message
    assert len(opened(folder, max_bad_share=0.1).bad_rows) == 2


@pytest.mark.parametrize("prefetch", [0, 2])
def test_too_many_bad_rows_stop_it_on_the_way(good, tmp_path, prefetch):
    source = opened(good("29.jpg", encoded("JPEG")), prefetch=prefetch)
    assert source.bad_rows == []
    for i in range(8):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match=r"expected at most 5.0% bad rows; got \d+ of 30: .*no such file"):
        for index in range(60):
            source.batch(index, 3)


def test_bad_rows_met_by_batches_made_ahead_count_even_if_those_are_never_used(good, tmp_path):
    folder = good("29.jpg", encoded("JPEG"))
    order = [opened(folder).batch(i, 1).ids[0] for i in range(30)]
    assert "bad" not in (order[0], order[1], order[2], order[20])
    source = opened(folder, prefetch=2)
    for name in order[1:3]:
        (tmp_path / f"{name.removeprefix('good')}.png").unlink()
    source.batch(0, 1)
    deadline = time.monotonic() + 10
    while len(source.bad_rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match="2 of 30"):
        source.batch(20, 1)


def test_no_good_row_at_all_stops_it(tmp_path):
    write_metadata(tmp_path, [row("gone.png")])
    assert "1 of 1" in refused(tmp_path, max_bad_share=1.0)


def test_the_substitute_does_not_depend_on_what_came_before(good):
    folder = good("bad.jpg", BROKEN["truncated_jpeg"])
    whole = opened(folder)
    run = [whole.batch(i, 3) for i in range(30)]
    for i in (29, 3, 17):
        again = opened(folder).batch(i, 3)
        assert again.ids == run[i].ids
        assert torch.equal(again.references, run[i].references)


def test_a_bucket_whose_only_picture_breaks_is_filled_from_others(good, tmp_path):
    tall = encoded("JPEG", Image.fromarray(skimage.data.astronaut()[:, 100:400]))
    source = opened(good("tall.jpg", tall[: len(tall) // 2]))
    assert {tuple(source.batch(i, 1).references.shape[2:]) for i in range(30)} == {(64, 64), (80, 48)}
    assert [b["id"] for b in source.bad_rows] == ["bad"]
