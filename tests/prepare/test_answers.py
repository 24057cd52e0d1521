"""Reading a model's answers: tolerant of form, never guessing."""

import json

import jsonschema
import pytest

from npedit.prepare.answers import (
    UnreadableAnswer,
    look_schema,
    parse_look,
    parse_verify,
    parse_write,
    verify_schema,
    write_schema,
)

LOOK = '{"objects": [{"name": "cat", "where": "left", "attributes": ["grey"]}], "caption": "a grey cat"}'
VERIFY = '{"object_present": true, "edit_possible": true, "caption_right": true, "answers": ["no"], "reason": ""}'


@pytest.mark.parametrize(
    "text",
    [
        LOOK,
        f"Here it is:\n```json\n{LOOK}\n```\nAnything else?",
        f'<think>maybe {{"caption": "wrong"}}</think>{LOOK}',
        LOOK.replace("]}", "],}"),
        LOOK.replace('"', "'"),
        LOOK.replace('["grey"]', '"grey"'),
        LOOK.replace("a grey cat", "a grey\ncat"),
        f'{{"note": 1}} {LOOK}',
    ],
)
def test_forms_of_a_look_that_are_understood(text):
    found = parse_look(text)
    assert found == {"objects": [{"name": "cat", "where": "left", "attributes": ["grey"]}], "caption": "a grey cat"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot see a photo.",
        LOOK[:-3],
        LOOK.replace("a grey cat", ""),
        '{"caption": "a cat"}',
        "[" * 5000,
        "<html>",
    ],
)
def test_a_look_that_lacks_something_is_unreadable(text):
    with pytest.raises(UnreadableAnswer):
        parse_look(text)


@pytest.mark.parametrize(
    "text",
    [VERIFY, VERIFY.replace('"no"', '"No."'), VERIFY.replace('"no"', "false"), VERIFY.replace(": true", ': "True"')],
)
def test_forms_of_a_verification_that_are_understood(text):
    found = parse_verify(text, 1)
    assert found["answers"] == ["no"] and found["object_present"] is True


@pytest.mark.parametrize(
    "text",
    [
        VERIFY.replace('"no"', '"maybe"'),
        VERIFY.replace('["no"]', "[]"),
        VERIFY.replace('"edit_possible": true', '"edit_possible": 1'),
        VERIFY.replace('"edit_possible": true', '"edit_possible": null'),
        VERIFY.replace('["no"]', '"no"'),
    ],
)
def test_a_verification_is_not_guessed(text):
    with pytest.raises(UnreadableAnswer):
        parse_verify(text, 1)


def proposal(**changes):
    question = {"question": "is it red?", "answer": "yes"}
    fields = {"edit_type": "recolour", "instruction": "paint it red", "object": "door", "target_caption": "a red door"}
    return {**fields, "questions": [question], **changes}


def test_one_unreadable_proposal_does_not_spoil_the_others():
    text = json.dumps({"proposals": [proposal(), proposal(questions=[{"question": "?", "answer": "perhaps"}]), 3]})
    good, bad, worse = parse_write(text, ["recolour"])
    assert good == proposal() and "yes or no" in bad["unreadable"] and "object" in worse["unreadable"]


@pytest.mark.parametrize("word, kind", [("color", "recolour"), ("Recolour", "recolour"), ("removal", "removal")])
def test_synonyms_of_wanted_types_are_understood(word, kind):
    (found,) = parse_write(json.dumps([proposal(edit_type=word)]), ["recolour"])
    assert found["edit_type"] == kind


def test_half_of_a_surrogate_pair_becomes_a_question_mark():
    found = parse_look(LOOK.replace("a grey cat", "a \\ud83d cat").replace("left", "\\ud83d"))
    assert found["caption"] == "a ? cat" and found["objects"][0]["where"] == "?"


def test_schemas_are_valid_and_strict():
    for schema in (look_schema(), write_schema(["add", "remove"]), verify_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False and set(schema["required"]) == set(schema["properties"])
    jsonschema.validate({"proposals": [proposal(edit_type="add")]}, write_schema(["add"]))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"proposals": [proposal(edit_type="style")]}, write_schema(["add"]))
