"""The toy's writer: right where it makes no mistake, wrong at the chosen rates, and the truth about every row."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from http.client import HTTPConnection

import pytest
from command_line import run as npedit
from toy_writer_server import content, post, request_body, scene_picture, serving_writer

from npedit.errors import UserError
from npedit.toy import language, writer
from npedit.toy.dataset import write_dataset
from npedit.toy.edits import EDIT_TYPES, possible_edit_types, sample_edit, sample_edit_of
from npedit.toy.grade import grade_dataset
from npedit.toy.oracle import expected_reading, matches_caption
from npedit.toy.world import PLACES, sample_scene
from npedit.toy.writer import ErrorRates
from npedit.toy.writer_server import Writer, make_server

OPPOSITE = {"yes": "no", "no": "yes"}


@pytest.fixture(scope="module")
def edits():
    return [sample_edit(random.Random(f"writer/{i}"), EDIT_TYPES[i % 9], i % 2 == 1) for i in range(360)]


# ---- language


def test_every_instruction_is_understood_and_its_target_caption_is_right(edits):
    for edit in edits:
        request = language.read_instruction(edit.edit_type, edit.instruction)
        assert request is not None, edit.instruction
        assert (request.value, request.name) == (edit.value, edit.object)
        results = language.possible_results(edit.reference, request)
        assert expected_reading(edit.target) in map(expected_reading, results), edit.instruction
        assert language.is_target_caption(edit.target_caption, edit.reference, request), edit


def test_questions_are_answered_by_the_picture(edits):
    for edit in edits:
        (asked,) = language.questions_about(edit)
        assert language.answer_question(edit.target, asked["question"]) == asked["answer"], (asked, edit)
        assert language.answer_question(edit.reference, asked["question"]) == OPPOSITE[asked["answer"]], (asked, edit)
    assert language.answer_question(edits[0].reference, "who painted this ?") == "no"


def test_what_is_no_instruction_of_the_type_is_not_understood():
    assert language.read_instruction("remove", "paint the circle red") is None
    assert language.read_instruction("recolour", "paint the sky red") is None
    assert language.read_instruction("move", "move the circle to the moon") is None


def test_only_possible_edits_of_a_scene_are_made():
    for things in (1, 2, 3):
        scene = sample_scene(random.Random(things), things)
        kinds = possible_edit_types(scene)
        assert ("remove" in kinds, "add" in kinds) == (things > 1, things < 3)
        for kind in kinds:
            edit = sample_edit_of(scene, random.Random(0), kind)
            assert edit.reference == scene and 1 <= len(edit.target.filled) <= 3


# ---- the passes


def test_a_writer_without_mistakes_writes_right_rows_only():
    for i in range(60):
        scene, rng = sample_scene(random.Random(i)), random.Random(i)
        seen = writer.look(scene, rng)
        assert {o["where"] for o in seen["objects"]} == {PLACES[c] for c in scene.filled}
        assert matches_caption(seen["caption"], expected_reading(scene))
        for proposal in writer.write(scene, EDIT_TYPES, rng, ErrorRates())["proposals"]:
            assert writer.row_faults(scene, {**proposal, "source_caption": seen["caption"]}) == []
            verdict = writer.verify(scene, proposal, rng, ErrorRates())
            assert verdict["object_present"] is (proposal["edit_type"] != "add")
            assert verdict["edit_possible"] and verdict["caption_right"]
            assert verdict["answers"] == [OPPOSITE[q["answer"]] for q in proposal["questions"]]


def test_every_mistake_is_a_mistake_and_the_verifier_sees_it():
    kinds = Counter()
    for i in range(120):
        scene, rng = sample_scene(random.Random(i)), random.Random(i)
        for proposal in writer.write(scene, EDIT_TYPES, rng, ErrorRates(mistakes=1.0))["proposals"]:
            (fault,) = writer.row_faults(scene, proposal)
            kinds[fault] += 1
            verdict = writer.verify(scene, proposal, rng, ErrorRates())
            flags = {
                "wrong object": verdict["object_present"],
                "impossible edit": verdict["edit_possible"],
                "wrong caption": verdict["caption_right"],
            }
            assert flags[fault] is False and verdict["reason"] != "all is right"
    assert kinds.keys() == set(writer.MISTAKES) and min(kinds.values()) > 100


def test_mistakes_come_at_the_chosen_rates():
    wrong = rows = misjudged = 0
    rates = ErrorRates(mistakes=0.2, verifier=0.1)
    for i in range(150):
        scene, rng = sample_scene(random.Random(i)), random.Random(i)
        for proposal in writer.write(scene, EDIT_TYPES, rng, rates)["proposals"]:
            is_wrong = bool(writer.row_faults(scene, proposal))
            verdict = writer.verify(scene, proposal, rng, rates)
            is_present = verdict["object_present"] or proposal["edit_type"] == "add"
            accepted = is_present and verdict["edit_possible"] and verdict["caption_right"]
            rows, wrong, misjudged = rows + 1, wrong + is_wrong, misjudged + (accepted == is_wrong)
    assert wrong / rows == pytest.approx(0.2, abs=0.04)
    assert misjudged / rows == pytest.approx(0.1, abs=0.03)


def test_a_wrong_source_caption_is_a_fault():
    scene = sample_scene(random.Random(3), 1)
    row = writer.as_proposal(sample_edit_of(scene, random.Random(0), "recolour"))
    assert writer.row_faults(scene, {**row, "source_caption": "a nothing"}) == ["wrong source caption"]


# ---- the server


def test_the_server_answers_the_three_passes():
    scene = sample_scene(random.Random(5), 2)
    picture = scene_picture(scene)
    with serving_writer() as (url, served):
        status, answer = post(url, request_body("look", "What is there?", picture, "JPEG"))
        assert status == 200 and answer["usage"]["total_tokens"] > 0 and answer["model"] == "m"
        assert len(json.loads(content(answer))["objects"]) == 2
        body = request_body("write", "Edit types: remove, add, material", picture)
        proposals = json.loads(content(post(url, body)[1]))["proposals"]
        assert [p["edit_type"] for p in proposals] == ["remove", "add"]
        assert json.loads(content(post(url, body)[1]))["proposals"] == proposals
        assert json.loads(content(post(url, {**body, "seed": 1})[1]))["proposals"] != proposals
        text = f"Look at this proposal:\n{json.dumps(proposals[0], indent=1)}\nIs it right?"
        verdict = json.loads(content(post(url, request_body("verify", text, picture))[1]))
        assert verdict["object_present"] and verdict["edit_possible"] and verdict["caption_right"]
        assert served.counts == Counter(look=1, write=3, verify=1)


def test_the_lines_of_the_prompts_are_understood():
    scene = sample_scene(random.Random(5), 2)
    picture, served = scene_picture(scene), Writer(ErrorRates())
    text = "In this order:\n- style: the whole photo\n- remove: one thing\n- text: words\n- style: another\nGo."
    proposals = json.loads(content(served.answer(request_body("write", text, picture))))["proposals"]
    assert [p["edit_type"] for p in proposals] == ["style", "remove", "style"]
    for proposal in proposals:
        lines = [
            f"type: {proposal['edit_type']}",
            f"instruction: {proposal['instruction']}",
            f"object: {proposal['object']}",
            "caption of this photo: a thing",
            f"caption of the photo after the edit: {proposal['target_caption']}",
            *(f"1. {q['question']}" for q in proposal["questions"]),
            'Form: {"object_present": true}',
        ]
        verdict = json.loads(content(served.answer(request_body("verify", "\n".join(lines), picture))))
        assert verdict["object_present"] and verdict["edit_possible"] and verdict["caption_right"], verdict
        assert verdict["answers"] == [OPPOSITE[q["answer"]] for q in proposal["questions"]]
        lines[4] = "caption of the photo after the edit: a purple elephant"
        verdict = json.loads(content(served.answer(request_body("verify", "\n".join(lines), picture))))
        assert verdict["edit_possible"] and not verdict["caption_right"]


def test_a_schema_says_which_edit_types_are_wanted():
    kind = {"type": "string", "enum": ["style", "background"]}
    schema = {"properties": {"proposals": {"items": {"properties": {"edit_type": kind}}}}}
    body = request_body("write", "not: add, remove", scene_picture(sample_scene(random.Random(5), 2)))
    body["response_format"]["json_schema"]["schema"] = schema
    found = json.loads(content(Writer(ErrorRates()).answer(body)))["proposals"]
    assert [p["edit_type"] for p in found] == ["style", "background"]


def test_broken_answers_come_at_the_chosen_rate():
    served = Writer(ErrorRates(broken=0.3))
    broken = 0
    for i in range(120):
        body = request_body("write", "Edit types: style", scene_picture(sample_scene(random.Random(i))))
        try:
            json.loads(content(served.answer(body)))
        except ValueError:
            broken += 1
    assert 20 < broken < 55 and served.counts["broken"] == broken


def test_without_structured_output_the_pass_is_found_in_the_text():
    picture = scene_picture(sample_scene(random.Random(5), 2))
    with serving_writer(structured=False) as (url, _):
        body = request_body("look", 'Answer as JSON: {"objects": [...], "caption": "..."}', picture)
        status, answer = post(url, body)
        assert status == 400 and "response_format" in answer["error"]["message"]
        del body["response_format"]
        assert set(json.loads(content(post(url, body)[1]))) == {"objects", "caption"}


def test_bad_requests_are_refused_with_a_message():
    picture = scene_picture(sample_scene(random.Random(5), 2))
    with serving_writer() as (url, _):
        assert "toy picture" in post(url, request_body("look", "", picture.resize((64, 64))))[1]["error"]["message"]
        assert "look, write, verify" in post(url, request_body("draw", "", picture))[1]["error"]["message"]
        assert "proposal" in post(url, request_body("verify", "nothing", picture))[1]["error"]["message"]
        body = request_body("look", "", picture)
        body["messages"][0]["content"].pop(0)
        assert "one picture; got 0" in post(url, body)[1]["error"]["message"]
        for raw in (b"{", b"[]", b'{"messages": 3}'):
            assert post(url, raw)[0] == 400
        for stated in ("8000001", "many"):
            connection = HTTPConnection("127.0.0.1", int(url.split(":")[2].split("/")[0]))
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Content-Length", stated)
            connection.endheaders()
            assert connection.getresponse().status == 413
            connection.close()
        with pytest.raises(UserError, match="choose another --port"):
            make_server(Writer(ErrorRates()), int(url.split(":")[2].split("/")[0]))


def test_grade_counts_the_wrong_rows_of_a_data_set(tmp_path):
    folder = write_dataset(tmp_path / "set", 8, seed=1)
    assert grade_dataset(folder) == (8, 0, Counter())
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "target_caption": "a purple elephant"})
    path.write_text("\n".join(lines) + "\n")
    assert grade_dataset(folder) == (8, 1, Counter({"wrong caption": 1}))
    assert "8 rows, 1 wrong (12.5%)" in npedit("toy", "grade", folder)
    assert "expected a data set" in npedit("toy", "grade", tmp_path, code=2)


def test_bare_data_from_the_command_line(tmp_path):
    assert "3 pictures" in npedit("toy", "data", tmp_path / "bare", "--items", 3, "--bare")
    assert len(list((tmp_path / "bare").iterdir())) == 3


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "npedit", "toy", "writer", "--port", "0", "--mistakes", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        url = line.split()[2]
        answer = post(url, request_body("look", "", scene_picture(sample_scene(random.Random(5), 2))))
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert answer[0] == 200 and process.returncode == 0
    assert "Answers: broken: 0, look: 1" in rest
