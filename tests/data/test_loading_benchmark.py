"""The benchmark of data loading runs, on a set of a few rows."""

import json
import multiprocessing

import pytest

from benchmarks import data_loading
from npedit.errors import UserError


def test_the_share_of_an_update_that_waits_for_batches(tmp_path):
    rows = [{"step": 0, "stage": 0, "stage_name": "warm"}]
    rows += [{"stage": 0, "stage_name": "warm", "time/data": w, "time/update": 1.0} for w in (0.9, 0.1, 0.3)]
    rows += [{"stage": 1, "stage_name": "edit", "time/data": 0.0, "time/update": u} for u in (9.0, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data_loading.waiting_table(tmp_path).splitlines()[2:] == [
        "| 0, warm | 2 | 1.000 s | 200.0 ms | 20.00% |",
        "| 1, edit | 1 | 2.000 s | 0.0 ms | 0.00% |",
    ]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="two updates"):
        data_loading.waiting_table(tmp_path)


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
