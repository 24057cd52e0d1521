"""GEdit-Bench: items, the official aggregation against sums by hand, coverage, and the official layout."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import statistics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npedit.benchmarks import _judged, _scorer, gedit
from npedit.benchmarks._protocol import Protocol
from npedit.errors import UserError
from npedit.judges.cache import AnswerCache
from npedit.judges.server import ServerJudge
from tests.support.command_line import run
from tests.support.judge_server import encode_png, images_of, picture, serving, text_of, write_edited, write_gedit


def found_in(tmp_path, sizes=None, languages=("en",)):
    return gedit.read_items(write_gedit(tmp_path / "data", sizes, languages), languages, tmp_path / "edited")


def rows_of(found, scores):
    """Rows with (SC, PQ) from a function of the item; None is missing."""
    rows = []
    for item in found:
        row = {"id": item.id, "task": item.task, **item.more, "scores": {}, "why": {}, "numbers": {}}
        for name, value in zip(("SC", "PQ"), scores(item)):
            _scorer.set_score(row, name, value, "parse_error")
        rows.append(gedit.add_overall_score(row, "O"))
    return rows


# ------------------------------------------------------------------------------------------------------------- items


def test_items_are_in_the_official_order_with_unique_ids(tmp_path):
    found = found_in(tmp_path, {"text_change": 3}, ("en", "cn"))
    assert [i.task for i in found if i.more["language"] == "en"][:2] == ["en/background_change", "en/color_alter"]
    assert len(found) == 2 * 13 and len({i.id for i in found}) == 26
    assert (
        found[0].id == f"gedit/en/background_change/{0:032x}" and found[0].instruction == "edit 0 of background_change"
    )
    assert found[0].source().tobytes() == picture(0).tobytes()
    assert found[0].edited == tmp_path / f"edited/fullset/background_change/en/{0:032x}.png"
    only = gedit.read_items(tmp_path / "data", ("cn",), tmp_path)
    assert {i.more["language"] for i in only} == {"cn"} and len(only) == 13


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    image = {"bytes": encode_png(picture(0)), "path": None}
    whole = [{"instruction_language": "en", "Intersection_exist": True, "input_image": image, **r} for r in rows]
    pq.write_table(pa.Table.from_pylist(whole), folder / "a.parquet")
    return folder


def test_a_key_of_two_tasks_is_two_items_and_the_column_tells_the_language(tmp_path):
    same = [
        {"task_type": "subject-remove", "key": "k", "instruction": "写上 “你好”"},
        {"task_type": "subject-replace", "key": "k", "instruction": "b"},
    ]
    found = gedit.read_items(write_rows(tmp_path / "d", same), ("en",), tmp_path)
    assert [i.id for i in found] == ["gedit/en/subject-remove/k", "gedit/en/subject-replace/k"]
    assert found[0].edited != found[1].edited
    with pytest.raises(UserError, match="two for gedit/en/subject-remove/k"):
        gedit.read_items(write_rows(tmp_path / "d", [same[0], same[0]]), ("en",), tmp_path)


def test_wrong_data_are_an_error(tmp_path):
    with pytest.raises(UserError, match="hf download stepfun-ai/GEdit-Bench"):
        gedit.read_items(tmp_path, ("en",), tmp_path)
    with pytest.raises(UserError, match="expected a task of GEdit-Bench"):
        rows = [{"task_type": "subject_add", "key": "k", "instruction": "a"}]
        gedit.read_items(write_rows(tmp_path / "d", rows), ("en",), tmp_path)
    with pytest.raises(UserError, match="got none; check --data and --language"):
        gedit.read_items(write_gedit(tmp_path / "e"), ("cn",), tmp_path)
    pq.write_table(pa.Table.from_pylist([{"key": "a"}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="expected the columns"):
        gedit.read_items(tmp_path / "x.parquet", ("en",), tmp_path)
    (tmp_path / "y.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="expected a parquet file"):
        gedit.read_items(tmp_path / "y.parquet", ("en",), tmp_path)
    broken = [
        {"task_type": "subject-add", "key": "k", "instruction": "a", "input_image": {"bytes": b"x", "path": None}}
    ]
    with pytest.raises(UserError, match="source picture of gedit/en/subject-add/k"):
        gedit.read_items(write_rows(tmp_path / "d", broken), ("en",), tmp_path)[0].source()


def test_missing_items_are_reported(tmp_path):
    sizes = (40, 40, 40, 40, 70, 60, 60, 57, 60, 99, 40)
    found = found_in(tmp_path)
    assert "the data hold 11 en" in gedit.missing_items_message(found)
    whole = [
        _judged.Item(f"{t}{k}", f"en/{t}", t, "", None, tmp_path, {"language": "en"})
        for t, n in zip(gedit.TASKS, sizes)
        for k in range(n)
    ]
    assert len(whole) == gedit.SIZE and gedit.missing_items_message(whole) == ""


# -------------------------------------------------------------------------------------------------------- aggregation


def test_macro_and_micro_means_by_hand(tmp_path):
    """subject-add has three items, all others one. O: (9, 4) -> 6, (0, 10) -> 0, (4, 4) -> 4; elsewhere (1, 4) -> 2."""
    found = found_in(tmp_path, {"subject-add": 3})
    additions = iter([(9, 4), (0, 10), (4, 4)])
    rows = rows_of(found, lambda i: next(additions) if i.kind == "subject-add" else (1, 4))
    summary = gedit.summarise(rows, found, 0.99, "p")
    value = {k: v["value"] for k, v in summary.items()}
    assert value["p/en/full/SC"] == pytest.approx((13 / 3 + 10 * 1) / 11, abs=1e-12)
    assert value["p/en/full/PQ"] == pytest.approx((6 + 10 * 4) / 11, abs=1e-12)
    assert value["p/en/full/O"] == pytest.approx((10 / 3 + 10 * 2) / 11, abs=1e-12)
    assert value["p/en/full/O_micro"] == pytest.approx((6 + 0 + 4 + 10 * 2) / 13, abs=1e-12)
    assert value["p/en/full/O"] < math.sqrt(value["p/en/full/SC"] * value["p/en/full/PQ"])
    # The Intersection holds the items 0 and 2 of subject-add.
    assert value["p/en/intersection/O"] == pytest.approx(((6 + 4) / 2 + 10 * 2) / 11, abs=1e-12)
    assert value["p/en/intersection/O_micro"] == pytest.approx((6 + 4 + 10 * 2) / 12, abs=1e-12)
    assert summary["p/en/full/O"]["n"] == 13 and summary["p/en/intersection/O"]["n"] == 12
    assert {s["coverage"] for s in summary.values()} == {1.0}
    assert not any("cn" in name or "both" in name for name in summary)


def test_means_of_random_scores_satisfy_the_official_formulas(tmp_path):
    """The official formula, written once more with dictionaries of lists; Jensen's inequality; both languages."""
    rng = random.Random(0)
    found = found_in(tmp_path, {"text_change": 5, "ps_human": 3}, ("en", "cn"))
    rows = rows_of(found, lambda i: (rng.randint(0, 10), rng.randint(0, 10)))
    summary = gedit.summarise(rows, found, 1.0, "p")
    for language in ("en", "cn", "both"):
        by_task: dict[str, list] = {}
        for row in rows:
            if language in (row["language"], "both"):
                by_task.setdefault(row["task"].split("/")[1], []).append(tuple(row["scores"].values()))
        sc, pq_, o = (statistics.fmean(statistics.fmean(v[k] for v in g) for g in by_task.values()) for k in range(3))
        for name, wanted in (("SC", sc), ("PQ", pq_), ("O", o)):
            assert summary[f"p/{language}/full/{name}"]["value"] == pytest.approx(wanted, abs=1e-12)
        assert o <= math.sqrt(sc * pq_) + 1e-12
    halves = [summary[f"p/{x}/full/O"]["value"] for x in ("en", "cn", "both")]
    assert halves[2] == pytest.approx((halves[0] + halves[1]) / 2, abs=1e-12)  # as many items in each


def test_missing_scores_are_not_zeros_and_there_is_no_headline(tmp_path):
    found = found_in(tmp_path, dict.fromkeys(gedit.TASKS, 2))
    lost = found[0].id
    rows = rows_of(found, lambda i: (None, 4) if i.id == lost else (4, 4))
    assert rows[0]["scores"] == {"SC": None, "PQ": 4, "O": None}
    assert rows[0]["why"] == {"SC": "parse_error", "O": "parse_error"}
    strict, mild = (gedit.summarise(rows, found, least, "p") for least in (0.99, 0.9))
    assert strict["p/en/full/O"]["value"] is None and strict["p/en/full/PQ"]["value"] == 4
    assert strict["p/en/full/O"]["coverage"] == 21 / 22 and strict["p/en/full/O"]["n"] == 21
    assert mild["p/en/full/O"]["value"] == 4
    low, high = strict["p/en/full/O"]["bounds"]
    assert low == pytest.approx((2 + 40) / 11) and high == pytest.approx((7 + 40) / 11)
    zero = gedit.summarise(rows_of(found, lambda i: (0, 4)), found, 0.99, "p")["p/en/full/O"]
    assert zero["value"] == 0 and zero["n"] == 22


def test_without_scores_in_one_task_there_is_no_headline_at_any_coverage(tmp_path):
    found = found_in(tmp_path)
    rows = rows_of(found, lambda i: (None, None) if i.kind == "ps_human" else (5, 5))
    assert gedit.summarise(rows, found, 0.5, "p")["p/en/full/O"]["value"] is None
    part = rows_of(found[:5], lambda i: (5, 5))  # a trial run: the rest was not asked
    assert gedit.summarise(part, found, 0.1, "p")["p/en/full/O"] | {"bounds": 0} == {
        "value": None, "n": 5, "coverage": 5 / 11, "ci95": None, "bounds": 0,
    }  # fmt: skip


def test_a_sample_takes_tasks_in_turn(tmp_path):
    found = found_in(tmp_path, dict.fromkeys(gedit.TASKS, 3))
    first = _judged.sample_across_tasks(found, 13)
    assert [i.kind for i in first] == [*gedit.TASKS, *gedit.TASKS[:2]] and first[11].id.endswith("1")
    assert _judged.sample_across_tasks(found, None) == found and len(_judged.sample_across_tasks(found, 99)) == 33


# --------------------------------------------------------------------------------------------------- official layout


def test_the_official_protocol_scales_the_result_and_writes_the_official_files(tmp_path, monkeypatch):
    """Official texts and settings through a server; our CSV gives the official headline, and reads back the same."""
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "vie_prompts.py").write_text(
        "_context_no_delimit = 'C'\n_prompts_0shot_two_image_edit_rule = 'T'\n_prompts_0shot_rule_PQ = 'PQ'\n"
        "_prompts_0shot_tie_rule_SC = 'SC <instruction>'\n"
    )
    model = tmp_path / "model"
    found = gedit.read_items(write_gedit(tmp_path / "data", {"ps_human": 2}), ("en",), model)
    write_edited(tmp_path, found)
    picture(7, (48, 32)).save(found[0].edited)  # twice the source's size
    sizes = []

    def answer(_, body):
        images = images_of(body)
        sizes.extend(im.size for im in images)
        return json.dumps({"score": [len(text_of(body)) % 7, 3 + len(images)], "reasoning": ""})

    protocol = Protocol.load("viescore-gpt", tmp_path)
    with serving(answer) as server, AnswerCache(tmp_path / "answers.jsonl") as cache:
        judge = ServerJudge(server.url, "tiny", workers=1)
        scorer = _scorer.Scorer(judge, protocol, cache, _scorer.RepeatSettings(), gedit.combine_numbers)
        rows = _scorer.score_items(scorer, found, lambda r: gedit.add_overall_score(r, "O"), lambda *_: None)
    assert set(sizes) == {(24, 16)}
    written = gedit.write_official_files(rows, found, model, "gpt4o")
    assert [p.relative_to(model).as_posix() for p in written[-2:]] == [
        "gpt4o/eval_results_new/model_tone_transfer_gpt_score.csv",
        "gpt4o/eval_results_new/model_combined_gpt_score.csv",
    ]
    with open(written[-1], newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(gedit.CSV_COLUMNS) and len(lines) == 12
    by_task: dict[str, list[float]] = {}
    for line in lines:  # as the official statistics do
        group = by_task.setdefault(line["edited_image"].split("/")[-3], [])
        group.append(math.sqrt(float(line["sementics_score"]) * float(line["quality_score"])))
    official = statistics.fmean(map(statistics.fmean, by_task.values()))
    assert gedit.summarise(rows, found, 0.99, "v")["v/en/full/O"]["value"] == pytest.approx(official, abs=1e-12)
    for line in lines:
        assert all(os.path.isfile(line[k]) for k in ("source_image", "edited_image"))
    again = gedit.read_official_scores(written[-1], found)
    assert [r["scores"] for r in again] == [r["scores"] for r in rows]


def test_official_scores_with_missing_items_or_values_outside_the_scale(tmp_path):
    found = found_in(tmp_path)
    rows = rows_of(found, lambda i: (None, 3) if i.kind == "ps_human" else (3, 3))
    path = gedit.write_official_files(rows, found, tmp_path / "m", "j")[-1]
    again = gedit.read_official_scores(path, found)
    assert [r["why"] for r in again if r["why"]] == [dict.fromkeys(("SC", "PQ", "O"), "not_in_file")]
    text = path.read_text()
    path.write_text(text.replace(",3,3,", ",30,3,", 1))
    with pytest.raises(UserError, match="expected scores from 0 to 10"):
        gedit.read_official_scores(path, found)
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(UserError, match="two for gedit/en/background_change"):
        gedit.read_official_scores(path, found)
    path.write_text(text.replace("color_alter/en", "color_alter2/en"))
    with pytest.raises(UserError, match="expected items of the data"):
        gedit.read_official_scores(path, found)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected the official combined CSV"):
        gedit.read_official_scores(path, found)


# ------------------------------------------------------------------------------------------ folders of finished results


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """A function that runs the command on a bench of both languages, with a judge whose answers are all the same."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    write_gedit(tmp_path / "data", {"ps_human": 2}, ("en", "cn"))
    with serving(lambda *_: '{"score": [9, 4]}') as server:
        judge = ("--judge", server.url, "--judge-model", "m", "--model", "copy", "--dino", "none", "--clip", "none")

        def call(*words, code=0):
            asked = () if "--scores" in words else judge
            return run("evaluate", "gedit", "--data", "data", *asked, *words, code=code)

        yield call


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("rows.jsonl", "summary.json", "settings.json")}


def drop_later_facts(folder):
    """Settings as earlier versions wrote them."""
    facts = json.loads((folder / "settings.json").read_text())
    kept = {k: v for k, v in facts.items() if k not in _judged.LATER_FACTS}
    assert len(kept) == len(facts) - 2
    (folder / "settings.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_finished_result_is_never_replaced_by_one_of_other_items(evaluate, tmp_path, is_earlier):
    evaluate("--out", "r")
    evaluate("--language", "cn", "--out", "cn")
    csv_file = tmp_path / "cn/official/copy/m/eval_results_new/copy_combined_gpt_score.csv"
    evaluate("--scores", csv_file, "--language", "cn", "--out", "s")
    if is_earlier:
        drop_later_facts(tmp_path / "r")
    before, imported = contents(tmp_path / "r"), contents(tmp_path / "s")
    for words in (("--language", "cn"), ("--items", 2), ("--scores", csv_file, "--language", "cn")):
        said = evaluate(*words, "--out", "r", code=2)
        assert "choose another --out" in said and "--fresh" in said, words
    assert "judge None" in evaluate("--language", "cn", "--out", "s", code=2)
    if not is_earlier:
        assert "language 'en'" in evaluate("--language", "both", "--out", "r", code=2)
    assert contents(tmp_path / "r") == before and contents(tmp_path / "s") == imported
    assert "0 answers came from m" in evaluate("--out", "r")  # the same evaluation
    evaluate("--scores", csv_file, "--language", "cn", "--out", "s")
    for folder, old in (("r", before), ("s", imported)):
        assert (tmp_path / folder / "rows.jsonl").read_bytes() == old["rows.jsonl"]


def test_other_data_or_other_scores_under_the_same_name_are_refused(evaluate, tmp_path):
    evaluate("--out", "r")
    csv_file = tmp_path / "r/official/copy/m/eval_results_new/copy_combined_gpt_score.csv"
    evaluate("--scores", csv_file, "--out", "s")
    csv_file.write_text(csv_file.read_text().replace(",9.0,4.0,", ",9,5,").replace(",9,4,", ",9,5,"))
    assert "scores_hash" in evaluate("--scores", csv_file, "--out", "s", code=2)
    write_gedit(tmp_path / "data", {"ps_human": 2, "text_change": 2}, ("en", "cn"))
    assert "data_hash" in evaluate("--out", "r", code=2)


def test_a_trial_of_a_few_items_is_extended(evaluate, tmp_path):
    evaluate("--items", 3, "--out", "r")
    assert "6 were there already" in evaluate("--out", "r")
    evaluate("--out", "whole")
    assert contents(tmp_path / "r")["rows.jsonl"] == contents(tmp_path / "whole")["rows.jsonl"]


def test_the_usual_folder_names_a_language_other_than_english(evaluate, tmp_path):
    for language in ("en", "zh", "both"):
        evaluate("--language", language, "--items", 1)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "gedit-copy-m", "gedit-copy-m-cn", "gedit-copy-m-both",
    }  # fmt: skip
