"""One set of data as an imagefolder, as parquet and as tar files: the same examples in the same order."""

import io
import json
import logging
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from npedit.data import hub, imagefolder, webdataset
from npedit.data._metadata import check_columns
from npedit.errors import UserError
from tests.support.photo_sets import SMALL, encoded, plain, row, save, write_metadata

TYPES = ("recolour", "add", "style")
SOURCES = {"imagefolder": imagefolder, "hub": hub, "webdataset": webdataset}


pytestmark = pytest.mark.usefixtures("caches")


def make_rows(count=12):
    return [
        row(
            f"{i:02d}.png",
            id=f"i{i}",
            instruction=f"make it {i}",
            edit_type=TYPES[i % 3],
            source_caption="a plain picture",
            questions=[{"question": "Is it blue?", "answer": "yes"}],
            reference_file_names=["00.png"] if i % 4 == 3 else [],
        )
        for i in range(count)
    ]


def picture(number):
    width, height = ((40, 40), (50, 30), (30, 50))[number % 3]
    return plain(width, height, (10 * number, 100, 200))


@pytest.fixture
def folder(tmp_path):
    rows = make_rows()
    for number, item in enumerate(rows):
        save(tmp_path / "photos", item["file_name"], picture(number))
    return write_metadata(tmp_path / "photos", rows)


def as_parquet(folder, place):
    """What `push_to_hub` writes: the pictures' bytes inside."""
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    place.mkdir()
    loaded = loaded.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    loaded.to_parquet(place / "train-00000-of-00001.parquet")
    return place


def as_tars(folder, place, per_shard=5):
    place.mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for first in range(0, len(rows), per_shard):
        with tarfile.open(place / f"{first:03d}.tar", "w") as tar:
            for item in rows[first : first + per_shard]:
                fields = {k: v for k, v in item.items() if k not in ("file_name", "reference_file_names")}
                files = {"png": (folder / item["file_name"]).read_bytes()}
                if item.get("mask_file_name"):
                    files["mask.png"] = (folder / item["mask_file_name"]).read_bytes()
                    fields["mask_file_name"] = "mask.png"
                for k, name in enumerate(item.get("reference_file_names", [])):
                    files[f"ref{k}.png"] = (folder / name).read_bytes()
                fields["reference_file_names"] = [kind for kind in files if kind.startswith("ref")]
                add(tar, item["file_name"].removesuffix(".png"), files | {"json": json.dumps(fields).encode()})
    return place


def add(tar, key, files):
    for kind, content in files.items():
        info = tarfile.TarInfo(f"{key}.{kind}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def opened(name, path, **more):
    settings = {"sizes": SMALL, "nothing_share": 0.2, "prefetch": 0} | more
    return SOURCES[name].Source(SOURCES[name].Settings(path=str(path), **settings), 0)


def refused(name, path, **more):
    with pytest.raises(UserError) as caught:
        opened(name, path, **more)
    return str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
def test_every_form_gives_the_same_examples_in_the_same_order(folder, tmp_path, monkeypatch, cached):
    parquet, tars = as_parquet(folder, tmp_path / "p"), as_tars(folder, tmp_path / "t")
    places = {"imagefolder": folder, "hub": parquet, "webdataset": tars}
    if cached:
        for module in SOURCES.values():
            monkeypatch.setattr(module, "CACHED_FROM", 0)
    several = []
    (tmp_path / "ids.txt").write_text("i1\ni8\n")
    ids = str(tmp_path / "ids.txt")
    for more in ({}, {"held_out": 4}, {"shares": {"style": 0.5}}, {"share": 0.5}, {"share": 0.5, "held_out": ids}):
        wanted = None
        for name, place in places.items():
            for _ in range(1 + cached):
                source = opened(name, place, **more)
                found = [source.batch(i, 2) for i in range(8)]
                if wanted is None:
                    wanted = found
                for a, b in zip(wanted, found, strict=True):
                    assert (a.ids, a.instructions, a.questions) == (b.ids, b.instructions, b.questions), (name, more)
                    assert torch.equal(a.references, b.references)
                    assert (a.extra_references is None) == (b.extra_references is None)
                    assert a.extra_references is None or torch.equal(a.extra_references, b.extra_references)
                several += [b for b in found if b.extra_references is not None]
    assert several


def test_the_cached_photos_follow_the_file_of_held_out_rows(folder, tmp_path, monkeypatch):
    places = {
        "imagefolder": folder,
        "hub": as_parquet(folder, tmp_path / "p"),
        "webdataset": as_tars(folder, tmp_path / "t"),
    }
    for name, place in places.items():
        monkeypatch.setattr(SOURCES[name], "CACHED_FROM", 0)
        for ids in (["i0", "i1"], ["i5", "i10"], ["i0", "i1"]):
            (tmp_path / "ids.txt").write_text("\n".join(ids))
            source = opened(name, place, share=0.5, held_out=str(tmp_path / "ids.txt"))
            shapes = {i: tuple(b.references.shape[2:]) for b in source.held_out_batches(2) for i in b.ids}
            assert shapes == {i: SMALL[int(i[1:]) % 3] for i in ids}, name


def test_the_fingerprint_of_each_form_follows_its_content(folder, tmp_path):
    for name, make in (("hub", as_parquet), ("webdataset", as_tars)):
        place = make(folder, tmp_path / name)
        before = opened(name, place).fingerprint()
        assert opened(name, place).fingerprint() == before
        moved = place.rename(tmp_path / f"moved-{name}")
        if name == "webdataset":
            assert opened(name, moved).fingerprint() == before
        text = (folder / "metadata.jsonl").read_text()
        (folder / "metadata.jsonl").write_text(text.replace("make it 3", "make it 33"))
        assert opened(name, make(folder, tmp_path / f"other-{name}")).fingerprint() != before
        (folder / "metadata.jsonl").write_text(text)


def test_a_row_of_a_tar_file_or_of_parquet_is_named_in_an_error(folder, tmp_path):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"style"', '"stile"', 1))
    assert "000.tar:3:" in refused("webdataset", as_tars(folder, tmp_path / "t"))
    assert "train:3:" in refused("hub", as_parquet(folder, tmp_path / "p"))


def test_a_broken_picture_is_a_bad_row_in_each_form(folder, tmp_path):
    (folder / "04.png").write_bytes(b"no picture")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:50])
    for name, make in (("hub", as_parquet_raw), ("webdataset", as_tars)):
        source = opened(name, make(folder, tmp_path / name), max_bad_share=0.5)
        assert [bad["id"] for bad in source.bad_rows][:1] == ["i4"]
        ids = {i for k in range(12) for i in source.batch(k, 2).ids}
        assert ids == {f"i{k}" for k in range(12)} - {"i4", "i5"}


def as_parquet_raw(folder, place):
    """As people write parquet by hand: a column of bytes."""
    place.mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for item in rows:
        item["image"] = (folder / item.pop("file_name")).read_bytes()
        del item["reference_file_names"]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    return place


TRAP = b"an edited image that nobody may decode"


def test_edited_images_beside_the_photos_are_named_and_never_decoded(folder, tmp_path, caplog):
    table = pq.read_table(as_parquet_raw(folder, tmp_path / "p") / "train.parquet")
    trapped = table.rename_columns(["source_image" if c == "image" else c for c in table.column_names])
    trapped = trapped.append_column("edited_image", pa.array([TRAP] * len(table)))
    pq.write_table(trapped, tmp_path / "p" / "train.parquet")
    with caplog.at_level(logging.WARNING):
        source = opened("hub", tmp_path / "p", columns={"file_name": "source_image"})
    assert "edited_image" in caplog.text and not source.bad_rows
    assert "edited images" in refused("hub", tmp_path / "p", columns={"file_name": "edited_image"})
    assert "only you know" in refused("hub", tmp_path / "p")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        fields = json.dumps({"instruction": "make it blue"}).encode()
        for key in ("a", "b"):
            add(tar, key, {"jpg": encoded("JPEG"), "edited.jpg": TRAP, "json": fields})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        source = opened("webdataset", tmp_path / "a.tar")
    assert "edited.jpg" in caplog.text and [r.id for r in source.rows] == ["a", "b"] and not source.bad_rows
    assert "edited images" in refused("webdataset", tmp_path / "a.tar", columns={"file_name": "edited.jpg"})


OTHERS = ["original_image", "source_image", "conditioning_image", "cond_image", "control_image_0", "input", "img"]


@pytest.mark.parametrize("other", [*OTHERS, "reference", "source_pixels"])
@pytest.mark.parametrize("photo", ["image", "picture"])
def test_a_photo_is_not_guessed_beside_another_source_picture(other, photo):
    schema = pa.schema([(name, pa.binary()) for name in (photo, other, "mask", "thumbnail")] + [("text", pa.string())])
    with pytest.raises(UserError) as caught:
        hub.choose_columns(schema, {}, Path("set"))
    assert other in str(caught.value) and "set data.columns to the column of the originals" in str(caught.value)
    assert f"{{file_name: {min(other, photo) if photo != 'image' else other}}}" in str(caught.value)
    assert hub.choose_columns(schema, {"file_name": other}, Path("set")) == (other, "", "mask")


def test_lists_and_texts_beside_the_photo():
    texts = [(name, pa.string()) for name in ("source", "source_caption", "original_prompt")]
    several = pa.list_(pa.binary())
    schema = pa.schema([("image", pa.binary()), ("reference", several), ("mask", pa.binary()), *texts])
    assert hub.choose_columns(schema, {}, Path("set")) == ("image", "reference", "mask")
    schema = pa.schema([("image", pa.binary()), ("control_images", several)])
    with pytest.raises(UserError, match="control_images, image"):
        hub.choose_columns(schema, {}, Path("set"))
    columns = {"reference_file_names": "control_images"}
    assert hub.choose_columns(schema, columns, Path("set")) == ("image", "control_images", "")


@pytest.mark.parametrize("field", ["file_name", "reference_file_names", "mask_file_name"])
@pytest.mark.parametrize("edited", ["edited_image", "target", "result_0"])
def test_no_picture_field_takes_edited_images(field, edited):
    columns = {"file_name": "photo"} | {field: edited}
    with pytest.raises(UserError, match=f"data.columns.{field}: .*{edited}.* never opened"):
        check_columns(columns, {"photo", edited}, Path("set"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fields", [{"reference_file_names": ["edited.jpg"]}, {"mask_file_name": "edited.jpg"}])
def test_a_sample_cannot_name_its_edited_image(tmp_path, fields, streaming):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        content = json.dumps({"instruction": "make it blue"} | fields).encode()
        add(tar, "a", {"jpg": encoded("JPEG"), "edited.jpg": TRAP, "json": content})
    with pytest.raises(UserError, match="a.tar:1: .*'edited.jpg'.* never opened"):
        opened("webdataset", tmp_path / "a.tar", streaming=streaming).batch(0, 1)


def test_a_folder_of_pictures_as_datasets_opens_it_is_read_too(folder):
    source = opened("hub", folder)
    assert len(source) == 12 and source.batch(0, 2).references.shape[0] == 2


def test_a_file_that_a_row_only_names_is_opened_inside_the_data_alone(folder, tmp_path):
    outside = tmp_path / "outside.png"
    picture(0).save(outside)
    (tmp_path / "p").mkdir()
    rows = [{"image": {"bytes": None, "path": str(outside)}, "instruction": "make it blue"}]
    rows.append({"image": {"bytes": outside.read_bytes(), "path": "a.png"}, "instruction": "make it blue"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "train.parquet")
    source = opened("hub", tmp_path / "p", max_bad_share=0.5)
    assert [bad["reason"] for bad in source.bad_rows] == [
        "the row names a file outside the data set, and has no picture"
    ]


def test_a_text_beside_the_photo_is_the_instruction(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "sub/a", {"source.jpg": encoded("JPEG"), "mask.png": TRAP, "txt": "färbe es\n".encode()})
    source = opened("webdataset", tmp_path / "{a..a}.tar", columns={"file_name": "source.jpg"}, nothing_share=0)
    assert source.batch(0, 1).instructions == ("färbe es",) and source.rows[0].id == "sub/a"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"json": b"{}"}, "expected one photo"),
        ({"jpg": b"x", "png": b"x", "json": b"{}"}, "jpg, png"),
        ({"jpg": b"x", "json": b"{"}, "JSON"),
        ({"jpg": b"x", "json": b"[]"}, "JSON object"),
        ({"jpg": b"x"}, "'instruction'"),
        ({"jpg": b"x", "json": b'{"instruction": "a", "reference_file_names": ["b.jpg"]}'}, "a file k.b.jpg"),
    ],
)
def test_a_wrong_sample_is_named_by_tar_file_and_number(tmp_path, files, words):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "k", files)
    message = refused("webdataset", tmp_path)
    assert "x.tar:1:" in message and words in message


CONFIGS = """---
configs:
- {config_name: few, default: true, data_files: few/*.parquet}
- {config_name: all, data_files: all/*.parquet}
---
"""


def test_a_subset_of_a_data_set_is_chosen_by_name(folder, tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    as_parquet(folder, place / "all")
    write_metadata(folder, make_rows()[:3])
    as_parquet(folder, place / "few")
    (place / "README.md").write_text(CONFIGS)

    def ids(count, **more):
        source = opened("hub", place, **more)
        return {source.batch(i, 1).ids[0] for i in range(count)}

    few, every = {f"i{k}" for k in range(3)}, {f"i{k}" for k in range(12)}
    for streaming in (False, True):
        assert ids(3, streaming=streaming) == ids(3, subset="few", streaming=streaming) == few
        assert ids(12, subset="all", streaming=streaming) == every
        message = refused("hub", place, subset="some", streaming=streaming)
        assert "'some'" in message and "few" in message and "check path, split, subset" in message


def test_places_without_data_are_refused(folder, tmp_path):
    assert "no such" in refused("hub", tmp_path / "none").lower() or "check path" in refused("hub", tmp_path / "none")
    assert "split 'test'" in refused("hub", as_parquet(folder, tmp_path / "p"), split="test")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "bad.parquet" in refused("hub", tmp_path / "bad.parquet")
    assert "has none" in refused("webdataset", folder)
    assert "a.tar is missing" in refused("webdataset", tmp_path / "{a,b}.tar")
    (tmp_path / "broken.tar").write_bytes(b"no tar file" * 100)
    assert "broken.tar: expected a tar file" in refused("webdataset", tmp_path / "broken.tar")
