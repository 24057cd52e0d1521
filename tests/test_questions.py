"""Which questions are asked about an edit, of which images, and which answers are wanted."""

import json
import re

import pytest

from npedit.questions import (
    ALIASES,
    EDIT_TYPES,
    IDENTITY_EDIT,
    OTHER,
    SCENE,
    WORDINGS,
    normalise_edit_type,
    questions_for,
)
from npedit.recipe.config import embedded_weights
from npedit.toy import edits

ORDINARY = [t for t in EDIT_TYPES if t not in (IDENTITY_EDIT, "remove", SCENE)]
wordings = pytest.mark.parametrize("wording", list(WORDINGS))


@wordings
@pytest.mark.parametrize("edit_type", ORDINARY)
def test_an_edit_is_asked_about_and_so_is_the_rest(edit_type, wording):
    edit, identity = questions_for(edit_type, "paint it blue", wording=wording)
    assert (edit.kind, identity.kind) == ("edit", "identity")
    assert edit.answer == identity.answer == +1
    assert edit.looks_at == identity.looks_at == ("reference", "edited")
    assert "paint it blue" in edit.text
    assert "paint it blue" in identity.text
    assert edit.text != identity.text


@wordings
def test_removal_looks_at_the_edited_image_alone_and_wants_no(wording):
    edit, identity = questions_for("remove", "take the fence away", "white fence", wording)
    assert edit.looks_at == ("edited",)
    assert edit.answer == -1
    assert "white fence" in edit.text
    assert "take the fence away" not in edit.text
    assert identity.looks_at == ("reference", "edited")
    assert identity.answer == +1
    assert "white fence" in identity.text


@wordings
def test_do_nothing_gets_the_identity_question_alone(wording):
    """Fault 3 of the reimplementation: it also asked whether "do nothing" was done, wanting a visible change."""
    (only,) = questions_for(IDENTITY_EDIT, "do nothing", "white fence", wording)
    assert (only.kind, only.answer, only.looks_at) == ("identity", +1, ("reference", "edited"))
    assert "white fence" not in only.text
    assert only.text not in {q.text for q in questions_for("recolour", "do nothing", wording=wording)}


@wordings
def test_a_scene_is_asked_about_alone_its_subject_with_a_photo_and_a_returned_photo_is_refused(wording):
    scene, subject, returned = questions_for(SCENE, "show it on the moon", "grey cat", wording)
    assert (scene.kind, scene.looks_at, scene.answer) == ("edit", ("edited",), +1)
    assert "show it on the moon" in scene.text
    assert (subject.kind, subject.looks_at, subject.answer) == ("identity", ("reference", "edited"), +1)
    assert "grey cat" in subject.text and "show it on the moon" not in subject.text
    assert (returned.kind, returned.looks_at, returned.answer) == ("edit", ("reference", "edited"), -1)
    assert len({scene.text, subject.text, returned.text} | {WORDINGS[wording]["same"]}) == 4


@wordings
def test_with_another_photo_the_identity_of_a_scenes_subject_alone_is_asked_against_it(wording):
    without, found = (questions_for(SCENE, "on the moon", "grey cat", wording, other) for other in (False, True))
    assert [q.looks_at for q in found] == [("edited",), ("other", "edited"), ("reference", "edited")]
    assert [q.text for q in found] == [q.text for q in without]
    for kind in EDIT_TYPES:
        if kind != SCENE:
            assert questions_for(kind, "a", "cat", wording, True) == questions_for(kind, "a", "cat", wording)


@wordings
def test_questions_name_their_wording(wording):
    found = {q.name for kind in EDIT_TYPES for q in questions_for(kind, "a", "cat", wording)}
    assert found == set(WORDINGS[wording]) - {"rubric", "grade"}  # these are asked by item_questions.py


def test_the_short_questions_use_words_that_the_embedded_critic_knows():
    known = json.loads((embedded_weights("critic") / "tokenizer.json").read_text())["model"]["vocab"]
    for text in WORDINGS["short"].values():
        assert set(re.findall("[a-z]+", re.sub(r"{\w+}", "", text))) <= known.keys()


@wordings
def test_no_placeholder_is_left(wording):
    for edit_type in EDIT_TYPES:
        for question in questions_for(edit_type, "an instruction", "an object", wording):
            assert "{" not in question.text


@pytest.mark.parametrize("edit_type", ["remove", SCENE])
def test_a_type_whose_questions_name_an_object_is_refused_without(edit_type):
    with pytest.raises(ValueError, match="Fill 'object'"):
        questions_for(edit_type, "take it away")


def test_unknown_type_names_the_nearest():
    with pytest.raises(ValueError, match="'recolor'.*'recolour'"):
        normalise_edit_type("recolor")
    with pytest.raises(ValueError, match="'bakground'.*'background'"):
        questions_for("bakground", "make it blue")


def test_a_type_like_no_other_lists_all_of_them():
    with pytest.raises(ValueError, match="qqq") as caught:
        normalise_edit_type("qqq")
    assert "did you mean" not in str(caught.value)
    assert all(t in str(caught.value) for t in EDIT_TYPES)


def test_unknown_wording_is_refused():
    with pytest.raises(ValueError, match="plain, short"):
        questions_for("add", "add a dog", wording="long")


def test_other_spellings_are_known():
    assert normalise_edit_type(" Color ") == "recolour"
    assert normalise_edit_type("Removal") == "remove"
    assert normalise_edit_type("do nothing") == IDENTITY_EDIT
    assert normalise_edit_type("") == OTHER
    assert normalise_edit_type("Customization") == SCENE
    assert set(ALIASES.values()) <= set(EDIT_TYPES)


def test_every_toy_edit_has_questions():
    assert set(edits.EDIT_TYPES) <= set(EDIT_TYPES)
