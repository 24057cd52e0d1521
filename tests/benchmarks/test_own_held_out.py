"""`npedit evaluate own --held-out`: only the rows that training never used, named by a file or by the run."""

from __future__ import annotations

import json

import pytest

from npedit.data import imagefolder
from npedit.recipe.config import load_recipe
from npedit.recipe.packaged import recipe_path
from npedit.runs.checkpoint import write_run_metadata
from npedit.scoring.results import Results
from tests.support.command_line import run
from tests.support.photo_sets import plain, row, save, write_metadata

COUNT, HELD_OUT = 8, 3


@pytest.fixture
def data(tmp_path):
    """Eight photos; the ids of two are in the file `mine.txt`."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(COUNT):
        save(folder, f"{i}.png", plain(40, 40, (20 * i, 100, 200)))
        rows.append(row(f"{i}.png", id=f"photo {i}", edit_type="recolour", object="thing"))
    (folder / "mine.txt").write_text("photo 5\n\nphoto 2\n")
    return write_metadata(folder, rows)


def start_run(folder, data, **settings):
    """What a run on this data leaves before its first update; returns the ids that it holds out."""
    chosen = {"path": str(data), "held_out": HELD_OUT, "sizes": [[32, 32]], **settings}
    recipe = load_recipe(recipe_path("sana-24gb"), [f"data.{k}={json.dumps(v)}" for k, v in chosen.items()])
    source = imagefolder.Source(recipe.data.settings, recipe.seed)
    folder.mkdir()
    write_run_metadata(folder, recipe, {"data_fingerprint": "x", "processes": 1}, source.inventory())
    return [i for batch in source.held_out_batches(COUNT) for i in batch.ids]


def scored_ids(results, data, *words):
    run("evaluate", "own", data, "--copy", "--dino", "none", "--clip", "none", "--out", results, *words)
    return [r.id for r in Results.read(results).rows]


def test_a_file_of_ids_selects_rows(data, tmp_path):
    assert scored_ids(tmp_path / "r", data, "--held-out", "mine.txt") == ["photo 5", "photo 2"]
    assert len(scored_ids(tmp_path / "all", data)) == COUNT
    said = run("evaluate", "own", data, "--copy", "--out", tmp_path / "r", code=2)
    assert "another protocol" in said  # all rows are another benchmark than some of them


def test_a_run_selects_the_rows_that_it_held_out(data, tmp_path):
    held_out = start_run(tmp_path / "run", data)
    assert len(held_out) == HELD_OUT
    assert sorted(scored_ids(tmp_path / "r", data, "--held-out", tmp_path / "run")) == sorted(held_out)


def test_a_run_whose_rows_were_named_by_a_file(data, tmp_path):
    assert sorted(start_run(tmp_path / "run", data, held_out="mine.txt")) == ["photo 2", "photo 5"]
    assert scored_ids(tmp_path / "r", data, "--held-out", tmp_path / "run") == ["photo 5", "photo 2"]


def refused(data, held_out):
    folder = data.parent / "refused"
    return run("evaluate", "own", data, "--copy", "--out", folder, "--held-out", held_out, code=2)


def test_what_names_no_held_out_rows_is_refused(data, tmp_path):
    (data / "typo.txt").write_text("photo 55\n")
    assert "Did you mean 'photo 5'" in refused(data, "typo.txt")
    assert "expected a run or a file" in refused(data, "nowhere.txt")
    start_run(tmp_path / "none", data, held_out=0)
    assert "expected a run with held-out rows" in refused(data, tmp_path / "none")
    start_run(tmp_path / "part", data, held_out=1, share=0.5)
    assert "data.share of 1" in refused(data, tmp_path / "part")
    start_run(tmp_path / "run", data)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "expected a run on" in refused(tmp_path / "moved", tmp_path / "run")
