"""Which questions are asked about an edit, of which images, and which answers are wanted."""

import pytest

from npedit.questions import ALIASES, EDIT_TYPES, IDENTITY_EDIT, OTHER, WORDINGS, normalise_edit_type, questions_for
from npedit.toy import edits

ORDINARY = [t for t in EDIT_TYPES if t not in (IDENTITY_EDIT, "remove")]
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
def test_no_placeholder_is_left(wording):
    for edit_type in EDIT_TYPES:
        for question in questions_for(edit_type, "an instruction", "an object", wording):
            assert "{" not in question.text


def test_removal_without_an_object_is_refused():
    with pytest.raises(ValueError, match="'object'"):
        questions_for("remove", "take it away")


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
    assert set(ALIASES.values()) <= set(EDIT_TYPES)


def test_every_toy_edit_has_questions():
    assert set(edits.EDIT_TYPES) <= set(EDIT_TYPES)
