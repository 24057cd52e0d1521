"""The critic's opinion on the page: the critic in the package, about right edits and unchanged pictures."""

import random
from types import SimpleNamespace

import pytest

from npedit.data._photos import to_pil
from npedit.errors import UserError
from npedit.questions import questions_for
from npedit.serve.verdict import find_critic, find_recipe
from npedit.toy.edits import sample_edit
from npedit.toy.world import render


@pytest.fixture(scope="module")
def critic():
    return find_critic("embedded", find_recipe("embedded"), False)


def pictures(edit_type):
    edit = sample_edit(random.Random(f"page/{edit_type}"), edit_type)
    before, right = (to_pil(picture) for picture in render([edit.reference, edit.target]))
    return before, right, edit


@pytest.mark.parametrize("edit_type", ["recolour", "background", "add"])
def test_right_edits_are_told_from_unchanged_pictures(critic, edit_type):
    before, right, edit = pictures(edit_type)
    large = [image.resize((320, 320), 0) for image in (before, right, before)]
    done, unchanged = critic.ask(large[0], large[1:], edit.instruction, [(32, 32)])
    assert done.done > 0.8 and done.rest_kept > 0.8
    assert unchanged.done < 0.2 and unchanged.rest_kept > 0.8


def test_a_removal_is_asked_about_in_its_own_words(critic):
    before, right, edit = pictures("remove")
    done, unchanged = critic.ask(before, [right, before], f"remove the {edit.object}", [(32, 32)])
    assert done.done > 0.8 and unchanged.done < 0.2


@pytest.mark.parametrize(
    "changes", [{"edit_types": ("scene",)}, {"shares": {"scene": 1.0}}, {"shares": {"scene": 0.5}}, {}]
)
def test_an_editor_of_scenes_is_not_asked_whether_the_rest_is_kept(changes):
    """In a scene the rest is free. The questions are those of training, without the one that names the subject."""
    settings = SimpleNamespace(**changes)
    recipe = find_recipe("embedded").model_copy(update={"data": SimpleNamespace(settings=settings)})
    critic, before = find_critic("x", recipe, False), pictures("add")[0]
    asked, opened = [], critic._open_critic()
    logits = opened.logits
    opened.logits = lambda texts, *rest, **named: asked.extend(texts) or logits(texts, *rest, **named)
    critic._open_critic = lambda: opened
    (verdict,) = critic.ask(before, [before], "a red circle on the grass", [(32, 32)])
    is_scene = changes in ({"edit_types": ("scene",)}, {"shares": {"scene": 1.0}})
    kinds = ("edit",) if is_scene else ("edit", "identity")
    questions = questions_for("scene" if is_scene else "other", "a red circle on the grass", "it", critic.wording)
    assert asked == [q.text for q in questions if q.kind in kinds]
    assert (verdict.rest_kept is None) == is_scene == ("rest kept" not in str(verdict))


def test_which_editors_have_a_critic(tmp_path):
    recipe = find_recipe("embedded")
    real = recipe.model_copy(update={"critic": recipe.critic.model_copy(update={"weights": "org/critic"})})
    assert find_critic("run", real, False) is None  # not opened unless asked for
    assert find_critic("run", real, True) is not None
    assert find_recipe(str(tmp_path)) is None and find_critic("x", None, False) is None
    with pytest.raises(UserError, match="--critic"):
        find_critic("x", None, True)
