"""The benchmark of data loading runs, on a set of a few rows."""

import multiprocessing

import pytest

from benchmarks import data_loading


@pytest.mark.slow
def test_the_table_has_both_starts(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    text = data_loading.loading_table(folder, 200, step_seconds=1.0)
    assert (
        "| 200 rows | first start | later starts |" in text and "prefetch 2" in text and "of an update of 1 s" in text
    )
    assert not multiprocessing.active_children()
    before = (folder / "photos" / "metadata.jsonl").read_text()
    data_loading.write_set(folder, 200)
    assert (folder / "photos" / "metadata.jsonl").read_text() == before, "a set that is there is kept"
