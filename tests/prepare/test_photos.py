"""Finding and reading photos, their rights, near-duplicates, and the plan of edit types."""

import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance
from PIL.PngImagePlugin import PngInfo
from writer_server import photo

from npedit.errors import UserError
from npedit.prepare import duplicates
from npedit.prepare import photos as scanning
from npedit.prepare.duplicates import group_near_duplicates, join_groups, similarity_facts
from npedit.prepare.engine import LocalEngine
from npedit.prepare.plan import refill_types, wanted_types
from npedit.prepare.set_folder import draw_held_out


def scan(folder, known=None, **more):
    settings = {"max_pixels": 10_000, "min_side": 16, "scan": LocalEngine(2).scan} | more
    return scanning.scan_photos(folder, scanning.find_photos(folder), known or folder.parent / "k.jsonl", **settings)


def test_bad_photos_are_listed_with_their_reasons(tmp_path):
    folder = tmp_path / "p"
    good = photo(folder / "good.png", 0)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(good.read_bytes()[:-200])
    (folder / "again.png").write_bytes(good.read_bytes())
    photo(folder / "tiny.png", 1, (8, 40))
    photo(folder / "huge.png", 2, (200, 100))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("left out")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(good.read_bytes())
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    found, bad = scan(folder)
    reasons = {row["file"]: row["reason"] for row in bad}
    assert [p["name"] for p in found] == ["again.png"]  # the first by name of two equal files
    wanted = {
        "empty.jpg": "an empty file", "text.png": "not a picture", "cut.png": "",
        "good.png": "the same file as again.png",
        "tiny.png": "below 16", "huge.png": "max_pixels", "moving.gif": "animation of 2", "gone.jpg": "No such file",
        "self.jpg": "symbolic links", "caf\\xe9.jpg": "not UTF-8",
    }  # fmt: skip
    assert set(reasons) == set(wanted)
    assert all(words in reasons[name] for name, words in wanted.items()), reasons


def test_photos_are_found_by_every_suffix_that_is_read_and_others_are_listed(tmp_path):
    read = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP",
            ".avif": "AVIF", ".bmp": "BMP", ".tif": "TIFF", ".TIFF": "TIFF", ".Gif": "GIF"}  # fmt: skip
    not_read = (".heic", ".HEIC", ".heif", ".hif", ".jxl", ".jp2", ".psd", ".dng", ".CR2", ".nef", ".arw")
    for number, (suffix, kind) in enumerate(read.items()):
        photo(tmp_path / "p" / f"a{suffix}", number, format=kind)
    for suffix in not_read:
        (tmp_path / "p" / f"b{suffix}").write_bytes((tmp_path / "p" / "a.TIFF").read_bytes())
    found, bad = scan(tmp_path / "p")
    assert {p["name"] for p in found} == {f"a{suffix}" for suffix in read}
    assert {row["file"] for row in bad} == {f"b{suffix}" for suffix in not_read}
    assert all("convert it to JPEG or PNG" in row["reason"] for row in bad)
    assert scan(tmp_path / "p") == (found, bad)


@pytest.mark.parametrize("place", ["missing", "file", "empty"])
def test_a_wrong_folder_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected .*photos.* correct the path"):
        scanning.find_photos(tmp_path / place)


def test_a_second_scan_reads_only_what_changed(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    for number in range(3):
        photo(folder / f"{number}.png", number)
    first = scan(folder, known=tmp_path / "k.jsonl")
    read = []
    real = scanning.read_photo
    monkeypatch.setattr(scanning, "read_photo", lambda data, most: read.append(1) or real(data, most))
    assert scan(folder, known=tmp_path / "k.jsonl") == first and not read
    photo(folder / "1.png", 9, (64, 64))
    assert scan(folder, known=tmp_path / "k.jsonl") != first and len(read) == 1
    (folder / "2.png").unlink()
    scan(folder, known=tmp_path / "k.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [(row["name"], row["width"]) for row in kept] == [("0.png", 48), ("1.png", 64)]


def test_rights_come_from_the_photo(tmp_path):
    text = PngInfo()
    text.add_text("Source", "https://example.org/1")
    text.add_text("Copyright", "CC0")
    photo(tmp_path / "p" / "a.png", 0, pnginfo=text)
    xmp = b'<x xmpRights:WebStatement="https://creativecommons.org/licenses/by/4.0/"/>'
    photo(tmp_path / "p" / "b.jpg", 1, xmp=xmp)
    (a, b), _ = scan(tmp_path / "p")
    assert (a["licence"], a["source"]) == ("CC0", "https://example.org/1")
    assert b["licence"] == "https://creativecommons.org/licenses/by/4.0/"


def test_a_table_of_rights(tmp_path):
    table = tmp_path / "r.csv"
    table.write_text("file_name,license,source\n./a.png,CC-BY,flickr\n")
    assert scanning.read_rights_table(table) == {"a.png": {"licence": "CC-BY", "source": "flickr"}}
    table.write_text(" file_name , licence, source \nb.png, CC0, me\n")
    assert scanning.read_rights_table(table) == {"b.png": {"licence": "CC0", "source": "me"}}
    table.write_text("name,what\n")
    with pytest.raises(UserError, match="file_name"):
        scanning.read_rights_table(table)


def facts(image, name):

    rgb = image.convert("RGB")
    return {
        "id": name, "name": name, **similarity_facts(rgb)
    }  # fmt: skip


def test_near_duplicates_of_real_photos_are_grouped_and_others_are_not(tmp_path):
    base = {
        name: Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")
    }
    items = []
    for name, image in base.items():
        image = image.convert("RGB")
        image.save(tmp_path / "x.jpg", quality=40)
        items += [
            facts(image, f"{name}-0"),
            facts(image.resize((image.width // 2, image.height // 2)), f"{name}-1"),
            facts(Image.open(tmp_path / "x.jpg"), f"{name}-2"),
            facts(ImageEnhance.Brightness(image).enhance(1.03), f"{name}-3"),
        ]
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    items += [facts(red, "red"), facts(blue, "blue")]
    groups = group_near_duplicates(items)
    for name in base:
        assert {groups[f"{name}-{k}"] for k in range(4)} == {f"{name}-0"}
    assert groups["red"] == "red" and groups["blue"] == "blue"  # equal hashes, other colours
    assert len(set(groups.values())) == 6


def random_looks(count, seed, spread):
    """Photos around a few hashes and colours, at distances about the limits; some look exactly alike."""
    rng = np.random.default_rng(seed)
    hashes = [int(h) for h in rng.integers(0, 2**63, 6)]
    colours = rng.integers(0, 256, (6, 192))
    made = []
    for number in rng.permutation(count):
        phash = hashes[rng.integers(6)]
        for bit in rng.integers(0, 64, rng.integers(0, spread + 1)):
            phash ^= 1 << int(bit)
        near = colours[rng.integers(6)] + rng.integers(-1, 2, 192) * rng.integers(0, 12)
        made.append({"id": f"id{number}", "name": f"{number:04d}", "phash": f"{phash:016x}",
                     "colours": near.clip(0, 255).astype(np.uint8).tobytes().hex()})  # fmt: skip
        if rng.random() < 0.2:
            made.append(made[-1] | {"id": f"copy{number}", "name": f"{(number * 7) % count:04d}-copy"})
    return made


def plain_groups(items, max_bits, max_colour):
    """The rule as it is written: all pairs are compared, and connected ones are one group."""
    items = sorted(items, key=lambda item: item["name"])
    hashes = [int(item["phash"], 16) for item in items]
    colours = np.array([list(bytes.fromhex(item["colours"])) for item in items], float)
    group = list(range(len(items)))
    for a, b in itertools.combinations(range(len(items)), 2):
        is_near = (hashes[a] ^ hashes[b]).bit_count() <= max_bits
        if is_near and ((colours[a] - colours[b]) ** 2).mean() <= max_colour**2 and group[a] != group[b]:
            low, high = sorted((group[a], group[b]))
            group = [low if k == high else k for k in group]
    return {item["id"]: items[k]["id"] for item, k in zip(items, group, strict=True)}


@pytest.mark.parametrize("max_bits", [0, 1, 4, 9, 64])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_the_plain_rule(max_bits, seed):
    items = random_looks(120, seed, spread=max(2, min(max_bits, 9)))
    found = group_near_duplicates(items, max_bits)
    assert found == plain_groups(items, max_bits, 8.0)
    assert len(items) > len(set(found.values())) > 1
    assert group_near_duplicates(items[:1]) == {items[0]["id"]: items[0]["id"]} and group_near_duplicates([]) == {}


@pytest.mark.parametrize("step", [0, 1], ids=["equal hashes", "unequal hashes"])
def test_frames_that_look_alike_are_not_all_compared(monkeypatch, step):
    count, compared = 2000, []
    real = duplicates.np.bitwise_count
    monkeypatch.setattr(duplicates.np, "bitwise_count", lambda bits: compared.append(bits.size) or real(bits))
    items = [{"id": f"{k}", "name": f"{k:04d}", "phash": f"{1 << (k % 64 * step):016x}",
              "colours": bytes([100 + k % 3] * 191 + [k % 256]).hex()} for k in range(count)]  # fmt: skip
    assert set(group_near_duplicates(items).values()) == {"0"}
    assert sum(compared) < 100 * count


def test_joined_groups():
    groups = {"a": "a", "b": "a", "c": "c", "d": "d"}
    joined = join_groups(groups, [["b", "c"]])
    assert joined["a"] == joined["b"] == joined["c"] != joined["d"]


def test_planned_types_have_the_wanted_shares():
    shares = {"add": 0.7, "remove": 0.2, "style": 0.1}
    plans = [wanted_types(f"p{i}", shares, 2, 0) for i in range(2000)]
    counts = Counter(kind for plan in plans for kind in plan)
    assert all(len(plan) == 2 for plan in plans)
    assert all(abs(counts[kind] / 4000 - share) < 0.02 for kind, share in shares.items())
    assert wanted_types("p1", shares, 2, 0) == plans[1] and plans != [
        wanted_types(f"p{i}", shares, 2, 1) for i in range(2000)
    ]
    equal = dict.fromkeys("abcdefghij", 0.1)
    assert all(len(set(wanted_types(str(i), equal, 3, 0))) == 3 for i in range(100))  # none twice


def test_a_refill_asks_for_what_is_missing_most():
    shares = {"add": 0.5, "remove": 0.5}
    asked = {p: ["add", "remove"] if p == "c" else ["add"] for p in "abc"}
    plan = refill_types(["a", "b", "c"], {"a": ["add"], "b": [], "c": ["add"]}, asked, shares, 2)
    assert plan == {"a": ["remove"], "b": ["remove"]}


def test_held_out_rows_never_split_a_group():
    rows = [{"id": f"r{i}", "photo": f"p{i // 2}", "edit_type": "add"} for i in range(100)]
    groups = {f"p{i}": f"g{i // 5}" for i in range(50)}
    held = set(draw_held_out(rows, groups, 0.1, 0))
    assert len(held) == 10
    held_groups = {groups[row["photo"]] for row in rows if row["id"] in held}
    assert not held_groups & {groups[row["photo"]] for row in rows if row["id"] not in held}
    assert draw_held_out(rows[:2], groups, 0.5, 0) == []  # the last row of a type stays for training


@pytest.mark.parametrize("sizes", [[900] + [5] * 20, [900] + [1] * 100, [300, 3, 3, 4], [50] * 20])
def test_a_large_group_is_not_held_out_while_smaller_ones_are_left(sizes):
    """Ten groups of one row are nearer to 20 rows than one group of 900; where only large ones are left, one is."""
    names = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
    rows = [{"id": f"r{k}", "photo": f"p{k}", "edit_type": "scene"} for k in range(len(names))]
    groups = {f"p{k}": name for k, name in enumerate(names)}
    for seed in range(12):
        held = set(draw_held_out(rows, groups, 0.02, seed))
        drawn = {groups[row["photo"]] for row in rows if row["id"] in held}
        assert len(held) == sum(sizes[int(name[1:])] for name in drawn)
        wanted = round(0.02 * len(rows))
        assert abs(len(held) - wanted) <= min(sizes) if min(sizes) < wanted else len(drawn) == 1
        assert "g0" not in drawn or len(set(sizes)) == 1
    assert draw_held_out(rows, groups, 0, 0) == []


def test_a_damaged_file_of_facts_is_read_again(tmp_path):
    photo(tmp_path / "p" / "a.png", 0)
    first = scan(tmp_path / "p", known=tmp_path / "k.jsonl")
    with open(tmp_path / "k.jsonl", "ab") as file:
        file.write(b'{"name": "a.png", "by')
    assert scan(tmp_path / "p", known=tmp_path / "k.jsonl") == first
    assert all(json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines())
