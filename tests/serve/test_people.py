"""Blind comparisons by people: orders, answers, and what follows from them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from judge_server import picture, serving, write_gedit
from PIL import Image

from npedit.errors import UserError
from npedit.runs.files import read_rows
from npedit.scoring.results import Results, Row
from npedit.serve.people import (
    Comparison,
    answers_about,
    clean_name,
    hold_answers,
    preferences,
    rater_order,
    summarise,
)
from npedit.serve.people_pairs import Pair, read_pairs

NAMES = ("one", "two")


def make_pairs(count, folder=Path("nowhere")):
    opener = partial(Image.new, "RGB", (8, 8))
    return [Pair(f"i{k}", "t", f"edit {k}", opener, (folder / f"a{k}.png", folder / f"b{k}.png")) for k in range(count)]


def written_pairs(count, folder):
    found = make_pairs(count, folder)
    for k, pair in enumerate(found):
        for j, path in enumerate(pair.edited):
            picture(2 * k + j).save(path)
    return found


def results_of(scores, tasks=None):
    """Two results; `scores` are (metric -> (first, second)) of each item."""
    made = []
    for k, name in enumerate(NAMES):
        rows = [
            Row(f"i{i}", tasks[i] if tasks else "t", {m: v[k] for m, v in item.items()}, {})
            for i, item in enumerate(scores)
        ]
        made.append(Results(name, tuple(rows), {}))
    return made


def answers_of(values, rater="ann"):
    """Answers about items: 1 the second editor is better, -1 the first, 0 a tie. Sides alternate."""
    rows = []
    for k, value in enumerate(values):
        left, right = NAMES if k % 2 else NAMES[::-1]
        preferred = {1: NAMES[1], -1: NAMES[0], 0: None}[value]
        answer = "tie" if preferred is None else "left" if preferred == left else "right"
        rows.append({"rater": rater, "id": f"i{k}", "left": left, "right": right, "answer": answer})
    return rows


# ---------------------------------------------------------------------------------------------------------------- blind


def sides(rater, seed=0, count=20, reverse=False):
    found = make_pairs(count)
    return [(s.pair.id, s.swapped) for s in rater_order(found[::-1] if reverse else found, rater, seed)]


def test_each_rater_sees_every_item_once_and_each_editor_on_the_left_in_half_of_them():
    for k in range(50):
        assert sum(swapped for _, swapped in sides(f"rater {k}")) == 10
        assert sorted(id for id, _ in sides(f"rater {k}")) == sorted(f"i{i}" for i in range(20))
    odd = [sum(swapped for _, swapped in sides(f"rater {k}", count=5)) for k in range(200)]
    assert set(odd) == {2, 3} and 60 < odd.count(2) < 140


def test_an_order_follows_from_seed_rater_and_items():
    assert sides("ann") == sides("ann", reverse=True)
    assert len({str(sides(rater, seed)) for rater in ("ann", "bob") for seed in (0, 1)}) == 4


def test_neither_side_nor_place_tells_the_editor_over_raters():
    orders = [sides(f"rater {k}") for k in range(400)]
    at_place = np.mean([[swapped for _, swapped in order] for order in orders], axis=0)
    of_item = np.mean([[swapped for _, swapped in sorted(order)] for order in orders], axis=0)
    assert np.abs(at_place - 0.5).max() < 0.1 and np.abs(of_item - 0.5).max() < 0.1  # 4 standard errors


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_rater_goes_on_where_they_stopped_and_others_are_not_disturbed(tmp_path):
    found, file = written_pairs(6, tmp_path), tmp_path / "people.jsonl"
    first = Comparison(NAMES, found, file, seed=3)
    for _ in range(4):
        first.record("ann", first.next("ann"), "left")
    first.record("bob", first.next("bob"), "tie")
    again = Comparison(NAMES, found, file, seed=3)
    assert (again.done("ann"), again.done("bob"), again.done("eve")) == (4, 1, 0)
    assert again.next("ann").number == 5 and again.next("bob").number == 2 and again.next("eve").number == 1
    for shown, row in zip(again.order("ann"), map(json.loads, file.read_text().splitlines()[:4]), strict=False):
        left = NAMES[1] if shown.swapped else NAMES[0]
        assert (row["id"], row["left"], row["preferred"], row["rater"]) == (shown.pair.id, left, left, "ann")
        assert row["number"] == shown.number and row["seed"] == 3 and row["time"].endswith("Z")
    for _ in range(2):
        again.record("ann", again.next("ann"), "right")
    assert again.next("ann") is None and again.before("ann", 1) is None
    assert again.before("ann", None).number == 6 and again.before("ann", 4).number == 3
    with pytest.raises(UserError, match="tie"):
        again.record("ann", again.order("ann")[0], "both")


def test_the_last_answer_counts_and_others_are_not_read(tmp_path):
    rows = answers_of([1, 1, 0]) + answers_of([-1]) + answers_of([0, 0], "bob")
    rows += [{**rows[0], "left": "three"}, {**rows[0], "answer": "?"}]
    found = preferences(rows, NAMES)
    assert found == {("ann", "i0"): -1, ("ann", "i1"): 1, ("ann", "i2"): 0, ("bob", "i0"): 0, ("bob", "i1"): 0}
    assert preferences(rows, NAMES[::-1])["ann", "i1"] == -1


def test_a_line_that_a_kill_truncated_does_not_spoil_the_next_one(tmp_path):
    found, file = written_pairs(3, tmp_path), tmp_path / "people.jsonl"
    file.write_text(json.dumps(answers_of([1])[0] | {"digest": found[0].digest(NAMES)}) + '\n{"rater": "an')
    with hold_answers(file):
        comparison = Comparison(NAMES, found, file)
        comparison.record("ann", next(s for s in comparison.order("ann") if s.pair.id == "i2"), "tie")
        with pytest.raises(UserError, match="another page"), hold_answers(file):
            pass
    assert Comparison(NAMES, found, file).done("ann") == 2


def test_an_item_with_a_broken_picture_is_left_out(tmp_path):
    found = written_pairs(3, tmp_path)
    found[1].edited[0].write_bytes(b"no picture")
    comparison, seen = Comparison(NAMES, found, tmp_path / "people.jsonl"), []
    while shown := comparison.next("ann"):
        seen.append(shown.pair.id)
        comparison.record("ann", shown, "tie")
    assert sorted(seen) == ["i0", "i2"] and comparison.done("ann") == 2 == len(comparison.order("ann"))


def ask_all(comparison, rater="ann"):
    while shown := comparison.next(rater):
        comparison.record(rater, shown, "left" if shown.swapped else "right")  # the second editor


OTHERS = {
    "another picture of the first editor": lambda pair: picture(90).save(pair.edited[0]),
    "another picture of the second editor": lambda pair: picture(90).save(pair.edited[1]),
    "other data": lambda pair: replace(pair, data=("new", "new")),
    "another instruction": lambda pair: replace(pair, instruction="another"),
    "swapped folders": lambda pair: replace(pair, edited=pair.edited[::-1]),
}


@pytest.mark.parametrize("change", OTHERS)
def test_answers_count_only_for_what_was_seen(tmp_path, change):
    found, file = written_pairs(4, tmp_path), tmp_path / "people.jsonl"
    ask_all(Comparison(NAMES, found, file))
    other = OTHERS[change](found[1]) or found[1]
    again = Comparison(NAMES, [found[0], other, *found[2:]], file)
    assert again.done("ann") == 3 and again.ignored == 1 and again.next("ann").pair.id == "i1"
    rows, ignored = answers_about(read_rows(file), again.pairs, NAMES)
    assert {row["id"] for row in rows} == {"i0", "i2", "i3"} and ignored == 1
    ask_all(again)
    rows, ignored = answers_about(read_rows(file), again.pairs, NAMES)
    assert len(rows) == 4 and ignored == 1


def test_answers_count_for_the_same_results_in_the_other_order_and_not_without_a_digest(tmp_path):
    found, file = written_pairs(3, tmp_path), tmp_path / "people.jsonl"
    ask_all(Comparison(NAMES, found, file))
    turned = [replace(pair, edited=pair.edited[::-1]) for pair in found]
    assert Comparison(NAMES[::-1], turned, file).done("ann") == 3
    assert Comparison(("one", "three"), found, file).ignored == 0  # answers about other editors are not counted at all
    older = [{k: v for k, v in row.items() if k != "digest"} for row in read_rows(file)]
    assert answers_about(older, found, NAMES) == ([], 3)
    found[0].edited[0].unlink()
    assert answers_about(read_rows(file), found, NAMES)[1] == 1


@pytest.mark.parametrize(
    "content", ['{"a": 1}', '{"a": 1}\n', '{"result": "a", "id": "0", "score": 1}\n', "\x00\n", "x"]
)
def test_a_file_that_holds_something_else_is_no_file_of_answers(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--answers: expected .*results\.json, which holds something else"):
        with hold_answers(file):
            pass
    assert file.read_text() == content
    for fine in ("", '{"rater": "an'):
        file.write_text(fine)
        with hold_answers(file):
            pass


def test_names_of_raters():
    assert clean_name("  Ann   Lee ") == "Ann Lee"
    for bad in ("", "  ", "x" * 61, "a\x00b"):
        with pytest.raises(UserError, match="name"):
            clean_name(bad)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_the_win_rate_in_closed_form_and_ties_count_half():
    values = [1] * 7 + [0] * 4 + [-1] * 9
    found = summarise(results_of([{"O": (0.0, 0.0)}] * 20), answers_of(values))
    assert (found["wins"], found["ties"], found["losses"], found["answers"], found["items"]) == (7, 4, 9, 20, 20)
    assert found["win_rate"] == pytest.approx((7 + 4 / 2) / 20) and (found["baseline"], found["editor"]) == NAMES
    low, high = found["ci95"]
    assert low < found["win_rate"] < high and found["p"] > 0.3
    assert summarise(results_of([{"O": (0.0, 0.0)}] * 20), answers_of([0] * 20))["win_rate"] == 0.5
    assert summarise(results_of([{"O": (0.0, 0.0)}] * 20), answers_of([1] * 20))["p"] < 0.001


def test_the_interval_is_that_of_a_share():
    values = [1, -1] * 200
    low, high = summarise(results_of([{}] * 400), answers_of(values))["ci95"]
    half = 1.96 * np.sqrt(0.25 / 399)
    assert low == pytest.approx(0.5 - half, abs=0.006) and high == pytest.approx(0.5 + half, abs=0.006)


def test_several_raters_are_averaged_within_an_item():
    rows = answers_of([1, 1, -1]) + answers_of([1], "bob") + answers_of([-1], "eve")
    found = summarise(results_of([{}] * 3), rows)
    assert found["win_rate"] == pytest.approx(((1 + 1 + 0) / 3 + 1 + 0) / 3)
    assert (found["raters"], found["answers"], found["items"]) == (3, 5, 3)


def test_a_habit_for_one_side_is_shown():
    rows = [{"rater": "a", "id": f"i{k}", "left": NAMES[k % 2], "right": NAMES[1 - k % 2], "answer": "left"}
            for k in range(8)]  # fmt: skip
    found = summarise(results_of([{}] * 8), rows)
    assert found["left_share"] == 1.0 and found["win_rate"] == 0.5
    assert summarise(results_of([{}] * 8), answers_of([0] * 8))["left_share"] is None


def test_agreement_with_the_judge():
    values = [1, -1, 1, 0, 1, -1, 1, 1]
    scores = [{"O": (5.0, 5.0 + v), "l1": (0.5, 0.5 - v / 10), "SC": (5.0 + v, 5.0), "copy/O": (1, 2)} for v in values]
    scores[-1] = {"O": (7.0, 5.0), "l1": (0.1, 0.0), "SC": (5.0, None), "copy/O": (1, 2)}
    found = {row["metric"]: row for row in summarise(results_of(scores), answers_of(values))["agreement"]}
    assert set(found) == {"O", "l1", "SC"}
    assert found["O"]["accuracy"][0] == pytest.approx(7 / 8) and found["O"]["n"] == 8
    assert found["l1"]["accuracy"][0] == 1.0  # lower is better
    assert found["SC"]["accuracy"][0] == pytest.approx(1 / 7) and found["SC"]["n"] == 7  # the tie alone is right


def test_no_answer_about_these_editors_is_told():
    with pytest.raises(UserError, match="collect"):
        summarise(results_of([{}]), [])


# -------------------------------------------------------------------------------------------------- results on the disk


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Results of two editors of `evaluate own`: copies, and another editor's pictures, of which one is missing."""
    folder = tmp_path_factory.mktemp("own")
    run("toy", "data", folder / "photos", "--items", 6)
    plain = ("--dino", "none", "--clip", "none")
    run("evaluate", "own", folder / "photos", "--copy", "--out", folder / "one", *plain)
    (folder / "theirs").mkdir()
    for k in range(6):
        picture(k, (32, 32)).save(folder / "theirs" / f"0%2F{k}.png")
    run("evaluate", "own", folder / "photos", "--edited", folder / "theirs", "--out", folder / "two", *plain)
    (folder / "theirs" / "0%2F5.png").unlink()
    return folder


def test_pairs_of_own_photos(evaluated, tmp_path):
    folders = [evaluated / name for name in NAMES]
    results = [Results.read(folder) for folder in folders]
    found, missing = read_pairs(folders, results, None)
    assert [pair.id for pair in found] == [f"0/{k}" for k in range(5)] and missing == 1
    reference, first, second = (np.asarray(image) for image in found[2].pictures())
    assert (reference == first).all() and (second == np.asarray(picture(2, (32, 32)))).all()
    rows = [json.loads(line) for line in (evaluated / "photos" / "metadata.jsonl").read_text().splitlines()]
    assert [pair.instruction for pair in found] == [row["instruction"] for row in rows[:5]]
    other = tmp_path / "photos"
    run("toy", "data", other, "--items", 6, "--seed", 5)
    with pytest.raises(UserError, match="have changed since"):
        read_pairs(folders, results, other)


def test_answers_in_a_file_are_compared(evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [evaluated / name for name in NAMES]
    digests = {pair.id: pair.digest(NAMES) for pair in read_pairs(folders, list(map(Results.read, folders)), None)[0]}
    rows = [{**row, "id": row["id"].replace("i", "0/")} for row in answers_of([1, -1, 1, 0])]
    rows = [row | {"digest": digests[row["id"]]} for row in rows] + [{**rows[1], "answer": "tie", "digest": "other"}]
    Path("people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run("compare", evaluated / "one", "--people", "people.jsonl", evaluated / "two", "--metric", "l1", "--json")
    assert "note 1 answers in people.jsonl are ignored" in said
    assert "two against one: win rate 0.625" in said and "2/1/1 wins/ties/losses" in said
    assert json.loads(said[said.index('{ "editors"') :])["people"]["win_rate"] == 0.625


def test_what_cannot_be_compared_is_told(evaluated, tmp_path):
    one, two = evaluated / "one", evaluated / "two"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "rows.jsonl").write_text((one / "rows.jsonl").read_text())
    assert "two folders" in run("compare", "--people", one, two, bare, "--force", code=2)
    assert "one of them twice" in run("compare", "--people", one, two, one / ".." / "one", "--force", code=2)
    assert "evaluate own" in run("compare", "--people", bare, two, "--force", code=2)


def test_pairs_of_a_judged_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    data = write_gedit(tmp_path / "gedit")
    with serving(lambda *_: '{"score": [7, 8]}') as server:
        for name in NAMES:
            run("evaluate", "gedit", "--data", data, "--run", "copy", "--judge", server.url, "--judge-model", "tiny",
                "--items", 4, "--out", tmp_path / name, "--dino", "none", "--clip", "none")  # fmt: skip
    folders = [tmp_path / name for name in NAMES]
    results = [Results.read(folder) for folder in folders]
    with pytest.raises(UserError, match="--data"):
        read_pairs(folders, results, None)
    found, missing = read_pairs(folders, results, data)
    assert len(found) == 4 and missing == 0 and found[0].instruction
    reference, first, _ = (np.asarray(image) for image in found[0].pictures())
    assert (reference == first).all()
    rows = [{"rater": "a", "id": p.id, "left": "one", "right": "two", "answer": "tie"} for p in found]
    agreement = {row["metric"]: row["accuracy"][0] for row in summarise(results, rows)["agreement"]}
    assert agreement["O"] == 1.0  # the judge's scores are equal, and people tie
