"""A folder of runs: which have an editor, and editors on demand."""

import os

import pytest
from PIL import Image
from served_runs import make_runs

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.serve.queue import EditQueue, EditRequest
from npedit.serve.runs import Runs, find_runs


@pytest.fixture
def folder(tmp_path):
    made = make_runs(tmp_path / "runs", "one", "two", "three", "without")
    for age, name in enumerate(("three", "two", "one")):
        os.utime(made / name / "final", (1e9 - age, 1e9 - age))
    for file in (made / "without" / "final").iterdir():
        if file.is_file():
            file.unlink()
    (made / "notes.txt").write_text("")
    return made


def test_runs_with_an_editor_are_found_the_newest_first(folder):
    assert list(find_runs(folder)) == ["three", "two", "one"]
    for other in (folder / "one", folder / "one" / "final", folder / "nothing", "embedded"):
        assert find_runs(other) == {}


def test_a_run_that_trains_is_its_newest_checkpoint(folder):
    for number in (3, 12):
        checkpoint = folder / "without" / f"checkpoint-{number:06d}"
        checkpoint.mkdir()
        (checkpoint / "COMPLETE").write_text("")
    runs = Runs(folder, Editor.open)
    assert ("without (checkpoint-000012)", "without") in runs.choices() and ("one", "one") in runs.choices()


def test_two_editors_are_in_memory_at_most(folder):
    opened = []
    runs = Runs(folder, lambda path: opened.append(path) or Editor.open(path))
    first = runs.open("one")
    for name in ("two", "one", "two", "three", "one", "two"):
        editor = runs.open(name)
        assert (editor is first) == (name == "one")
    assert opened == [str(folder / name / "final") for name in ("one", "two", "three", "two")]
    assert runs.sizes["two"] == first.sizes


def test_more_editors_may_be_in_memory(folder):
    opened = []
    runs = Runs(folder, lambda path: opened.append(path) or Editor.open(path), most_editors=3)
    make_runs(folder, "four")
    for name in ("one", "two", "three", "two", "four", "one", "two", "three"):
        runs.open(name)
    assert opened == [str(folder / name / "final") for name in ("one", "two", "three", "four", "three")]


def test_a_batch_has_one_runs_editor(folder):
    runs, sizes = Runs(folder, Editor.open), []
    queue = EditQueue(lambda: runs.open("one"), on_batch=lambda size, _: sizes.append(size), open_run=runs.open)
    picture = Image.new("RGB", (32, 32))
    names = ["", "two", "nothing", "two"]
    results = [queue.submit(EditRequest(picture, "paint it red", run=name)) for name in names]
    queue.close(60)
    with pytest.raises(UserError, match="expected one of the runs"):
        results[2].result()
    assert sizes == [1, 2, 1]
    assert results[0].result().tobytes() == results[1].result().tobytes()  # copies of one editor


def test_a_report_is_made_without_writing_into_the_run(folder):
    assert "<h1>toy" in Runs(folder, Editor.open).report("one")
    assert not (folder / "one" / "report.html").exists()
    with pytest.raises(UserError, match="expected one of the runs"):
        Runs(folder, Editor.open).report("../one")
