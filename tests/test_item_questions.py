"""Which questions an item is asked, and how much each one counts."""

from __future__ import annotations

import json

import pytest

from npedit.item_questions import QuestionChoice, grade_question, item_questions, rubric_questions
from npedit.questions import EDIT_TYPES, GRADES, IDENTITY_EDIT, SCENE, WORDINGS, YES_NO, questions_for
from npedit.recipe.config import embedded_weights

RUBRIC = json.dumps(
    [
        {"question": "is the dog blue ?", "answer": "yes"},
        {"question": "is there a fence ?", "answer": "no"},
        {"question": "is it the same dog ?", "answer": "yes", "images": "both"},
    ]
)


def asked(choice: QuestionChoice, rubric: str = RUBRIC, kind: str = "recolour") -> list[tuple[str, float, float]]:
    found = item_questions(kind, "paint it blue", "dog", rubric, "short", choice)
    return [(entry.question.kind, entry.weight, entry.share) for entry in found]


@pytest.mark.parametrize("kind", EDIT_TYPES)
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_without_the_settings_an_item_gets_the_usual_questions(kind, weight):
    found = item_questions(kind, "do it", "dog", RUBRIC, "short", QuestionChoice(identity_weight=weight))
    wanted = [q for q in questions_for(kind, "do it", "dog", "short") if q.kind == "edit" or weight]
    assert [entry.question for entry in found] == wanted
    assert [entry.weight for entry in found] == [1.0 if q.kind == "edit" else weight for q in wanted]
    assert all(entry.share == 1 for entry in found)


def test_a_rubric_beside_the_usual_questions_shares_one_weight():
    found = asked(QuestionChoice(rubric="beside", rubric_weight=0.6))
    assert found[:2] == [("edit", 1, 1), ("identity", 1, 1)]
    assert found[2:] == [("rubric", pytest.approx(0.2), pytest.approx(1 / 3))] * 3


def test_a_rubric_instead_of_the_usual_questions_has_their_weight():
    assert asked(QuestionChoice(rubric="instead", identity_weight=0.5)) == [("rubric", 0.5, pytest.approx(2 / 3))] * 3
    assert (
        asked(QuestionChoice(rubric="instead", rubric_weight=2, identity_weight=0))
        == [("rubric", pytest.approx(2 / 3), pytest.approx(1 / 3))] * 3
    )


def test_an_item_without_a_rubric_gets_the_usual_questions():
    for use in ("beside", "instead"):
        assert asked(QuestionChoice(rubric=use), "") == [("edit", 1, 1), ("identity", 1, 1)]
    assert asked(QuestionChoice(rubric="instead", identity_weight=0), "", IDENTITY_EDIT) == []


def test_a_grade_takes_the_place_of_the_edit_questions():
    assert asked(QuestionChoice(grade="instead", grade_weight=0.5)) == [("grade", 0.5, 1), ("identity", 1, 1)]
    assert asked(QuestionChoice(grade="beside", grade_weight=0.5))[2:] == [("grade", 0.5, 1)]
    assert asked(QuestionChoice(grade="instead"), kind=SCENE) == [("grade", 2, 2), ("identity", 1, 1)]
    for name in (IDENTITY_EDIT, "do_nothing"):  # the second is a data set's word for the first
        assert asked(QuestionChoice(grade="beside"), kind=name) == [("identity", 1, 1)]


def test_a_grade_and_a_rubric_together():
    both = QuestionChoice(grade="beside", rubric="instead")
    assert [kind for kind, _, _ in asked(both)] == ["rubric"] * 3 + ["grade"]
    assert sum(weight for _, weight, _ in asked(both)) == pytest.approx(3)
    instead = QuestionChoice(grade="instead", rubric="instead")
    assert [kind for kind, _, _ in asked(instead)] == ["rubric"] * 3
    assert [kind for kind, _, _ in asked(instead, "")] == ["grade", "identity"]


def test_a_rubric_question_looks_at_the_edited_image_unless_it_says_both():
    found = rubric_questions(RUBRIC, "short")
    assert [q.looks_at for q in found] == [("edited",), ("edited",), ("reference", "edited")]
    assert [q.answer for q in found] == [1, -1, 1]
    assert all(q.answers == YES_NO for q in found)


def test_a_rubric_with_the_usual_texts_is_the_usual_questions():
    """In both wordings: the words that ask for Yes or No are added only where they are missing."""
    for wording in WORDINGS:
        for kind in ("recolour", "remove"):
            usual = questions_for(kind, "paint it {blue}", "dog", wording)
            entries = [
                {"question": q.text, "answer": "yes" if q.answer > 0 else "no"}
                | ({"images": "both"} if len(q.looks_at) == 2 else {})
                for q in usual
            ]
            own = item_questions(kind, "x", "dog", json.dumps(entries), wording, QuestionChoice(rubric="instead"))
            facts = [(q.text, q.looks_at, q.answer, q.answers) for q in usual]
            assert [(e.question.text, e.question.looks_at, e.question.answer, e.question.answers) for e in own] == facts
            assert [entry.weight for entry in own] == [entry.share for entry in own] == [1.0] * len(usual)
    (plain,) = rubric_questions('[{"question": "Is it blue?", "answer": "yes"}]')
    assert plain.text == "Is it blue? Answer Yes or No."


def test_the_graded_question_names_the_edit_and_wants_the_highest_grade():
    for wording in WORDINGS:
        question = grade_question("paint it blue", wording)
        assert "paint it blue" in question.text and question.answers == GRADES and question.answer == 1
        assert question.looks_at == ("reference", "edited")


def test_the_short_wording_uses_words_that_the_embedded_critic_has_read():
    known = json.loads((embedded_weights("critic") / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(WORDINGS["short"]["grade"].replace("{instruction}", "").split()) - {":", "?"} <= known.keys()
