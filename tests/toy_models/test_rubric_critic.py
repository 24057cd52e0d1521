"""The toy's critic, trained on with rubrics and grades."""

import json
import random

import pytest
import torch

from npedit.questions import GRADES
from npedit.recipe.config import embedded_weights
from npedit.toy.edits import EDIT_TYPES, sample_edit
from npedit.toy.language import answer_question, questions_about
from npedit.toy.oracle import expected_reading, judge_edit
from npedit.toy.world import sample_scene
from npedit.toy_models import build as models
from npedit.toy_models.embedded_critic import load_critic
from npedit.toy_models.mistakes import sample_outcome
from npedit.toy_models.rubric_critic import (
    grade_targets,
    sample_lessons,
    sample_question,
    share_done,
    tokenizer_with_digits,
)


@pytest.fixture(scope="module")
def edits():
    return [sample_edit(random.Random(f"rubric/{i}"), EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(200)]


def test_a_grade_is_highest_exactly_where_the_oracle_says_that_the_edit_was_carried_out(edits):
    for i, edit in enumerate(edits):
        scene = sample_outcome(edit, random.Random(i))
        applied, _ = judge_edit(edit, expected_reading(scene))
        assert (share_done(edit, scene) == 1) == applied
        assert share_done(edit, edit.target) == 1 and share_done(edit, edit.reference) == 0


def test_the_target_of_a_grade_has_the_share_as_its_expected_score():
    shares = torch.tensor([0.0, 0.1, 0.25, 0.6, 1.0])
    targets = grade_targets(shares)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    torch.testing.assert_close(targets @ torch.linspace(0, 1, 5), shares)
    assert (targets > 0).sum(1).max() == 2


def test_a_rubric_tells_the_target_from_the_reference(edits):
    for edit in edits:
        (entry,) = questions_about(edit)
        assert answer_question(edit.target, entry["question"]) == entry["answer"]


def test_random_questions_are_true_as_often_as_not():
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(400)]
    right = [answer_question(scene, sample_question(scene, rng)) == "yes" for scene in scenes]
    assert 0.4 < sum(right) / len(right) < 0.65


def test_lessons_are_of_every_kind():
    images, lessons = sample_lessons(random.Random(0), 36)
    assert images.shape == (72, 3, 32, 32) and len(lessons) == 5 * 36
    assert {lesson.kind for lesson in lessons} == {"usual", "grade", "presence", "place", "look", "background", "style"}
    assert all(36 <= lesson.pictures[-1] < 72 for lesson in lessons)
    _, blended = sample_lessons(random.Random(0), 12, half_done_share=1.0)
    assert all(lesson.kind == "grade" and 0 < lesson.truth < 1 for lesson in blended)


def test_digits_take_the_place_of_unused_words():
    old = load_critic(embedded_weights("critic"))
    tokenizer = tokenizer_with_digits(old.tokenizer)
    assert len(tokenizer) == len(old.tokenizer)
    text = "what of this edit was done : paint the red circle blue ?"
    assert tokenizer(text).input_ids == old.tokenizer(text).input_ids
    assert [tokenizer.convert_ids_to_tokens(tokenizer(f"answer {d}").input_ids) for d in GRADES] == [
        ["answer", d] for d in GRADES
    ]


def test_the_embedded_critic_is_trained_on(tmp_path):
    found = models.train_critic_on(tmp_path, "rubric", steps=2, items=12, edits_per_step=10)
    assert {"usual", "grade", "grade error"} < set(found["critic_right_clean"])
    assert json.loads((tmp_path / "parts.json").read_text())["lessons"] == "rubric"
    after = load_critic(tmp_path / "critic")
    assert len({*after.answer_ids(GRADES), after.yes, after.no}) == 7
    assert models.train_critic_on(tmp_path, "rubric", steps=2, items=12, edits_per_step=10) == found
