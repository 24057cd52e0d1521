"""Streams: tar files that a command or a server gives, and streamed parquet."""

import functools
import http.server
import tarfile
import threading
from collections import Counter

import pytest
import torch

from npedit.data import hub, webdataset
from npedit.errors import UserError
from tests.data.test_forms import add, as_parquet, as_tars, make_rows, picture
from tests.support.photo_sets import SMALL, encoded, save, write_metadata

SOURCES = {"hub": hub, "webdataset": webdataset}


@pytest.fixture
def folder(tmp_path, caches):
    rows = make_rows()
    for number, item in enumerate(rows):
        save(tmp_path / "photos", item["file_name"], picture(number))
    return write_metadata(tmp_path / "photos", rows)


def opened(name, path, **more):
    settings = {"sizes": SMALL, "nothing_share": 0.0, "prefetch": 0, "streaming": True, "shuffle_buffer": 4} | more
    return SOURCES[name].Source(SOURCES[name].Settings(path=str(path), **settings), 0)


def make(name, folder, place):
    return (as_parquet if name == "hub" else as_tars)(folder, place)


@pytest.mark.parametrize("name", SOURCES)
def test_each_epoch_has_every_sample_once_in_a_new_order(folder, tmp_path, name):
    source = opened(name, make(name, folder, tmp_path / "set"))
    found = [source.batch(i, 1) for i in range(36)]
    orders = [[b.ids[0] for b in found[e * 12 : e * 12 + 12]] for e in range(3)]
    assert all(Counter(order) == Counter(f"i{k}" for k in range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert {tuple(b.references.shape[2:]) for b in found} == set(SMALL)
    assert any(b.extra_references is not None for b in found)
    assert source.has_target_captions and source.has_source_captions and not source.bad_rows


@pytest.mark.parametrize("name", SOURCES)
def test_a_resumed_stream_is_where_it_was_and_ranks_share_it(folder, tmp_path, name):
    place = make(name, folder, tmp_path / "set")
    whole, again, ahead = opened(name, place), opened(name, place), opened(name, place, prefetch=2)
    wanted = [whole.batch(i, 2) for i in range(10)]
    for i in (7, 8, 2, 9):
        found = again.batch(i, 2)
        assert found.ids == wanted[i].ids and torch.equal(found.references, wanted[i].references)
        assert ahead.batch(i, 2).ids == wanted[i].ids
    for i in (0, 5):
        parts = [opened(name, place).batch(i, 1, rank, 2) for rank in range(2)]
        assert parts[0].ids + parts[1].ids == wanted[i].ids
    assert whole.fingerprint() == again.fingerprint()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_tar_files_of_a_server_and_of_a_command_are_streamed(folder, tmp_path):
    place = as_tars(folder, tmp_path / "t")
    local = [opened("webdataset", place).batch(i, 1).ids for i in range(12)]
    pattern = "{000,005,010}.tar"
    by_command = opened("webdataset", f"pipe:cat {place}/{pattern}", streaming=False)
    assert [by_command.batch(i, 1).ids for i in range(12)] == local
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=place))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        by_server = opened("webdataset", f"http://127.0.0.1:{server.server_port}/{pattern}", streaming=False)
        assert [by_server.batch(i, 1).ids for i in range(12)] == local
        with pytest.raises(UserError, match="tar files that can be read"):
            opened("webdataset", f"http://127.0.0.1:{server.server_port}/none.tar")
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_stream_cannot_do_is_refused(folder, tmp_path):
    place = as_tars(folder, tmp_path / "t")
    for name, value in (("held_out", 2), ("share", 0.5), ("shares", {"style": 0.5})):
        with pytest.raises(UserError, match=f"data.{name}"):
            opened("webdataset", place, **{name: value})


def write(path, *samples):
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            add(tar, key, files)
    return path


def test_a_sample_without_the_caption_that_others_have_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("npedit.data._stream.PEEKED", 1)
    with_, without = b'{"instruction": "a", "target_caption": "b"}', b'{"instruction": "a"}'
    jpg = encoded("JPEG")
    path = write(tmp_path / "a.tar", ("k", {"jpg": jpg, "json": with_}), ("l", {"jpg": jpg, "json": without}))
    source = opened("webdataset", path)
    assert source.has_target_captions and "first" in source.rows_without("source_caption")
    with pytest.raises(UserError, match=r"a\.tar:2: expected a target_caption"):
        source.batch(1, 1)


def test_broken_pictures_of_a_stream_are_bad_rows_and_too_many_stop_it(tmp_path, monkeypatch):
    text, jpg = {"txt": b"make it blue"}, encoded("JPEG")
    samples = [(f"k{i}", {"jpg": jpg if i % 4 else b"broken", **text}) for i in range(8)]
    samples.append(("cut", {"jpg": jpg[:9000], **text}))
    path = write(tmp_path / "a.tar", *samples)
    source = opened("webdataset", path)
    ids = Counter(i for k in range(7) for i in source.batch(k, 2).ids)
    assert not {"k0", "k4", "cut"} & set(ids)
    assert {bad["id"] for bad in source.bad_rows} == {"k0", "k4", "cut"}
    monkeypatch.setattr("npedit.data._stream.LEAST_SEEN", 1)
    with pytest.raises(UserError, match="bad samples"):
        opened("webdataset", path).batch(5, 1)
    with pytest.raises(UserError, match="none"):
        opened("webdataset", write(tmp_path / "b.tar", ("k", {"jpg": b"x", **text})), max_bad_share=1.0).batch(0, 1)


def test_a_broken_picture_in_the_second_of_two_folders_is_a_bad_row(tmp_path):
    text, jpg = {"txt": b"make it blue"}, encoded("JPEG")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        samples = [(f"{name}{i}", {"jpg": b"broken" if (name, i) == ("b", 3) else jpg, **text}) for i in range(40)]
        write(tmp_path / name / "000.tar", *samples)
    source = webdataset.Source(webdataset.Settings(path=str(tmp_path / "{a,b}/000.tar"), sizes=[(32, 32)]), 0)
    assert [bad["metadata"] for bad in source.bad_rows] == [(tmp_path / "b/000.tar").as_posix()] and len(source) == 79


def test_edited_images_of_a_stream_are_not_kept(tmp_path):
    files = {"jpg": encoded("JPEG"), "edited.jpg": b"trap", "txt": b"make it blue"}
    assert opened("webdataset", write(tmp_path / "a.tar", ("k", files))).batch(0, 2).ids == ("k", "k")
