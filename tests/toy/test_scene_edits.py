"""Scene edits of the toy world: a subject asked for in another scene, and the oracle that must know every answer."""

import random
import re
from dataclasses import replace

import pytest
import torch
from command_line import run as npedit

from npedit.benchmarks import toy as bench
from npedit.data import toy
from npedit.errors import UserError
from npedit.recipe.config import load_recipe, make_recipe
from npedit.toy.edits import CAPTION_WORDS, EDIT_TYPES
from npedit.toy.oracle import expected_reading, judge_edit, matches_caption, read_scene
from npedit.toy.scene_edits import FACTS, OPENINGS, PHOTOS, sample_photos, sample_scene_edit
from npedit.toy.words import vocabulary
from npedit.toy.world import PLACES, render
from npedit.toy_models import mistakes
from npedit.training.parts import build_parts

N = 120


@pytest.fixture(scope="module")
def edits():
    return [sample_scene_edit(random.Random(f"scene/{i}"), held_out=i % 2 == 1) for i in range(N)]


def judge(edits, scenes):
    return [judge_edit(e, r) for e, r in zip(edits, read_scene(render(scenes)), strict=True)]


# ---- the language


def test_instructions_ask_for_what_differs_in_words_that_the_embedded_models_know(edits):
    known = set(vocabulary())
    for edit in edits:
        for text in (edit.instruction, edit.target_caption, edit.source_caption):
            assert set(re.findall(r"[a-z]+", text)) <= known
            assert len(text.split()) <= CAPTION_WORDS
        assert 2 <= len(edit.asked) <= 3 and set(edit.asked) <= set(FACTS)
        assert not {"background", "style"} & set(edit.asked) or edit.target != edit.reference
        if "background" in edit.asked:
            assert edit.target.background in edit.instruction and edit.target.background != edit.reference.background
        if "place" in edit.asked:
            assert edit.to_cell != edit.cell
    assert {fact for edit in edits for fact in edit.asked} == set(FACTS)


def test_the_last_phrasings_are_held_out(edits):
    beginnings = [tuple(o.split("{x}")[0] for o in part) for part in (OPENINGS[:-2], OPENINGS[-2:])]
    for i, edit in enumerate(edits):
        assert edit.instruction.startswith(beginnings[i % 2])
        assert not edit.instruction.startswith(beginnings[1 - i % 2])


def test_the_target_shows_its_caption_which_leaves_out_most_of_the_identity(edits):
    assert all(matches_caption(e.target_caption, expected_reading(e.target)) for e in edits)
    assert sum(e.subject.size in e.target_caption.split() for e in edits) < N / 4


def test_a_target_caption_states_the_place_of_the_subject(edits):
    """A text-to-image model may draw a thing twice if its caption names no place, and DMD teaches what it draws."""
    for edit in edits:
        thing = f"{edit.subject.colour} {edit.subject.shape} at the {PLACES[edit.to_cell]}"
        assert thing in edit.target_caption
        assert "place" in edit.asked or edit.to_cell == edit.cell  # the student can know the place


def test_photos_of_a_subject_show_the_same_subject_once_and_its_name_fits_in_all():
    for i in range(50):
        photos = sample_photos(random.Random(i))
        looks = [scene.thing(cell).appearance for scene, cell in photos]
        assert len(photos) == PHOTOS and len(set(looks)) == 1
        words = set(sample_scene_edit(random.Random(i), photos=photos).object.split()) - {"shape"}
        for scene, cell in photos:
            assert [c for c in scene.filled if words <= set(scene.thing(c).appearance)] == [cell]


# ---- the oracle


def test_true_edits_are_right_whatever_is_free(edits):
    assert judge(edits, [e.target for e in edits]) == [(True, True)] * N
    free = [mistakes.vary_free_facts(e, random.Random(i)) for i, e in enumerate(edits)]
    assert judge(edits, free) == [(True, True)] * N and free != [e.target for e in edits]


def test_a_copy_keeps_the_subject_and_is_never_the_scene(edits):
    assert judge(edits, [e.reference for e in edits]) == [(False, True)] * N
    scores = bench.score(lambda references, _: references, bench.sample_items(24, 0, ("scene",)))
    assert scores["copy_rate"] == 1 and scores["both"]["value"] == 0 and set(scores["by_type"]) == {"scene"}


def test_a_changed_subject_is_not_kept(edits):
    changed = [mistakes.change_subject(e, e.target, random.Random(i)) for i, e in enumerate(edits)]
    assert not any(kept for _, kept in judge(edits, changed))
    twice = [e.target.with_cell(e.target.empty[0], e.target.cells[e.to_cell]) for e in edits]
    assert not any(kept for _, kept in judge(edits, twice))
    gone = [e.target.with_cell(e.to_cell, None) for e in edits]
    assert not any(kept for _, kept in judge(edits, gone))


def test_each_asked_fact_must_be_there(edits):
    for i, edit in enumerate(edits):
        for fact in edit.asked:
            wrong = mistakes.miss_fact(edit, edit.target, fact, random.Random(f"{fact}/{i}"))
            is_right, is_kept = judge_edit(edit, expected_reading(wrong))
            assert not is_right
            assert is_kept or fact == "companion"  # a changed companion may become a second subject


def test_a_cell_that_shows_nothing_of_the_world_is_no_right_scene(edits):
    images = render([e.target for e in edits])
    for image, edit in zip(images, edits, strict=True):
        top, left = 16 * (edit.target.empty[-1] // 2), 16 * (edit.target.empty[-1] % 2)
        image[:, top + 3 : top + 13, left + 3 : left + 13] = torch.rand(3, 10, 10, generator=torch.manual_seed(0))
    assert sum(right for right, _ in (judge_edit(e, r) for e, r in zip(edits, read_scene(images)))) < N / 10


# ---- the data and the recipe


def test_scene_items_have_another_photo_of_the_subject_for_the_critic():
    source = toy.Source(toy.Settings(edit_types=("scene",), nothing_share=0.0), 3)
    batch = source.batch(0, 8)
    assert set(batch.edit_types) == {"scene"} and all(batch.objects)
    edits = [source._sample_edit(*numbered) for numbered in source._numbered_generators(0, 8)]
    for edit, other in zip(edits, read_scene(batch.other_photos), strict=True):
        assert edit.subject.appearance in other.cells
        assert replace(other, residual=0.0) != expected_reading(edit.reference)
    assert toy.Source(toy.Settings(edit_types=("scene",), other_photos=False), 3).batch(0, 8).other_photos is None
    later = [source._sample_edit(*numbered) for numbered in source._numbered_generators(toy.SUBJECTS, 8)]
    assert [e.subject.appearance for e in later] == [e.subject.appearance for e in edits]
    assert [e.reference for e in later] != [e.reference for e in edits]


def test_local_items_are_what_they_were_and_types_can_be_mixed():
    plain, local = toy.Settings(), toy.Settings(edit_types=EDIT_TYPES)
    assert toy.Source(plain, 0).fingerprint() == toy.Source(local, 0).fingerprint()
    assert toy.Source(plain, 0).batch(0, 4).other_photos is None
    mixed = toy.Source(toy.Settings(edit_types=("scene", "add")), 0)
    assert {"scene", "add"} <= set(mixed.batch(0, 24).edit_types)
    with pytest.raises(ValueError, match="expected edit types among"):
        toy.Settings(edit_types=("swim",))


def test_the_recipe_opens_and_says_how_to_make_its_critic():
    recipe = load_recipe("toy-scene")
    assert make_recipe(recipe.as_dict()) == recipe
    assert {stage.settings.steps for stage in recipe.stages} == {8}
    missing = load_recipe("toy-scene", ["critic.weights=no/such/critic"])
    with pytest.raises(UserError, match="no/such/critic.*does not exist"):
        build_parts(missing)


def test_the_command_scores_scene_edits():
    shown = npedit("evaluate", "toy", "--items", 4, "--edit-type", "scene")
    assert "scene right" in shown and "subject kept" in shown
    assert "expected one of" in npedit("evaluate", "toy", "--edit-type", "swim", code=2)
