"""metrics.jsonl is read while it is written: each row once, whatever happens to the file."""

import json
import os

import pytest

from npedit.runs.files import append_row, read_rows, write_rows
from npedit.serve.metrics_file import MOST_LINE, MetricsFile

MUCH = 2**30


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_what_is_appended_is_read_once(path):
    file = MetricsFile(path)
    assert file.read_new(MUCH) == (False, [])
    for first in (0, 3):
        for step in range(first, first + 3):
            append_row(path, {"step": step})
        assert file.read_new(MUCH) == (False, [{"step": step} for step in range(first, first + 3)])
    assert file.read_new(MUCH) == (False, [])
    assert file.bytes_read == path.stat().st_size and file.damaged == 0


def test_a_line_that_is_being_written_is_read_when_it_is_complete(path):
    file = MetricsFile(path)
    line = json.dumps({"step": 1, "words": "größer"}).encode() + b"\n"
    for end in range(len(line)):
        path.write_bytes(b'{"step": 0}\n' + line[:end])
        assert file.read_new(MUCH)[1] == ([{"step": 0}] if end == 0 else [])
    path.write_bytes(b'{"step": 0}\n' + line)
    assert file.read_new(MUCH) == (False, [{"step": 1, "words": "größer"}])


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_resumed_run_rewrites_its_file(path, kept):
    file = MetricsFile(path)
    for step in range(6):
        append_row(path, {"step": step})
    file.read_new(MUCH)
    write_rows(path, read_rows(path)[:kept])
    append_row(path, {"step": kept, "again": True})
    is_rewritten, rows = file.read_new(MUCH)
    assert is_rewritten and rows == read_rows(path) and rows[-1]["again"]


def test_a_file_that_is_rewritten_in_its_place_is_known_by_its_end(path):
    file = MetricsFile(path)
    path.write_text('{"step": 0}\n{"step": 1}\n')
    file.read_new(MUCH)
    inode = path.stat().st_ino
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 3}\n')
    assert path.stat().st_ino == inode
    assert file.read_new(MUCH) == (True, [{"step": 0}, {"step": 2}, {"step": 3}])
    path.unlink()
    assert file.read_new(MUCH) == (True, [])
    assert file.read_new(MUCH) == (False, [])


def test_damaged_lines_are_counted_and_skipped(path):
    path.write_bytes(b'{"step": 0}\n\xff\x00\n[1]\n{"step": \n' + b"[" * 100_000 + b'\n{"step": 1}\n')
    file = MetricsFile(path)
    assert file.read_new(MUCH) == (False, [{"step": 0}, {"step": 1}]) and file.damaged == 4


def test_a_long_file_is_read_in_parts(path):
    written = [{"step": step, "words": "x" * 1000} for step in range(4000)]
    write_rows(path, written)
    file, rows, looks = MetricsFile(path), [], 0
    while looks == 0 or not file.is_at_end:
        rows += file.read_new(MOST_LINE)[1]
        looks += 1
    assert rows == written and looks == 4 and file.damaged == 0


def test_a_file_without_lines_does_not_stop_the_reader(path):
    with open(path, "wb") as made:
        made.write(b"x" * (MOST_LINE + 5) + b'\n{"step": 7}\n')
    file = MetricsFile(path)
    assert file.read_new(1)[1] == [] and file.read_new(1)[1] == [{"step": 7}]
    assert file.damaged == 2


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_has_no_rows(path):
    append_row(path, {"step": 0})
    path.chmod(0)
    assert MetricsFile(path).read_new(MUCH) == (False, [])
