"""A user's own photos as a benchmark, from the command line: what is kept, targets, masks, comparison."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from npedit.benchmarks import own
from npedit.cli import main as cli
from npedit.errors import UserError
from npedit.runs.lock import hold
from npedit.scoring.results import Results
from npedit.toy.dataset import write_dataset
from npedit.training import parts
from tests.support.encoder_sets import clip, dino

N = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Toy pairs with masks for some, tiny encoders, and the true edits under the names of outputs."""
    root = tmp_path_factory.mktemp("own")
    dino(root / "dino"), clip(root / "clip")
    data = write_dataset(root / "data", N, 0, pairs=True)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    (root / "true").mkdir()
    (data / "masks").mkdir()
    for i, row in enumerate(rows):
        Image.open(data / row["edited_file_name"]).save(root / "true" / f"0%2F{i}.png")
        if i % 2:
            row["mask_file_name"] = f"masks/{i}.png"
            changed = np.asarray(Image.open(data / row["file_name"]), dtype=int)
            changed = (changed != np.asarray(Image.open(data / row["edited_file_name"]), dtype=int)).any(2)
            Image.fromarray((changed * 255).astype(np.uint8)).save(data / row["mask_file_name"])
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def run(*words, code=0):
    done = CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "240"})
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return re.sub(r"\s+", " ", done.output)


def evaluated(root, name, *words, code=0):
    nets = ("--dino", root / "dino", "--clip", root / "clip")
    return run("evaluate", "own", root / "data", "--out", root / name, *nets, *words, code=code)


@pytest.fixture(scope="module")
def done(root):
    """Three results: true edits, copies, and the embedded editor."""
    said = evaluated(root, "r-true", "--edited", root / "true"), evaluated(root, "r-copy", "--copy")
    return root, (*said, evaluated(root, "r-editor", "--steps", 2))


def summary(root, name):
    return json.loads((root / name / "summary.json").read_text())


def test_true_edits_match_their_targets_and_preserve_the_rest(done):
    found = summary(done[0], "r-true")
    assert found["l1_target"]["value"] == 0 and found["dino_vit32x2-7_target"]["value"] == pytest.approx(1)
    assert found["psnr_target"]["value"] is None and found["psnr_target"]["undefined"] == N
    assert found["l1_outside"]["value"] == 0 and (found["l1_outside"]["n"], found["l1_outside"]["undefined"]) == (
        pytest.approx(N // 2, abs=1),
        pytest.approx(N // 2, abs=1),
    )
    assert found["clip_i_vit32x2-7_outside"]["value"] == pytest.approx(1)
    assert 0 < found["l1"]["value"] < 0.5 and found["copied"]["value"] < 0.2
    assert found["copy/l1_target"]["value"] == found["l1"]["value"]  # doing nothing is as far off as the edit is large
    assert found["clip_dir_vit32x2-7"]["n"] > 0 and "copy/clip_dir_vit32x2-7" not in found


def test_copies_preserve_everything_and_are_counted_as_copies(done):
    found = summary(done[0], "r-copy")
    assert found["copied"]["value"] == 1 and found["l1"]["value"] == 0 and found["ssim"]["value"] == pytest.approx(1)
    assert found["dino_vit32x2-7"]["value"] == pytest.approx(1)
    assert found["psnr"]["value"] is None and found["clip_dir_vit32x2-7"]["undefined"] == N
    assert found["clip_t_vit32x2-7"]["value"] == pytest.approx(found["copy/clip_t_vit32x2-7"]["value"])


def test_a_second_run_edits_only_missing_pictures(done):
    root, said = done
    pictures = sorted((root / "r-editor" / "edited").iterdir())
    assert len(pictures) == N and "0%2F3.png" in [p.name for p in pictures]
    assert "dino_vit32x2-7" in said[2] and "recolour" in said[2]
    before = summary(root, "r-editor")
    kept = pictures[0].stat().st_mtime_ns
    pictures[1].unlink()
    evaluated(root, "r-editor", "--steps", 2)
    assert pictures[0].stat().st_mtime_ns == kept and summary(root, "r-editor") == before
    assert "has another source" in evaluated(root, "r-editor", "--steps", 3, code=2)
    settings = Results.read(root / "r-editor").settings
    assert settings["source"]["model"] == "embedded" and settings["protocol"]["benchmark"] == "own"


def test_a_missing_picture_has_no_scores(done, tmp_path):
    root = done[0]
    for path in sorted((root / "true").iterdir())[1:]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run(
        "evaluate",
        "own",
        root / "data",
        "--out",
        tmp_path / "r",
        "--edited",
        tmp_path,
        "--dino",
        "none",
        "--clip",
        "none",
    )
    rows = {row.id: row for row in Results.read(tmp_path / "r").rows}
    assert rows["0/0"].scores["l1"] is None and rows["0/0"].why["l1"] == "no edited picture 0%2F0.png: no such file"
    found = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert found["l1"]["value"] is None and found["l1"]["coverage"] == pytest.approx(1 - 1 / N)
    assert rows["0/1"].why["dino_vits16"] == "DINO was left out" and found["dino_vits16"]["n"] == 0


def test_compare_prints_and_plots(done, tmp_path):
    root = done[0]
    folders = [root / n for n in ("r-copy", "r-editor", "r-true")]
    said = run("compare", *folders, "--plot", tmp_path / "p.png", "--metric", "l1", "--metric", "l1_target")
    assert "Differences from r-copy" in said and "adjusted for 4 tests" in said and "Ranking" in said
    assert f"0/{0}/{N}" in said  # true edits lose every item at l1: something was changed
    assert Image.open(tmp_path / "p.png").width > 300
    everything = run("compare", *folders[:2], "--plot", tmp_path / "p.png")
    assert "psnr is left out" in everything and "dino_vit32x2-7" in everything and "Ranking" not in everything
    rows = [{"result": n.name, "id": f"0/{i}", "score": k} for k, n in enumerate(folders) for i in range(N)]
    (tmp_path / "people.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    said = run(
        "compare",
        *folders,
        "--metric",
        "l1_target",
        "--people",
        tmp_path / "people.jsonl",
        "--plot",
        tmp_path / "p.png",
    )
    assert "Agreement with 36 human labels" in said and "l1_target" in said


def test_the_page_of_compare_holds_the_printed_figures_and_every_editors_pictures(done, tmp_path):
    folders = [done[0] / n for n in ("r-copy", "r-editor", "r-true")]
    page, data = tmp_path / "c.html", json.loads((done[0] / "r-true" / "settings.json").read_text())["data"]
    words = ["--metric", "l1", "--plot", tmp_path / "p.png", "--page", page, "--json"]
    values = json.loads(CliRunner().invoke(cli.app, ["compare", *map(str, [*folders, *words])]).stdout)
    text = page.read_text()
    assert values["page"] == str(page) and data == str((done[0] / "data").resolve())
    for editor in values["metrics"][0]["editors"]:
        assert f"<td>{editor['mean']:.4f} [{editor['ci95'][0]:.4f}, {editor['ci95'][1]:.4f}]</td>" in text
    rows = re.findall(r'<tr><td><img src="data:image/png;base64,.*?</tr>', text)
    tasks = Counter(row.task for row in Results.read(folders[0]).rows)
    assert len(rows) == sum(min(2, count) for count in tasks.values()) > 9
    assert all(row.count("<img") == 4 for row in rows)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text.partition("How the results were made")[0])
    joined = [f"{folder}+{folder}" for folder in folders]  # as of two judges
    run("compare", *joined, *words[:-1])
    assert len(re.findall(r'<tr><td><img src="data:image/png;base64,', page.read_text())) == len(rows)
    assert "can be written" in run("compare", *folders, "--page", Path(__file__) / "c.html", code=2)
    assert "end in .html" in run("compare", *folders, "--page", tmp_path / "c.txt", code=2)


def test_the_page_of_compare_shows_no_local_paths(done, tmp_path):
    """Everything that settings name, in results of one name; the pictures are damaged, then the photos are gone."""
    gone, page, plot = tmp_path / "gone" / "photos", tmp_path / "c.html", tmp_path / "p.png"
    made = {"model": str(gone / "run"), "base": "~/secret/base", "edited": str(tmp_path / "made")}
    shutil.copytree(json.loads((done[0] / "r-true" / "settings.json").read_text())["source"]["edited"], made["edited"])
    for damaged in (tmp_path / "made").rglob("*.png"):
        damaged.write_bytes(b"no picture")
    for name in "ab":
        shutil.copytree(done[0] / "r-true", tmp_path / name / "same")
        file = tmp_path / name / "same" / "settings.json"
        facts = json.loads(file.read_text()) | {"editor": {"pictures": str(gone)}, "scores": str(gone / "s.csv")}
        facts |= {"source": made, "judge": [{"name": str(gone / "judge")}]}
        facts["encoders"] |= {"clip": str(gone / f"clip-{name}"), "dino": "facebook/dino-vits16"}
        file.write_text(json.dumps(facts))
    both = (tmp_path / "a" / "same", tmp_path / "b" / "same")
    run("compare", *both, "--plot", plot, "--page", page, "--data", done[0] / "data")
    text = page.read_text()
    assert "clip-a" in text and "facebook/dino-vits16" in text and "a/same: not a picture" in text
    run("compare", *both, "--plot", plot, "--page", page, "--data", gone)
    for shown in (text, page.read_text()):
        visible = re.sub(r"base64,[^\"]*", "", shown)
        assert not [p for p in (str(tmp_path), str(done[0]), "secret", "gone/") if p in visible]
    assert "No pictures: " in page.read_text()


def test_compare_refuses_what_cannot_be_compared(done, tmp_path):
    root = done[0]
    plot = ("--plot", tmp_path / "p.png")
    assert "two folders" in run("compare", root / "r-copy", *plot, code=2)
    assert "one of them twice" in run("compare", root / "r-copy", root / "r-copy", *plot, code=2)
    assert "Did you mean" in run("compare", root / "r-copy", root / "r-true", "--metric", "l1_taget", *plot, code=2)
    assert "end in .png" in run("compare", root / "r-copy", root / "r-true", "--plot", tmp_path / "p.txt", code=2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.jsonl").write_bytes((root / "r-true" / "rows.jsonl").read_bytes())
    (other / "settings.json").write_text('{"protocol": {"benchmark": "else"}}')
    assert "of one protocol" in run("compare", root / "r-copy", other, *plot, code=2)
    assert "Differences from" in run("compare", root / "r-copy", other, "--metric", "l1", "--force", *plot)
    (other / "rows.jsonl").write_text('{"id": "else", "task": "t", "scores": {"l1": 1}, "why": {}}')
    assert "no item has it in all" in run("compare", root / "r-copy", other, "--force", *plot, code=2)


def test_invalid_options_and_data_are_refused(done, tmp_path):
    root = done[0]
    assert "got several" in evaluated(root, "x", "--copy", "--edited", root / "true", code=2)
    assert "folder of edited pictures" in evaluated(root, "x", "--edited", tmp_path / "none", code=2)
    assert "metadata.jsonl" in run("evaluate", "own", tmp_path / "none", "--out", tmp_path / "r", "--copy", code=2)
    assert "Did you mean 'own'" in run("evaluate", "owm", code=2)
    for wrong, words in (
        ({"mask_file_name": 3}, "expected text in 'mask_file_name'"),
        ({"mask_file_name": "../x.png"}, "leads out of the data folder"),
        ({"id": "a"}, "each once"),
    ):
        rows = [
            {"file_name": "a.png", "instruction": "paint it", "id": "a"},
            {"file_name": "b.png", "instruction": "x"},
        ]
        rows[1] |= wrong
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
        with pytest.raises(UserError, match=f"jsonl:2: .*{words}"):
            own.read_items(str(tmp_path))


def test_a_photo_that_cannot_be_opened_has_no_scores(root, tmp_path):
    """A row without edit type; and nothing is left out or counted that no item has."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    lines = [{"file_name": f"{n}.png", "instruction": "paint it", "id": n} for n in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in lines))
    run("evaluate", "own", tmp_path, "--out", tmp_path / "r", "--copy", "--dino", "none", "--clip", "none")
    rows = {row.id: row for row in Results.read(tmp_path / "r").rows}
    assert rows["a"].scores["l1"] == 0 and rows["a"].task == "all"
    assert set(rows["b"].scores.values()) == {None} and "no reference b.png" in rows["b"].why["l1"]
    assert not any(
        n.endswith(("_target", "_outside")) or n.startswith(("clip_t", "clip_dir")) for n in rows["a"].scores
    )


@pytest.mark.parametrize("name", ["own", "dreambench"])
def test_a_recipe_cannot_evaluate_on_a_benchmark_that_needs_data(name):
    with pytest.raises(UserError, match=f"npedit evaluate {name}"):
        parts._check_benchmark(name, [(32, 32)], 8)


# ------------------------------------------------------------------------------------------- reused and found pictures


def write_photos(folder, *ids, size=(40, 30)):
    """A photo for each id, and their metadata."""
    folder.mkdir(exist_ok=True)
    rows = []
    for k, name in enumerate(ids):
        Image.new("RGB", size, (40 * k, 90, 120)).save(folder / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "instruction": "paint it", "id": name})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def measured(data, out, *words, code=0):
    return run("evaluate", "own", data, "--out", out, "--dino", "none", "--clip", "none", *words, code=code)


def test_a_replaced_photo_is_edited_again_and_the_others_are_kept(tmp_path):
    data = write_photos(tmp_path / "data", "a", "b")
    measured(data, tmp_path / "r", "--copy")
    kept = (tmp_path / "r/edited/b.png").stat().st_mtime_ns
    Image.new("RGB", (40, 30), "white").save(data / "0.png")
    measured(data, tmp_path / "r", "--copy")
    rows = {row.id: row for row in Results.read(tmp_path / "r").rows}
    assert rows["a"].scores["l1"] == 0
    assert (tmp_path / "r/edited/b.png").stat().st_mtime_ns == kept


def test_the_old_picture_of_a_photo_that_broke_is_not_scored(tmp_path):
    data = write_photos(tmp_path / "data", "a", "b")
    measured(data, tmp_path / "r", "--copy")
    (data / "0.png").write_bytes(b"broken")
    measured(data, tmp_path / "r", "--copy")
    assert [p.name for p in (tmp_path / "r/edited").iterdir()] == ["b.png"]


def test_leftovers_of_a_full_disk_are_accepted(tmp_path):
    data = write_photos(tmp_path / "data", "a")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/settings.json.tmp").write_text('{"half')
    measured(data, tmp_path / "r", "--copy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("x")
    assert "holds other files" in measured(data, tmp_path / "other", "--copy", code=2)


def test_pictures_of_another_editor_may_have_another_extension_and_wrong_sizes_are_explained(tmp_path):
    data = write_photos(tmp_path / "data", "a", "b")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    Image.new("RGB", (80, 60), "red").save(theirs / "a.jpg")
    Image.new("RGB", (80, 20), "red").save(theirs / "b.JPG")
    said = measured(data, tmp_path / "r", "--edited", theirs)
    rows = {row.id: row for row in Results.read(tmp_path / "r").rows}
    assert rows["a"].scores["l1"] is not None and rows["b"].scores["l1"] is None
    assert "scores are missing in 1 of 2 rows; b: expected the reference's shape 40x30; got 80x20" in said
    (tmp_path / "none").mkdir()
    said = measured(data, tmp_path / "n", "--edited", tmp_path / "none", code=2)
    assert "no edited picture a.png" in said and "got none for any of 2 rows" in said


def test_ids_with_unicode_line_separators_survive_the_results_file(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, and not in JSON lines."""
    data = write_photos(tmp_path / "data", "a\u2028b", "c\u0085d")
    for name in ("x", "y"):
        measured(data, tmp_path / name, "--copy")
    assert {row.id for row in Results.read(tmp_path / "x").rows} == {"a\u2028b", "c\u0085d"}
    run("compare", tmp_path / "x", tmp_path / "y", "--metric", "l1", "--plot", tmp_path / "p.png")


def test_a_folder_that_another_evaluation_holds_is_refused(tmp_path):
    data = write_photos(tmp_path / "data", "a")
    with hold(tmp_path / "r", "evaluate own"):
        assert "evaluate own" in measured(data, tmp_path / "r", "--copy", code=2)
