"""A folder of results: missing is never a number, headlines need coverage, and files that are broken are told of."""

import json
from pathlib import Path

import numpy as np
import pytest

from npedit.errors import UserError
from npedit.report.comparison import agreement_table
from npedit.scoring import results as r
from npedit.scoring.comparison import (
    AGREEMENTS,
    open_results,
    select_common_metrics,
    unknown_judge_notes,
)
from npedit.scoring.human_agreement import agreement_with_people, read_labels


def row(key, task, **scores):
    return r.Row(key, task, scores, {k: "it failed" for k, v in scores.items() if v is None})


def fails(error):
    def measure():
        raise error

    return measure


def test_a_row_keeps_numbers_and_reasons_apart():
    metrics = {
        "fine": lambda: 0.0,
        "failed": fails(r.MissingScore("no picture")),
        "undefined": fails(r.UndefinedMetric("equal pictures")),
        "infinite": lambda: float("inf"),
    }
    found = r.Row.from_metrics("i", "t", metrics)
    assert found.scores == {"fine": 0.0, "failed": None, "undefined": None, "infinite": None}
    assert found.why == {
        "failed": "no picture",
        "undefined": "undefined: equal pictures",
        "infinite": "the metric gave inf",
    }
    with pytest.raises(ZeroDivisionError):  # a bug is no missing score
        r.Row.from_metrics("i", "t", {"x": lambda: 1 / 0})


def test_headlines_by_hand(tmp_path):
    rows = [row("1", "a", ssim=0.2), row("2", "a", ssim=0.4), row("3", "b", ssim=0.9)]
    summary = r.write_results(tmp_path / "out", rows, {"real/x": {"value": 1, "n": 1, "coverage": 1.0}})
    assert summary["ssim"]["value"] == pytest.approx(0.6) and summary["ssim/micro"]["value"] == pytest.approx(0.5)
    assert summary["ssim"]["n"] == 3 and summary["ssim"]["coverage"] == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["real/x"]["value"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == {"id": "1", "task": "a", "scores": {"ssim": 0.2}, "why": {}}
    assert r.Results.read(tmp_path / "out").rows == tuple(rows)


def test_no_headline_without_coverage_and_undefined_does_not_lower_it():
    rows = [row(str(i), "a", x=1.0) for i in range(98)]
    failed = r.summarise([*rows, row("f", "a", x=None), row("g", "a", x=None)])["x"]
    assert failed == {"value": None, "n": 98, "coverage": 0.98, "undefined": 0, "ci95": None}
    undefined = [r.Row(str(i), "a", {"x": None}, {"x": "undefined: no mask is given"}) for i in range(100, 200)]
    found = r.summarise([*rows, *undefined])["x"]
    assert found["value"] == 1 and found["coverage"] == 1 and (found["n"], found["undefined"]) == (98, 100)
    assert r.summarise(undefined)["x"]["value"] is None
    assert r.summarise([row("1", "a", x=1.0), row("2", "a")])["x"]["value"] is None  # not measured at all


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", '{"id": "a"}', '{"id": 1, "task": "t", "scores": {}}'),
        *(f'{{"id": "a", "task": "t", "scores": {{"x": {value}}}}}' for value in ('"1"', "NaN", "true")),
    ],
)
def test_broken_rows_are_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"id": "z", "task": "t", "scores": {}, "why": {}}\n' + line)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: expected"):
        r.Results.read(tmp_path)


def test_other_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder of results"):
        r.Results.read(tmp_path)
    good = '{"id": "z", "task": "t", "scores": {}, "why": {}}\n'
    (tmp_path / "rows.jsonl").write_text(good * 2)
    with pytest.raises(UserError, match="each id once"):
        r.Results.read(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="at least one row"):
        r.Results.read(tmp_path)
    (tmp_path / "rows.jsonl").write_text(good)
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(UserError, match="expected a JSON object"):
        r.Results.read(tmp_path)


def test_a_results_folder_is_reused_only_with_equal_settings(tmp_path):
    settings = {"protocol": {"a": 1}, "source": {"model": "x"}, "encoders": {}}
    r.prepare_folder(tmp_path / "o", settings)
    r.prepare_folder(tmp_path / "o", settings | {"encoders": {"dino": "found by now"}})
    with pytest.raises(UserError, match="has another source"):
        r.prepare_folder(tmp_path / "o", settings | {"source": {"model": "y"}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        r.prepare_folder(tmp_path / "mine", settings)


def test_directions():
    assert all(r.lower_is_better(n) for n in ("l1", "l2_outside", "l1_target", "lpips", "copied", "changed_area"))
    assert not any(r.lower_is_better(n) for n in ("psnr", "ssim_outside", "dino_vits16", "O", "SC", "copied2"))


# ------------------------------------------------------------------------------------------------------------ people


def labelled(tmp_path, lines):
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in lines))
    return path


def test_agreement_with_people_by_hand(tmp_path):
    """Two editors, three items; the judge swaps the two pictures of item c and orders the rest as people do."""
    a = r.Results("A", tuple(row(k, "t", x=v) for k, v in zip("abc", (1.0, 2.0, 5.0))), {})
    b = r.Results("B", tuple(row(k, "t", x=v) for k, v in zip("abc", (3.0, 4.0, 6.0))), {})
    people = {("A", "a"): 1, ("A", "b"): 2, ("A", "c"): 6, ("B", "a"): 3, ("B", "b"): 4, ("B", "c"): 5}
    lines = [{"result": n, "id": k, "score": s + d} for (n, k), s in people.items() for d in (-0.5, 0.5)]
    labels = read_labels(labelled(tmp_path, lines), ["A", "B"])
    assert labels == people
    found = agreement_with_people([a, b], "x", labels, lower=False)
    spearman, kendall, plain, calibrated = found.estimates
    assert found.n == 6
    assert spearman[0] == pytest.approx(1 - 6 * 2 / (6 * 35)) and kendall[0] == pytest.approx(13 / 15)
    assert plain[0] == pytest.approx(2 / 3) == calibrated[0]
    assert plain[1][0] <= 2 / 3 <= plain[1][1]
    assert agreement_with_people([a, b], "x", labels, lower=True).estimates[2][0] == pytest.approx(1 / 3)


def many_labels(sizes):
    """One editor's results and labels of it: tasks of so many pictures whose order agrees loosely with people's; in
    those of fewer than ten it agrees fully."""
    rng, rows, labels = np.random.default_rng(0), [], {}
    for task, size in enumerate(sizes):
        for k in range(size):
            score = float(rng.normal())
            rows.append(row(f"{task}-{k}", str(task), x=score))
            labels["A", f"{task}-{k}"] = score if size < 10 else 0.3 * score + float(rng.normal())
    return r.Results("A", tuple(rows), {}), labels


@pytest.mark.parametrize("small", [[2], [3], [2] * 20, [4], [1]])
def test_small_tasks_do_not_dominate_the_agreement_with_people(small):
    def correlations(sizes):
        result, labels = many_labels(sizes)
        found = agreement_with_people([result], "x", labels, lower=False)
        assert found.tasks == sum(n >= 4 for n in sizes) and found.tasks_left_out == sum(n < 4 for n in sizes)
        return [value for value, _ in found.estimates[:2]]

    large = [30] * 4
    for value, with_small in zip(correlations(large), correlations([*large, *small])):
        assert 0.05 < value < 0.5 and abs(with_small - value) < 0.02
        assert with_small == value or small == [4]


def test_tasks_of_equal_labels_are_counted_as_left_out():
    result, labels = many_labels([30, 30])
    labels |= {key: 1.0 for key in labels if key[1].startswith("0-")}
    found = agreement_with_people([result], "x", labels, lower=False)
    assert (found.tasks, found.tasks_left_out) == (1, 1) and found.estimates[0] is not None
    result, labels = many_labels([3])
    few = agreement_with_people([result], "x", labels, lower=False)
    assert few.estimates[:2] == (None, None) and (few.tasks, few.tasks_left_out) == (0, 1)
    (line,) = agreement_table(
        [{"metric": "x", "tasks": 1, "tasks_left_out": 2, "n": 3, **dict.fromkeys(AGREEMENTS)}], 3
    ).rows
    assert "1 of 3" in line.cells


def test_labels_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="correct --people"):
        read_labels(tmp_path / "none", ["A"])
    for bad in ({"result": "A", "id": "x"}, {"result": "A", "id": "x", "score": "good"}):
        with pytest.raises(UserError, match="jsonl:1: expected result, id and score"):
            read_labels(labelled(tmp_path, [bad]), ["A"])
    with pytest.raises(UserError, match="Did you mean 'editor-1'"):
        read_labels(labelled(tmp_path, [{"result": "editor1", "id": "x", "score": 1}]), ["editor-1"])
    rows = r.Results("A", (row("x", "t", x=1.0),), {})
    assert agreement_with_people([rows], "x", {}, False).estimates == (None,) * 4
    assert agreement_with_people([rows], "x", {("A", "x"): 2.0}, False).estimates == (None,) * 4


def test_mean_of_judges_is_missing_where_one_judge_has_no_score(tmp_path):
    def judged(name, judge, scores):
        (tmp_path / name).mkdir()
        settings = {"protocol": {"hash": "p"}, "judge": {"name": judge}}
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        rows = [
            {"id": str(i), "task": "t", "scores": {"O": s}, "why": {} if s is not None else {"O": "refused"}}
            for i, s in enumerate(scores)
        ]
        (tmp_path / name / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
        return tmp_path / name

    a1, a2 = judged("a1", "x", [4, 6, None]), judged("a2", "y", [8, 6, 2])
    b1, b2 = judged("b1", "x", [1, 2, 3]), judged("b2", "y", [3, 2, 1])
    both = Path(f"{a1}+{a2}")
    whole, other = open_results([both, Path(f"{b1}+{b2}")], force=False)
    assert [r.scores["O"] for r in whole.rows] == [6.0, 6.0, None] and whole.rows[2].why == {"O": "refused"}
    assert [r.scores["O"] for r in other.rows] == [2.0, 2.0, 2.0] and other.settings["judge"] == [
        {"name": "x"},
        {"name": "y"},
    ]
    for pair in ([a1, a2], [a1, b2], [both, b1]):
        with pytest.raises(UserError, match="one judge"):
            open_results(pair, force=False)
    assert len(open_results([a1, b1], force=False)) == len(open_results([a1, a2], force=True)) == 2
    (a2 / "rows.jsonl").write_text('{"id": "9", "task": "t", "scores": {"O": 1}}')
    with pytest.raises(UserError, match="same items from every judge"):
        open_results([both, b1], force=False)


def test_results_of_the_same_name_are_named_by_short_paths(tmp_path, monkeypatch):
    for folder in ("j1/x", "j2/x", "deep/j1/y", "deep/j2/y", "x"):
        r.write_results(tmp_path / folder, [row("1", "t", x=1.0)])
    monkeypatch.chdir(tmp_path)

    def names(*folders):
        return [
            found.name for found in open_results([Path(str(f).replace("@", str(tmp_path))) for f in folders], False)
        ]

    assert names("j1/x", "deep/j1/y") == names("@/j1/x", "@/deep/j1/y") == ["x", "y"]
    assert names("j1/x", "j2/x") == names("@/j1/x", "@/j2/x") == names("@/j1/x", "j2/x") == ["j1/x", "j2/x"]
    assert names("@/x", "@/j1/x") == ["x", "j1/x"]
    assert names("@/j1/x+@/j2/x", "@/x+@/j1/x") == ["j1/x+j2/x", "x+j1/x"]
    assert names("@/deep/j1/y", "@/deep/j2/y") == ["j1/y", "j2/y"]
    with pytest.raises(UserError, match="one of them twice"):
        names("@/j1/x", "j1/x")


def with_settings(name, scores, /, **settings):
    return r.Results(name, tuple(row(str(k), "t", **scores) for k in range(3)), settings)


@pytest.mark.parametrize("kind", ["dino", "clip"])
@pytest.mark.parametrize("other", [{"same": "b"}, {}, None])
def test_a_metric_of_different_encoders_is_left_out_and_named(kind, other):
    names = {"dino": ["dino_vits16", "dino_vits16_target"], "clip": ["clip_i_b", "clip_dir_b"]}
    scores = dict.fromkeys([*sum(names.values(), []), "ssim"], 1.0)
    used = {"dino": "a", "clip": "a", "dtype": "float32"}
    changed = None if other is None else {k: v for k, v in used.items() if k != kind} | ({kind: "b"} if other else {})
    first = with_settings("one", scores, encoders=used)
    second = with_settings("two", scores, **({"encoders": changed} if changed else {}))
    kept, notes = select_common_metrics([first, second], [])
    lost = list(scores)[:-1] if other is None else names[kind]
    assert kept == [name for name in scores if name not in lost] and len(notes) == len(lost)
    assert f"its encoders differ (one: a, two: {'b' if other else 'unknown'})" in notes[0] and "--force" in notes[0]
    assert select_common_metrics([first, second], lost[:1]) == ([], notes[:1])
    assert select_common_metrics([first, second], [], force=True) == (list(scores), [])
    assert select_common_metrics([second, second], []) == (list(scores), [])


def test_imported_results_of_an_unknown_judge_are_noted(tmp_path):
    own, judged = with_settings("own", {"x": 1.0}), with_settings("judged", {"x": 1.0}, judge={"name": "j"})
    later = with_settings("later", {"x": 1.0}, scores="s.csv", judge=None)
    earlier = with_settings("earlier", {"x": 1.0}, scores="s.csv")
    assert unknown_judge_notes([own, own]) == unknown_judge_notes([judged, judged]) == []
    (note,) = unknown_judge_notes([later, earlier])
    assert "the judge of later, earlier is unknown" in note
    assert unknown_judge_notes([judged, r.average_judges([judged, later])])
