"""Large sets: the rows are kept as a memory-mapped table between starts, and what has changed is seen."""

import json
import logging
import os
import threading

import numpy as np
import pytest

from npedit.data import _rows, _scan, _source, imagefolder
from npedit.errors import UserError
from npedit.runs.changes import data_change
from tests.support.photo_sets import opened, plain, refused, row, save, write_metadata


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Sets of every size are kept, in a folder of this test."""
    monkeypatch.setenv("NPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(imagefolder, "CACHED_FROM", 0)
    return tmp_path / "cache"


@pytest.fixture
def many(tmp_path):
    rows = []
    for i in range(12):
        save(tmp_path / "photos", f"{i}.png", plain(64 if i % 2 else 90, 64, (20 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=str(i), edited_image="x.png"))
    return write_metadata(tmp_path / "photos", rows)


def count_parses(monkeypatch):
    calls, real = [], imagefolder.read_rows
    monkeypatch.setattr(imagefolder, "read_rows", lambda *a: calls.append(a) or real(*a))
    return calls


def facts(source):
    batches = [source.batch(i, 2) for i in range(12)]
    return [(b.ids, b.instructions, b.references.sum().item()) for b in batches], source.fingerprint()


def test_a_second_start_reads_no_metadata_and_opens_no_photo_and_is_the_same(many, cached, monkeypatch, caplog):
    plainly = opened(many)
    assert list(cached.iterdir())  # as CACHED_FROM is 0
    wanted, calls, looked_at = facts(plainly), count_parses(monkeypatch), []
    real = _scan.read_photo_size
    monkeypatch.setattr(_scan, "read_photo_size", lambda *a: looked_at.append(a) or real(*a))
    with caplog.at_level(logging.WARNING):
        again = opened(many)
    assert facts(again) == wanted and not calls and not looked_at
    assert "edited_image" in caplog.text, "said at each start"
    monkeypatch.setattr(imagefolder, "CACHED_FROM", 1 << 30)
    assert facts(opened(many)) == wanted, "with and without the cache"
    assert [r.id for r in again.rows] == [str(i) for i in range(12)] and again.rows[-1].id == "11"


def test_changed_metadata_are_read_again_and_old_tables_do_not_pile_up(many, cached):
    opened(many)
    file = many / "metadata.jsonl"
    file.write_text(file.read_text().replace("make it blue", "make it grey"))
    assert opened(many).rows[0].instruction == "make it grey"
    (folder,) = cached.iterdir()
    assert len(list(folder.glob("*.arrow"))) == 1


def test_another_limit_of_pixels_looks_at_all_photos_again(many, cached):
    assert "bad rows" in refused(many, max_pixels=1000)
    assert not opened(many).bad_rows
    assert "bad rows" in refused(many, max_pixels=1000)


def test_a_photo_that_is_lost_broken_or_back_again_is_seen(many, cached):
    before = opened(many, max_bad_share=0.5).fingerprint()
    saved = (many / "3.png").read_bytes()
    (many / "3.png").unlink()
    (many / "4.png").write_bytes(b"no picture")
    for _ in range(2):
        source = opened(many, max_bad_share=0.5)
        assert [(bad["id"], bad["reason"]) for bad in source.bad_rows] == [
            ("3", "no such file"), ("4", "not a picture, or a format that is unknown here"),
        ]  # fmt: skip
    (many / "3.png").write_bytes(saved)
    plain(90, 64, (80, 100, 200)).save(many / "4.png")
    assert not opened(many).bad_rows and opened(many).fingerprint() == before
    plain(300, 300).save(many / "4.png")
    assert opened(many).fingerprint() != before


def test_shares_of_the_rows_are_scanned_apart(many, cached):
    part = opened(many, share=0.5)
    assert len(part.rows) == 6 and len(opened(many).rows) == 12
    assert facts(opened(many, share=0.5)) == facts(part)


def test_a_wrong_folder_is_said_before_all_rows_are_read(many, cached, monkeypatch):
    for photo in many.glob("*.png"):
        photo.unlink()
    assert "none of the first 12" in refused(many)
    monkeypatch.setattr(imagefolder, "CACHED_FROM", 1 << 30)
    assert "12 of 12" in refused(many)


def test_a_damaged_cache_is_made_again(many, cached):
    wanted = facts(opened(many))
    (folder,) = cached.iterdir()
    for name in ("state.json", "photos-1.npy"):
        (folder / name).write_bytes(b"damaged")
        assert facts(opened(many)) == wanted


def test_processes_that_start_together_read_once(many, cached, monkeypatch):
    calls, found = count_parses(monkeypatch), []
    threads = [threading.Thread(target=lambda: found.append(len(opened(many)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [12] * 4 and len(calls) == 2  # the first photos, then all rows


def test_the_inventory_of_a_large_set_is_packed_and_a_lost_photo_is_still_told_from_a_changed_one(many, monkeypatch):
    monkeypatch.setattr(_source, "LISTED_PHOTOS", 5)
    began = json.loads(json.dumps(opened(many, max_bad_share=0.5).inventory()))
    assert set(began) == {"metadata", "packed_sizes", "held_out"}
    (many / "3.png").unlink()
    words, allowed = data_change(began, opened(many, max_bad_share=0.5).inventory())
    assert allowed and words == "missing or unreadable: row 4"
    plain(300, 300).save(many / "4.png")
    words, allowed = data_change(began, opened(many, max_bad_share=0.5).inventory())
    assert not allowed and "of another size in bytes: row 5" in words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_a_writable_cache_the_rows_are_read_each_time(many, cached):
    cached.mkdir()
    cached.chmod(0o500)
    assert len(opened(many)) == 12


def test_a_full_disk_is_said(many, cached, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_rows, "_write_table", full)
    with pytest.raises(UserError, match="NPEDIT_CACHE"):
        opened(many)


def test_rows_of_a_table_are_found_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", 5)
    save(tmp_path, "a.png", plain(64, 64))
    source = opened(write_metadata(tmp_path, [row("a.png", id=str(i)) for i in range(23)]))
    assert [source.rows[i].id for i in range(23)] == [r.id for r in source.rows] == [str(i) for i in range(23)]
    part = _rows.Rows.select(source.rows, np.array([0, 4, 5, 9, 17, 22]))
    assert [r.id for r in part] == ["0", "4", "5", "9", "17", "22"] == [part[i].id for i in range(6)]
    assert [r.id for r in part.select(np.array([1, 5]))] == ["4", "22"]
    assert part[-1].line == 23 and [r.id for r in part[1:3]] == ["4", "5"]
    with pytest.raises(IndexError):
        part[6]
    assert json.loads(json.dumps(source.inventory()))["photos"] == {"a.png": (tmp_path / "a.png").stat().st_size}
