"""ImgEdit-Bench: items, means by hand and as the official scripts round them, and the official files."""

from __future__ import annotations

import json

import pytest

from npedit.benchmarks import _scorer, imgedit
from npedit.benchmarks._protocol import Protocol
from npedit.errors import UserError
from npedit.judges.cache import AnswerCache
from npedit.judges.server import ServerJudge
from npedit.scoring.statistics import bootstrap_interval
from tests.support.judge_server import picture, serving, text_of

ANSWERS = {"2": '{"reasoning": "good", "score": [5, 4, 4]}', "0": '{"score": [1, 1, 1]}', "1": "no idea"}


def write_data(folder, tasks=imgedit.TASKS):
    """An item of each type, and two more additions."""
    folder.mkdir()
    entries = {}
    for k, task in enumerate([*tasks, "add", "add"]):
        picture(k).save(folder / f"{k}.png")
        entries[f"{100 + k}"] = {"id": f"{k}.png", "prompt": f"request {k}", "edit_type": task}
    (folder / "singleturn.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def found(tmp_path):
    found = imgedit.read_items(write_data(tmp_path / "data"), tmp_path / "edited")
    (tmp_path / "edited").mkdir()
    for i, item in enumerate(found):
        picture(1000 + i).save(item.edited)
    return found


def rows_of(found, numbers):
    """Rows from a function item -> three numbers or None."""
    rows = []
    for item in found:
        three = numbers(item)
        row = {"id": item.id, "task": item.task, "scores": {}, "why": {}, "numbers": {"S": [three] if three else []}}
        _scorer.set_score(row, "S", imgedit.combine_numbers(three) if three else None, "refused")
        rows.append(imgedit.add_overall_score(row, "O"))
    return rows


def test_items_are_read_from_the_official_file(found, tmp_path):
    assert [i.id for i in found][:4] == ["imgedit/add/100", "imgedit/add/109", "imgedit/add/110", "imgedit/adjust/101"]
    assert found[0].edited == tmp_path / "edited/100.png" and found[0].source().tobytes() == picture(0).tobytes()
    assert "the data hold 11 of 9" in imgedit.missing_items_message(found)
    aliased = write_data(tmp_path / "other", ("alter", "hybrid"))
    assert {i.task for i in imgedit.read_items(aliased, tmp_path)} == {"adjust", "compose", "add"}
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(UserError, match="1 are missing, such as .'3.png'"):
        imgedit.read_items(tmp_path / "data", tmp_path)
    with pytest.raises(UserError, match="expected an edit type among .*; got 'paint'"):
        imgedit.read_items(write_data(tmp_path / "third", ("paint",)), tmp_path)
    with pytest.raises(UserError, match="basic_edit.json or singleturn.json"):
        imgedit.read_items(tmp_path / "edited", tmp_path)


def test_means_by_hand(found):
    """Additions (5, 4, 4), (1, 1, 1), (3, 2, 1); all others (4, 2, 3)."""
    additions = iter([(5, 4, 4), (1, 1, 1), (3, 2, 1)])
    rows = rows_of(found, lambda i: next(additions) if i.task == "add" else (4, 2, 3))
    summary = imgedit.summarise(rows, found, 0.99, "p")
    add = (13 / 3 + 1 + 2) / 3
    assert summary["p/O"]["value"] == pytest.approx((add + 8 * 3) / 9, abs=1e-12)
    assert summary["p/O_micro"]["value"] == pytest.approx((13 / 3 + 1 + 2 + 8 * 3) / 11, abs=1e-12)
    assert summary["p/S1"]["value"] == pytest.approx((3 + 8 * 4) / 9, abs=1e-12)
    values, tasks = [row["scores"]["O"] for row in rows], [row["task"] for row in rows]
    assert summary["p/O"]["ci95"] == bootstrap_interval(values, tasks)
    low, high = summary["p/O_micro"]["ci95"]
    assert low < summary["p/O_micro"]["value"] < high and (low, high) != summary["p/O"]["ci95"]
    assert rows[0]["scores"] == {"S1": 5, "S2": 4, "S3": 4, "O": pytest.approx(13 / 3)}


def test_missing_scores(found):
    rows = rows_of(found, lambda i: None if i.id == "imgedit/add/109" else (4, 4, 4))
    assert rows[1]["scores"] == dict.fromkeys(("S1", "S2", "S3", "O"))
    assert rows[1]["why"] == dict.fromkeys(("S1", "S2", "S3", "O"), "refused")
    figure = imgedit.summarise(rows, found, 0.99, "p")["p/O"]
    assert figure["value"] is None and figure["bounds"] == [
        pytest.approx((3 + 8 * 4) / 9),
        pytest.approx((13 / 3 + 32) / 9),
    ]
    assert imgedit.summarise(rows, found, 0.9, "p")["p/O"]["value"] == 4


def test_official_files_are_as_the_official_scripts_compute_them(found, tmp_path):
    additions = iter([(5, 4, 4), (1, 1, 1), None])
    rows = rows_of(found, lambda i: next(additions) if i.task == "add" else (4, 2, 3))
    result, average, kinds = imgedit.write_official_files(rows, found, tmp_path / "out", "judge")
    answers = json.loads(result.read_text())
    assert answers["100"] == "S1: 5\nS2: 4\nS3: 4" and "110" not in answers and len(answers) == 10
    means = {}
    for key, entry in answers.items():  # step 1 of the official scripts
        scores = [int(p[1]) for p in (line.strip().split(": ") for line in entry.splitlines()) if p[1].isdigit()]
        means[key] = round(sum(scores) / len(scores), 2)
    assert json.loads(average.read_text()) == means and means["100"] == 4.33
    assert json.loads(kinds.read_text())["add"] == round((4.33 + 1) / 2, 2)  # step 2
    again = imgedit.read_official_scores(result, found)
    assert [r["scores"] for r in again] == [r["scores"] for r in rows]
    assert again[2]["why"]["O"] == "not_in_file"


def test_official_answers_are_read_and_errors_in_them_are_missing(found, tmp_path):
    lines = "Brief reasoning: fine.\nPrompt Compliance: {}\nVisual Naturalness: 3\nPhysical & Detail Integrity: 3"
    keys = [i.edited.stem for i in found]
    answers = {keys[0]: lines.format(5), keys[1]: {"error": "rate limit"}, keys[2]: lines.format(0), keys[3]: "Sorry."}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(answers))
    rows = imgedit.read_official_scores(path, found)
    assert rows[0]["scores"]["O"] == pytest.approx(11 / 3)
    assert [r["why"].get("O") for r in rows[1:5]] == ["parse_error", "range_error", "parse_error", "not_in_file"]
    path.write_text(json.dumps({"7": "x"}))
    with pytest.raises(UserError, match="expected keys of the data"):
        imgedit.read_official_scores(path, found)


def test_a_server_judges_each_type_with_its_own_criteria(found, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    protocol = Protocol.load("npedit-imgedit-v1")

    def answer(_, body):
        number = text_of(body).split("was: request ")[1].split("\n")[0]
        return ANSWERS.get(number, '{"score": [3, 3, 3]}')

    with serving(answer) as server, AnswerCache(tmp_path / "a.jsonl") as cache:
        judge = ServerJudge(server.url, "tiny", workers=1)
        scorer = _scorer.Scorer(judge, protocol, cache, _scorer.RepeatSettings(), imgedit.combine_numbers)
        rows = _scorer.score_items(scorer, found, lambda r: imgedit.add_overall_score(r, "O"), lambda *_: None)
        assert len(server.bodies) == 12  # the one that was no answer was asked for twice
        assert len({text_of(b).split("was: request")[1].partition("\n")[2] for b in server.bodies}) >= len(
            imgedit.TASKS
        )
    by_id = {r["id"]: r for r in rows}
    assert by_id["imgedit/extract/102"]["scores"] == {"S1": 5, "S2": 4, "S3": 4, "O": pytest.approx(13 / 3)}
    assert by_id["imgedit/adjust/101"]["why"]["O"] == "parse_error"
    assert by_id["imgedit/add/100"]["scores"]["O"] == 1
