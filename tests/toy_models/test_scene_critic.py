"""The toy's critic, trained on with questions about scene edits."""

import json
import random

import pytest
import torch

from npedit.check.labelled_edits import toy_labelled_edits
from npedit.errors import UserError
from npedit.questions import SCENE, questions_for
from npedit.recipe.config import embedded_weights
from npedit.toy.oracle import expected_reading, judge_edit
from npedit.toy.scene_edits import sample_scene_edit
from npedit.toy.world import sample_thing
from npedit.toy_models import build as models
from npedit.toy_models.embedded_critic import load_critic, load_vae
from npedit.toy_models.mistakes import lose_subject, repeat_subject, sample_scene_outcome
from npedit.toy_models.scene_critic import (
    evaluate_scene_critic,
    is_returned,
    sample_lessons,
    true_answers,
)


@pytest.fixture(scope="module")
def edits():
    return [sample_scene_edit(random.Random(f"lesson/{i}")) for i in range(200)]


def test_a_right_scene_gets_the_wanted_answers_and_a_returned_photo_fails_both_edit_questions(edits):
    for edit in edits:
        wanted = {q.name: q.answer > 0 for q in questions_for(SCENE, edit.instruction, edit.object, "short")}
        assert true_answers(edit, edit.target) == wanted
        assert true_answers(edit, edit.reference) == {"scene": False, "subject": True, "returned": True}


def test_a_picture_is_returned_if_one_thing_at_most_has_changed(edits):
    for edit in edits:
        assert is_returned(edit, edit.reference.with_cell(edit.reference.empty[0], edit.subject))
        assert not is_returned(edit, edit.target)


def test_outcomes_are_of_every_kind(edits):
    outcomes = [sample_scene_outcome(e, random.Random(f"outcome/{i}")) for i, e in enumerate(edits)]
    verdicts = [judge_edit(e, expected_reading(s)) for e, s in zip(edits, outcomes, strict=True)]
    for verdict in ((True, True), (True, False), (False, True), (False, False)):
        assert 0.08 < verdicts.count(verdict) / len(edits) < 0.5


def test_a_lost_or_repeated_subject_is_not_kept(edits):
    for i, edit in enumerate(edits):
        assert not true_answers(edit, lose_subject(edit, edit.target))["subject"]
        several = true_answers(edit, repeat_subject(edit, edit.target, random.Random(i)))
        assert several["scene"] and not several["subject"]  # the target has an empty cell


def test_a_full_scene_with_a_repeated_subject_loses_another_thing(edits):
    for i, edit in enumerate(edits):
        full = edit.target
        for cell in full.empty:
            full = full.with_cell(cell, sample_other_thing(edit, random.Random(cell)))
        scene = repeat_subject(edit, full, random.Random(i))
        alike = [t for t in scene.cells if t and t.appearance[:2] == edit.subject.appearance[:2]]
        assert len(alike) == 2 and not scene.empty


def sample_other_thing(edit, rng):
    thing = sample_thing(rng)
    while thing.appearance[:2] == edit.subject.appearance[:2]:
        thing = sample_thing(rng)
    return thing


def test_lessons_show_each_question_its_pictures():
    images, lessons = sample_lessons(random.Random(0), 12)
    assert images.shape == (36, 3, 32, 32)
    others = 0
    for lesson in lessons:
        assert len(lesson.pictures) == len(lesson.question.looks_at)
        assert 12 <= lesson.pictures[-1] < 24  # the edited image comes last
        others += "other" in lesson.question.looks_at
    assert 0 < others < 12 and len(lessons) == 36
    _, blended = sample_lessons(random.Random(0), 12, half_done_share=1.0)
    assert all(0 < lesson.truth < 1 and lesson.question.name == "scene" for lesson in blended)


def test_the_embedded_critic_is_trained_on_without_new_words(tmp_path):
    found = models.train_critic_on(tmp_path, "scene", steps=2, items=12, edits_per_step=2)
    assert set(found["critic_right_clean"]) == {"returned", "scene", "subject", "subject/other"}
    assert json.loads((tmp_path / "parts.json").read_text())["lessons"] == "scene"
    before, after = load_critic(embedded_weights("critic")), load_critic(tmp_path / "critic")
    assert len(after.tokenizer) == len(before.tokenizer)
    changed = [not torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    written = (tmp_path / "critic" / "model.safetensors").stat().st_mtime_ns
    assert models.train_critic_on(tmp_path, "scene", steps=2, items=12, edits_per_step=2) == found
    assert (tmp_path / "critic" / "model.safetensors").stat().st_mtime_ns == written
    for other in (lambda: models.train_critic_on(tmp_path, "rubric"), lambda: models.build_toy_models(tmp_path)):
        with pytest.raises(UserError, match="has 'scene'; choose another folder"):
            other()


def test_the_evaluation_counts_right_answers():
    critic, vae = load_critic(embedded_weights("critic")), load_vae()
    shares = evaluate_scene_critic(critic, vae, 12, 0, damage=True)
    assert all(0 <= share <= 1 for share in shares.values())


def test_the_check_knows_the_answers_about_scene_edits():
    known = toy_labelled_edits(60, 0, (SCENE,))
    assert {e.example.edit_type for e in known} == {SCENE}
    for name in ("applied", "preserved", "returned"):
        assert {getattr(e, name) for e in known} == {True, False}


@pytest.mark.parametrize("lessons", ["scene", "rubric"])
def test_a_seed_decides_what_is_learnt(tmp_path, lessons):
    weights = []
    for name in ("a", "b"):
        models.train_critic_on(tmp_path / name, lessons, steps=1, seed=3, items=1, edits_per_step=2)
        weights.append((tmp_path / name / "critic" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
