"""The two data sources, on real photographs and on the toy's: what is read, what is never read, what is refused."""

import io
import json
import logging
import math
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from pydantic import ValidationError

from npedit.data import _photos, imagefolder, toy
from npedit.errors import UserError
from npedit.questions import NOTHING
from npedit.toy import world
from npedit.toy.dataset import write_dataset

SMALL = ((64, 64), (48, 80), (80, 48))
PHOTOS = {  # real photographs that scikit-image ships
    "astronaut": skimage.data.astronaut,  # 512 x 512
    "chelsea": skimage.data.chelsea,  # 300 x 451, a cat
    "coffee": skimage.data.coffee,  # 400 x 600
    "rocket": skimage.data.rocket,  # 427 x 640
    "camera": skimage.data.camera,  # 512 x 512, grey
}


def row(name, **more):
    return {"file_name": name, "instruction": "make it blue", "edit_type": "recolour", "target_caption": "blue", **more}


def write_metadata(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def plain(width, height, colour=(200, 120, 60)):
    return Image.new("RGB", (width, height), colour)


def opened(folder, seed=0, **more):
    settings = {"sizes": SMALL, "nothing_share": 0.0, "prefetch": 0} | more
    return imagefolder.Source(imagefolder.Settings(path=str(folder), **settings), seed)


def refused(folder, **more):
    with pytest.raises(UserError) as caught:
        opened(folder, **more)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path):
    """Five real photographs as an ordinary data set."""
    rows = []
    for name, load in PHOTOS.items():
        save(tmp_path, f"images/{name}.jpg", Image.fromarray(load()))
        rows.append(row(f"images/{name}.jpg", id=name, source_caption=f"a photo of {name}"))
    return write_metadata(tmp_path, rows)


@pytest.fixture
def many(tmp_path):
    """24 tiny pictures: 8 square, 12 wide, 4 tall; every batch size here divides the buckets."""
    rows = []
    for i in range(24):
        width, height = (40, 40) if i < 8 else (50, 30) if i < 20 else (30, 50)
        save(tmp_path, f"{i}.png", plain(width, height, (10 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), source_caption="a plain picture"))
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
    write_metadata(tmp_path, ["", json.dumps({"file_name": "a.png", "instruction": "make it snow", "object": None, "id": 7})])
    source = opened(tmp_path)
    batch = source.batch(0, 1)
    assert (batch.ids, batch.edit_types, batch.objects, batch.target_captions) == (("7",), ("other",), ("",), ("",))
    assert not source.has_target_captions


# ---- edited images are never opened


@pytest.fixture
def files_opened(monkeypatch):
    """Every path given to Pillow or to open()."""
    paths = []
    pillow, path_open = Image.open, Path.open

    def spy_pillow(fp, *args, **kwargs):
        paths.append(str(fp))
        return pillow(fp, *args, **kwargs)

    def spy_path(self, *args, **kwargs):
        paths.append(str(self))
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Image, "open", spy_pillow)
    monkeypatch.setattr(Path, "open", spy_path)
    return paths


TARGETS = ["edited_file_name", "edited_image", "edited", "target_image", "target_file_name", "target", "output", "output_image",
           "result", "after", "ground_truth_image"]  # fmt: skip


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
    assert "data.columns" in message
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
    save(tmp_path, "a.png", plain(8, 8))
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


def jpeg(image=None):
    buffer = io.BytesIO()
    (image or Image.fromarray(skimage.data.astronaut())).save(buffer, "JPEG")
    return buffer.getvalue()


def png():
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "missing": None,
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "truncated_jpeg": jpeg()[:9000],
    "truncated_png": png()[:9000],
    "zero_width": png_header(0, 64),
    "huge": png_header(20000, 20000),
    "large": png_header(9500, 9500),
    "bomb": png_header(60000, 60000),
    "no_pixels": png_header(64, 64),
}


@pytest.fixture
def good(tmp_path):
    """29 good rows, and a function that appends a bad one."""
    for i in range(29):
        save(tmp_path, f"{i}.png", plain(64, 64, (i, 100, 200)))
    rows = [row(f"{i}.png", id=f"good{i}") for i in range(29)]

    def add(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        rows.append(row(name, id="bad"))
        return write_metadata(tmp_path, rows)

    return add


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_a_bad_row(good, kind, recwarn):
    folder = good(f"{kind}.png", BROKEN[kind])
    source = opened(folder)
    ids = Counter(i for index in range(10) for i in source.batch(index, 3).ids)
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


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "..\\secret.png", "C:\\secret.png"])
def test_names_that_lead_out_are_bad_rows(good, tmp_path, files_opened, name):
    plain(64, 64).save(tmp_path.parent / "secret.png")
    source = opened(good(name))
    assert [b["line"] for b in source.bad_rows] == [30]
    assert "leads out" in source.bad_rows[0]["reason"]
    assert not any("secret" in p or "passwd" in p for p in files_opened)


def test_odd_names_are_bad_rows_and_no_crash(good):
    good("nul\0byte.png")
    folder = good("")if False else good("n" * 5000 + ".png")
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
    source = opened(good("29.jpg", jpeg()), prefetch=prefetch)
    assert source.bad_rows == []
    for i in range(8):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match=r"expected at most 5.0% bad rows; got \d+ of 30: .*no such file"):
        for index in range(60):
            source.batch(index, 3)


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
    tall = jpeg(Image.fromarray(skimage.data.astronaut()[:, 100:400]))
    source = opened(good("tall.jpg", tall[: len(tall) // 2]))
    assert {tuple(source.batch(i, 1).references.shape[2:]) for i in range(30)} == {(64, 64), (80, 48)}
    assert [b["id"] for b in source.bad_rows] == ["bad"]


# ---- cutting (fault 6: no black bars)

ASPECTS = [(round(60 * 2**e), 60) for e in np.linspace(-3, 3, 41)] + [(1, 1), (1, 500), (500, 1), (63, 65), (640, 426), (1279, 853)]


@pytest.mark.parametrize(("width", "height"), ASPECTS)
def test_no_padding_for_any_aspect(width, height):
    for size in SMALL + imagefolder.Settings(path="x").sizes[:4]:
        cut = _photos.cover(plain(width, height, (200, 120, 60)), size)
        assert cut.size == (size[1], size[0])
        assert cut.getextrema() == ((200, 200), (120, 120), (60, 60)), "every pixel comes from the picture"


@pytest.mark.parametrize(("width", "height"), [(120, 60), (60, 120), (90, 60), (333, 101)])
def test_a_cut_is_centred_and_keeps_the_proportions(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ramps = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    cut = np.asarray(_photos.cover(ramps, (60, 60))).astype(float)
    for channel in (0, 1):
        assert cut[..., channel].mean() == pytest.approx(127, abs=2)
    across = np.ptp(cut[30, :, 0]) / 255 * width  # pixels of the picture that the cut spans
    down = np.ptp(cut[:, 30, 1]) / 255 * height
    assert across == pytest.approx(down, rel=0.06)
    assert max(across, down) == pytest.approx(min(width, height), rel=0.06)


def test_the_bucket_is_the_nearest_aspect(tmp_path):
    sizes = imagefolder.Settings(path="x").sizes
    rows = []
    for i, (width, height) in enumerate(ASPECTS[:41]):
        save(tmp_path, f"{i}.png", plain(width, height))
        rows.append(row(f"{i}.png", id=f"{width}x{height}"))
    source = opened(write_metadata(tmp_path, rows), sizes=sizes)
    for index in range(41):
        batch = source.batch(index, 1)
        width, height = map(int, batch.ids[0].split("x"))
        got = batch.references.shape[3] / batch.references.shape[2]
        gaps = [abs(math.log(w / h) - math.log(width / height)) for h, w in sizes]
        assert abs(math.log(got) - math.log(width / height)) == pytest.approx(min(gaps))


# ---- modes and orientation


def first(folder, image, name="a.png", **save_options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **save_options)
    write_metadata(folder, [row(name)])
    return opened(folder).batch(0, 1).references[0]


def mean(reference):
    return reference.mean((1, 2)).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[:24, :40], upright[24:, 40:] = (255, 0, 0), (0, 0, 255)  # red top left, blue bottom right
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
            8: "ROTATE_270"}  # fmt: skip
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (("a.jpg", {"quality": 95}), ("b.png", {}), ("c.webp", {"lossless": True})):
        seen = first(tmp_path / name, stored, name, exif=exif, **options)
        assert seen.shape == (3, 48, 80), name
        assert mean(seen[:, 4:20, 4:36]) == pytest.approx([1, 0, 0], abs=0.03)
        assert mean(seen[:, 28:44, 44:76]) == pytest.approx([0, 0, 1], abs=0.03)


def test_alpha_is_flattened_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    assert mean(first(tmp_path / "clear", clear)) == pytest.approx([1, 1, 1])
    assert mean(first(tmp_path / "half", half)) == pytest.approx([1, 0.5, 0.5], abs=0.01)
    assert mean(first(tmp_path / "la", Image.new("LA", (64, 64), (0, 0)))) == pytest.approx([1, 1, 1])


def test_palettes_with_a_clear_colour_are_flattened_on_white(tmp_path):
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert mean(first(tmp_path / "opaque", palette)) == pytest.approx([0, 1, 0])
    assert mean(first(tmp_path / "clear", palette, transparency=1)) == pytest.approx([1, 1, 1])
    assert mean(first(tmp_path / "gif", palette, "a.gif", transparency=1)) == pytest.approx([1, 1, 1])


def test_other_modes_become_rgb(tmp_path):
    half = pytest.approx([0.5, 0.5, 0.5], abs=0.01)
    assert mean(first(tmp_path / "grey", Image.new("L", (64, 64), 128))) == half
    sixteen = Image.fromarray(np.full((64, 64), 32768, np.uint16))
    assert sixteen.mode == "I;16"
    assert mean(first(tmp_path / "sixteen", sixteen)) == half
    assert mean(first(tmp_path / "tiff", sixteen, "a.tif")) == half
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert mean(first(tmp_path / "cmyk", cmyk, "a.jpg")) == pytest.approx([1, 0, 0], abs=0.05)
    assert mean(first(tmp_path / "bits", Image.new("1", (64, 64), 1))) == pytest.approx([1, 1, 1])


def test_a_16_bit_ramp_stays_a_ramp(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    seen = first(tmp_path, Image.fromarray(np.tile(ramp, (64, 1))))
    torch.testing.assert_close(seen[0, 5], torch.linspace(0, 1, 64), atol=0.005, rtol=0)


def test_floating_point_pictures_are_bad_rows(good):
    buffer = io.BytesIO()
    Image.fromarray(np.ones((64, 64), np.float32)).save(buffer, "TIFF")
    source = opened(good("float.tif", buffer.getvalue()))
    for index in range(10):
        source.batch(index, 3)
    assert "floating-point" in source.bad_rows[0]["reason"]


# ---- order (faults 7 and 8)


def epoch_ids(source, epoch, size, world=1):
    per_epoch = 24 // (size * world)
    indices = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return [source.batch(i, size, rank, world).ids for i in indices for rank in range(world)]


@pytest.mark.parametrize(("size", "world"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_each_epoch_visits_every_row_once(many, size, world):
    source = opened(many)
    for epoch in range(3):
        ids = [i for batch in epoch_ids(source, epoch, size, world) for i in batch]
        assert sorted(map(int, ids)) == list(range(24))


def test_epochs_are_shuffled_anew(many):
    source = opened(many)
    orders = [tuple(epoch_ids(source, epoch, 2)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert len({frozenset(map(frozenset, order)) for order in orders}) == 4, "the batches' members change too"


def test_a_batch_is_of_one_bucket_and_buckets_are_mixed(many):
    source = opened(many)
    shapes = []
    for index in range(6 * 10):
        batch = source.batch(index, 4)
        kinds = {(int(i) >= 8) + (int(i) >= 20) for i in batch.ids}
        assert len(kinds) == 1
        assert batch.references.shape == (4, 3, *SMALL[kinds.pop()])
        shapes.append(tuple(batch.references.shape[2:]))
    assert Counter(shapes) == {SMALL[0]: 20, SMALL[1]: 30, SMALL[2]: 10}
    assert shapes[:6] != sorted(shapes[:6]) or shapes[6:12] != sorted(shapes[6:12])


@pytest.mark.parametrize("size", [3, 5, 7])
def test_no_row_is_left_out_where_the_batch_does_not_divide(many, size):
    """24 rows, batches of `size`: after `size` epochs each row came exactly `size` times, whatever its bucket holds."""
    source = opened(many)
    seen = Counter(i for index in range(24) for i in source.batch(index, size).ids)
    assert seen == {str(i): size for i in range(24)}


def test_a_batch_larger_than_the_data_works(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    source = opened(write_metadata(tmp_path, [row("a.png", id="a")]))
    assert source.batch(0, 8).ids == source.batch(5, 8).ids == ("a",) * 8


def test_ranks_are_disjoint_and_make_up_the_whole(many):
    source = opened(many)
    for index in range(12):
        parts = [source.batch(index, 2, rank, 2) for rank in range(2)]
        assert not set(parts[0].ids) & set(parts[1].ids)
        whole = source.batch(index, 4)
        assert parts[0].ids + parts[1].ids == whole.ids
        assert torch.equal(torch.cat([p.references for p in parts]), whole.references)


def test_a_batch_depends_on_seed_and_index_alone(many):
    a, b, other = opened(many), opened(many, prefetch=3), opened(many, seed=1)
    run = [a.batch(i, 4) for i in range(12)]
    for i in (11, 0, 5, 6, 7, 2):
        again = b.batch(i, 4)
        assert again.ids == run[i].ids
        assert torch.equal(again.references, run[i].references)
    assert [other.batch(i, 4).ids for i in range(12)] != [r.ids for r in run]


def test_global_random_numbers_are_left_alone(many):
    torch.manual_seed(0)
    np.random.seed(0)
    opened(many).batch(0, 4)
    opened(many).batch(0, 4)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert after == (torch.rand(1), np.random.rand())


def test_batches_are_made_ahead(many, monkeypatch):
    source = opened(many, prefetch=2)
    real, made = imagefolder.open_photo, []
    monkeypatch.setattr(imagefolder, "open_photo", lambda *a: made.append(a) or real(*a))
    source.batch(0, 4)
    deadline = time.monotonic() + 10
    while len(made) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 12
    source.batch(1, 4)


def test_impossible_ranks_and_sizes_are_refused(many):
    for wrong in ((0, 0, 0, 1), (-1, 4, 0, 1), (0, 4, 2, 2)):
        with pytest.raises(ValueError, match="rank < world"):
            opened(many).batch(*wrong)
        with pytest.raises(ValueError, match="rank < world"):
            toy.Source(toy.Settings(), 0).batch(*wrong)


# ---- the fingerprint


def test_the_fingerprint_follows_the_data_and_not_the_place(many, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    before = opened(many).fingerprint()
    assert before == opened(many, seed=3).fingerprint()
    many.rename(moved)
    assert opened(moved).fingerprint() == before
    plain(300, 300).save(moved / "3.png")
    changed = opened(moved).fingerprint()
    assert changed != before
    with (moved / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row("4.png")) + "\n")
    assert opened(moved).fingerprint() not in (before, changed)


# ---- nothing to do (fault 3)


def test_some_items_have_nothing_to_do(many):
    source = opened(many, nothing_share=0.25)
    items = [b for index in range(100) for b in zip(*_columns(source.batch(index, 4)), strict=True)]
    nothing = [i for i in items if i[1] == NOTHING]
    assert 0.18 < len(nothing) / len(items) < 0.32
    for instruction, _, thing, caption in nothing:
        assert instruction in imagefolder.NOTHING_PHRASES
        assert (thing, caption) == ("", "a plain picture"), "described by its own caption, not by the edit's"
    assert {i[3] for i in items if i[1] != NOTHING} == {"blue"}


def _columns(batch):
    return batch.instructions, batch.edit_types, batch.objects, batch.target_captions


def test_without_a_caption_of_its_own_no_item_is_turned(tmp_path):
    """Its only caption tells of the edit, and "do nothing" would contradict it."""
    save(tmp_path, "a.png", plain(64, 64))
    assert opened(write_metadata(tmp_path, [row("a.png")]), nothing_share=1.0).batch(0, 4).edit_types == ("recolour",) * 4
    bare = {"file_name": "a.png", "instruction": "make it blue"}
    assert opened(write_metadata(tmp_path, [bare]), nothing_share=1.0).batch(0, 4).edit_types == (NOTHING,) * 4


def test_nothing_to_do_can_stand_in_the_data(tmp_path):
    save(tmp_path, "a.png", plain(64, 64))
    rows = [{"file_name": "a.png", "instruction": "leave it", "edit_type": "do_nothing", "source_caption": "a wall"}]
    source = opened(write_metadata(tmp_path, rows))
    assert source.has_target_captions
    assert _columns(source.batch(0, 1)) == (("leave it",), (NOTHING,), ("",), ("a wall",))


def test_the_phrases_are_known_to_the_toy():
    assert imagefolder.NOTHING_PHRASES == world.NOTHING


# ---- the toy as a source


def test_the_toy_draws_references_only(monkeypatch):
    drawn = []
    monkeypatch.setattr(toy, "render", lambda scenes: drawn.extend(scenes) or world.render(scenes))
    source = toy.Source(toy.Settings(nothing_share=0.0), 5)
    batch = source.batch(2, 8)
    import random

    edits = [world.sample_edit(random.Random(f"5/{i}")) for i in range(16, 24)]
    assert drawn == [e.reference for e in edits]
    assert torch.equal(batch.references, world.render(drawn))
    assert batch.instructions == tuple(e.instruction for e in edits)
    assert batch.target_captions == tuple(e.target_caption for e in edits)
    assert batch.references.shape == (8, 3, *source.sizes[0])
    assert source.has_target_captions
    assert source.bad_rows == []


def test_the_toys_ranks_make_up_the_whole():
    source = toy.Source(toy.Settings(), 0)
    for index in range(3):
        parts = [source.batch(index, 4, rank, 3).ids for rank in range(3)]
        assert sum(parts, ()) == source.batch(index, 12).ids
    ids = [i for index in range(20) for i in source.batch(index, 5).ids]
    assert len(set(ids)) == 100


def test_the_toy_repeats_itself_and_follows_the_seed():
    a, b, other = (toy.Source(toy.Settings(), seed) for seed in (0, 0, 1))
    assert torch.equal(a.batch(7, 4).references, b.batch(7, 4).references)
    assert a.fingerprint() == b.fingerprint() != other.fingerprint()
    assert a.batch(7, 4).instructions != other.batch(7, 4).instructions


def test_the_toy_has_items_with_nothing_to_do():
    batch = toy.Source(toy.Settings(nothing_share=0.2), 0).batch(0, 500)
    turned = [i for i, t in enumerate(batch.edit_types) if t == NOTHING]
    assert 60 < len(turned) < 140
    for i in turned:
        assert batch.instructions[i] in world.NOTHING
        assert batch.target_captions[i] == batch.source_captions[i]


# ---- the toy on disk


def test_the_toy_on_disk_is_an_ordinary_data_set_without_edited_images(tmp_path):
    folder = write_dataset(tmp_path / "toy", 12, seed=4)
    assert sorted(p.name for p in folder.iterdir()) == ["images", "metadata.jsonl"]
    assert len(list((folder / "images").iterdir())) == 12
    source = opened(folder, sizes=((world.SIDE, world.SIDE),))
    drawn = toy.Source(toy.Settings(nothing_share=0.0), 4).batch(0, 12)
    where = {i: k for k, i in enumerate(drawn.ids)}
    for index in range(12):
        batch = source.batch(index, 1)
        k = where.pop(batch.ids[0])
        assert batch.instructions == (drawn.instructions[k],)
        assert batch.objects == (drawn.objects[k],)
        torch.testing.assert_close(batch.references[0], drawn.references[k], atol=0.5 / 255 + 1e-6, rtol=0)
    assert not where


def test_the_paired_toy_has_edited_images_that_training_never_opens(tmp_path, caplog, files_opened):
    folder = write_dataset(tmp_path / "toy", 9, seed=0, pairs=True)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    import random

    for i, line in enumerate(lines):
        edit = world.sample_edit(random.Random(f"0/{i}"))
        with Image.open(folder / line["edited_file_name"]) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert world.judge(edit, world.read_scene(pixels)[0]) == (True, True)
    files_opened.clear()
    source = opened(folder, sizes=((32, 32),))
    source.batch(0, 9)
    assert "edited_file_name" in caplog.text
    assert files_opened
    assert not any("edited" in p for p in files_opened)


def test_hugging_face_opens_the_toy_on_disk(tmp_path, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("cache"))
    for name, pairs in (("bare", False), ("pairs", True)):
        folder = write_dataset(tmp_path / name, 3, seed=0, pairs=pairs)
        loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
        assert len(loaded) == 3
        assert loaded[0]["image"].size == (32, 32)


def test_the_toy_is_not_written_over_anything(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="new or empty folder"):
        write_dataset(tmp_path, 2, seed=0)
    with pytest.raises(UserError, match="new or empty folder"):
        write_dataset(tmp_path / "mine.txt", 2, seed=0)
    with pytest.raises(UserError, match="expected a folder to write to"):
        write_dataset(tmp_path / "mine.txt" / "below", 2, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        write_dataset(tmp_path / "new", 0, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_broken_off_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        write_dataset(tmp_path / "toy", 2, seed=0)
    assert list(tmp_path.iterdir()) == []
