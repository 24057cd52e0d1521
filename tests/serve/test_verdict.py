"""The critic's opinion on the page: the critic in the package, about right edits and unchanged pictures."""

import random

import pytest

from npedit.data._photos import to_pil
from npedit.errors import UserError
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


def test_which_editors_have_a_critic(tmp_path):
    recipe = find_recipe("embedded")
    real = recipe.model_copy(update={"critic": recipe.critic.model_copy(update={"weights": "org/critic"})})
    assert find_critic("run", real, False) is None  # not opened unless asked for
    assert find_critic("run", real, True) is not None
    assert find_recipe(str(tmp_path)) is None and find_critic("x", None, False) is None
    with pytest.raises(UserError, match="--critic"):
        find_critic("x", None, True)
