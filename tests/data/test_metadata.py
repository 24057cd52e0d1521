"""Every row that `datasets` finds is used, or the file that holds it is named; limits for crops and enlargement."""

import json
import logging
import zipfile

import datasets
import pytest
import torch

from npedit.benchmarks import own
from npedit.errors import UserError
from npedit.families._prompts import truncation_message
from npedit.families.flux import Flux
from npedit.recipe.config import embedded_weights
from tests.support.photo_sets import opened, plain, refused, row, save, write_metadata


def folder_of(root, place, names):
    for k, name in enumerate(names):
        save(root / place, name, plain(64, 64, (40 * k, 0, len(place))))
    write_metadata(root / place, [row(name, id=f"{place}/{name}") for name in names])


def ids(source):
    return sorted(r.id for r in source.rows)


@pytest.mark.parametrize("places", [("", "more"), ("one", "two/three"), ("train", "train/more")])
def test_metadata_in_sub_folders_is_read_as_datasets_reads_it(tmp_path, places):
    for place in places:
        folder_of(tmp_path / "photos", place, ("a.png", "b.png", "c.png"))
    source = opened(tmp_path / "photos")
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train", cache_dir=cache)
    assert ids(source) == sorted(loaded["id"])
    assert len(source) == 6
    seen = {id_: source.batch(i, 1).references[0].mean((1, 2)) for i in range(6) for id_ in source.batch(i, 1).ids}
    for item in loaded:
        wanted = torch.tensor(item["image"].getpixel((0, 0))) / 255
        torch.testing.assert_close(seen[item["id"]], wanted)


def test_rows_without_an_id_are_told_apart_and_a_bad_one_is_named_by_its_folder(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    for place in (tmp_path, tmp_path / "more"):
        write_metadata(place, [row("a.png"), row("a.png")])
    source = opened(tmp_path, max_bad_share=1.0)
    assert ids(source) == ["000001", "000002", "more/000001", "more/000002"]
    assert [(b["file"], b["line"], b.get("metadata")) for b in source.bad_rows] == [
        ("more/a.png", 1, "more/metadata.jsonl"),
        ("more/a.png", 2, "more/metadata.jsonl"),
    ]
    assert str(tmp_path / "more" / "metadata.jsonl") + ":1" in refused(tmp_path)


def test_the_fingerprint_depends_on_every_metadata_file(tmp_path):
    for place in ("", "more"):
        folder_of(tmp_path, place, ("a.png",))
    before = opened(tmp_path).fingerprint()
    file = tmp_path / "more" / "metadata.jsonl"
    file.write_text(file.read_text().replace("blue", "grey"))
    assert opened(tmp_path).fingerprint() != before


def test_metadata_that_would_not_be_read_is_refused_by_name(tmp_path):
    folder_of(tmp_path, "", ("a.png",))
    for name in ("metadata.csv", "metadata.parquet"):
        (tmp_path / "more").mkdir(exist_ok=True)
        other = tmp_path / "more" / name
        other.write_text("file_name,instruction\nb.png,paint it\n")
        assert str(other) in refused(tmp_path) and "one format" in refused(tmp_path)
        other.unlink()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("inside/metadata.jsonl", json.dumps(row("b.png")))
    assert "photos.zip" in refused(tmp_path)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("inside/notes.txt", "no metadata")
    assert len(opened(tmp_path)) == 1


def test_held_out_data_are_never_mixed_in(tmp_path):
    folder_of(tmp_path, "", ("a.png",))
    folder_of(tmp_path, "validation", ("b.png",))
    assert "validation" in refused(tmp_path)
    assert len(opened(tmp_path / "validation")) == 1
    folder_of(tmp_path / "split", "train", ("a.png",))
    folder_of(tmp_path / "split", "test", ("b.png",))
    assert ids(opened(tmp_path / "split")) == ["train/a.png"], "the usual layout: one split"


def test_hidden_folders_are_left_alone(tmp_path):
    folder_of(tmp_path, "", ("a.png",))
    folder_of(tmp_path, ".trash", ("b.png",))
    assert ids(opened(tmp_path)) == ["/a.png"]


def test_a_benchmark_of_own_photos_has_the_rows_of_sub_folders_too(tmp_path):
    for place in ("", "more"):
        folder_of(tmp_path, place, ("a.png", "b.png"))
    items, _ = own.read_items(str(tmp_path))
    assert [item.reference.relative_to(tmp_path).as_posix() for item in items] == [
        "a.png", "b.png", "more/a.png", "more/b.png",
    ]  # fmt: skip
    assert all(item.reference.is_file() for item in items)


# ---- limits


@pytest.mark.parametrize(
    ("width", "height", "reason"), [(2000, 32, "keeps 2.7% of itself"), (3, 2, "enlarged 26.7 times"), (64, 64, "")]
)
def test_too_narrow_and_too_small_photos_are_bad_rows_with_the_reason(tmp_path, width, height, reason):
    for k in range(3):
        save(tmp_path, f"{k}.png", plain(64, 64))
    save(tmp_path, "odd.png", plain(width, height))
    write_metadata(tmp_path, [row(f"{k}.png") for k in range(3)] + [row("odd.png")])
    source = opened(tmp_path, max_bad_share=0.5)
    assert [b["file"] for b in source.bad_rows] == ["odd.png"] * bool(reason)
    assert all(reason in b["reason"] for b in source.bad_rows)
    assert len(opened(tmp_path, min_kept_share=0, max_enlargement=100)) == 4


def test_the_limits_themselves_are_allowed(tmp_path):
    save(tmp_path, "a.png", plain(16, 64))
    write_metadata(tmp_path, [row("a.png")])
    only = {"sizes": ((64, 64),)}
    assert len(opened(tmp_path, **only)) == 1
    assert "kept_share" in refused(tmp_path, **only, min_kept_share=0.26)
    assert "max_enlargement" in refused(tmp_path, **only, max_enlargement=3.9)


# ---- texts that are too long


def test_rows_with_texts_that_are_too_long_are_counted_and_the_worst_is_named(tmp_path):
    for k in range(4):
        save(tmp_path, f"{k}.png", plain(64, 64))
    long = "red " * 60
    rows = [
        row("0.png"),
        row("1.png", instruction=long),
        row("2.png", target_caption=long + "and one more circle"),
        row("3.png", source_caption=long, target_caption=long),
    ]
    source = opened(write_metadata(tmp_path, rows))
    family = Flux.load(embedded_weights("base"), torch.float32, torch.device("cpu"))
    message = truncation_message(family, source.texts())
    assert message.startswith("3 rows")
    assert f"{tmp_path / 'metadata.jsonl'}:3" in message
    assert "one more circle" in source.rows[2].target_caption
    assert len(message) < 400


def test_an_error_names_the_file_of_the_sub_folder(tmp_path, caplog):
    folder_of(tmp_path, "", ("a.png",))
    write_metadata(tmp_path / "more", [{"file_name": "b.png"}])
    with pytest.raises(UserError, match=r"more.metadata\.jsonl:1"):
        opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        write_metadata(tmp_path / "more", [row("a.png", edited_file_name="b.png")])
        save(tmp_path / "more", "a.png", plain(64, 64))
        opened(tmp_path)
    assert any("edited_file_name" in r.getMessage() for r in caplog.records)
