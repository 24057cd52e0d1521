"""Which questions the critic is asked about one item of training data, and how much each question counts.

The usual questions depend on the edit type alone (`questions.py`). Two settings add questions, or replace usual ones:

    rubric: Yes/No questions about this item alone, from the data's column `questions`
    grade:  "how far has the requested edit been carried out, 1 to 5?"

The questions of a rubric share one weight. So an item with many questions counts as much as an item with one question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from npedit.questions import (
    GRADES,
    IDENTITY_EDIT,
    NO,
    PAIR,
    WORDINGS,
    YES,
    Picture,
    Question,
    normalise_edit_type,
    questions_for,
)

Use = Literal["off", "beside", "instead"]
BOTH_IMAGES = "both"  # the value of "images" of a question that looks at the reference too
LOOKS_AT: dict[str, tuple[Picture, ...]] = {"edited": ("edited",), BOTH_IMAGES: PAIR}


@dataclass(frozen=True)
class QuestionChoice:
    """Which questions are asked beside the usual ones or instead of them, and the weights of each kind."""

    rubric: Use = "off"
    grade: Use = "off"
    identity_weight: float = 1.0
    rubric_weight: float = 1.0
    grade_weight: float = 1.0


USUAL_QUESTIONS = QuestionChoice()


class WeightedQuestion(NamedTuple):
    """A question of an item. `weight` is the factor of its loss. `share` is its part in the mean of the item's errors;
    a usual question has 1."""

    question: Question
    weight: float
    share: float


def item_questions(
    edit_type: str,
    instruction: str,
    object: str = "",
    rubric: str = "",
    wording: str = "plain",
    choice: QuestionChoice = USUAL_QUESTIONS,
    has_other: bool = False,
) -> list[WeightedQuestion]:
    """The questions about one item, without those whose weight is zero.

    `rubric` is the item's column `questions` as JSON, or "". An item without a rubric gets the usual questions.
    `grade: instead` replaces the edit questions. `rubric: instead` replaces all usual questions, the graded one too.
    What replaces other questions has their total weight, times `grade_weight` or `rubric_weight`. What is asked beside
    them has `grade_weight` or `rubric_weight`. An identity edit gets no graded question.

    Raises:
        ValueError: as `questions_for` raises it.
    """
    asked = [
        WeightedQuestion(question, 1.0 if question.kind == "edit" else choice.identity_weight, 1.0)
        for question in questions_for(edit_type, instruction, object, wording, has_other)
        if question.kind == "edit" or choice.identity_weight
    ]
    has_grade = choice.grade != "off" and normalise_edit_type(edit_type) != IDENTITY_EDIT
    grade = [grade_question(instruction, wording)] if has_grade else []
    own = rubric_questions(rubric, wording) if choice.rubric != "off" else []
    if grade and choice.grade == "instead":
        edit = [entry for entry in asked if entry.question.kind == "edit"]
        asked = _replacing(edit, grade, choice.grade_weight) + [entry for entry in asked if entry not in edit]
    if own and choice.rubric == "instead":
        asked = _replacing(asked, own, choice.rubric_weight)
    elif own:
        asked += _sharing(own, choice.rubric_weight, 1.0)
    if grade and choice.grade == "beside":
        asked += _sharing(grade, choice.grade_weight, 1.0)
    return [entry for entry in asked if entry.weight]


def _replacing(old: Sequence[WeightedQuestion], new: Sequence[Question], factor: float) -> list[WeightedQuestion]:
    """The new questions with the total weight and share of the old ones."""
    return _sharing(new, factor * sum(entry.weight for entry in old), sum(entry.share for entry in old))


def _sharing(questions: Sequence[Question], weight: float, share: float) -> list[WeightedQuestion]:
    """The questions, each with an equal part of `weight` and of `share`."""
    return [WeightedQuestion(question, weight / len(questions), share / len(questions)) for question in questions]


def rubric_questions(rubric: str, wording: str = "plain") -> list[Question]:
    """The questions of a rubric, which is JSON as in `Example.questions`; none for "". A question looks at the edited
    image alone, or at the reference and the edited image where its entry says `"images": "both"`."""
    return [
        Question(
            "rubric",
            _with_answer_hint(entry["question"], WORDINGS[wording]["rubric"]),
            LOOKS_AT[entry.get("images", "edited")],
            YES if entry["answer"] == "yes" else NO,
            "rubric",
        )
        for entry in (json.loads(rubric) if rubric else [])
    ]


def _with_answer_hint(question: str, template: str) -> str:
    """The question as the template writes it, with "Answer Yes or No." once."""
    hint = template.format(question="").strip()
    return question if hint and question.rstrip().endswith(hint) else template.format(question=question)


def grade_question(instruction: str, wording: str = "plain") -> Question:
    """The question how far an instruction has been carried out. The wanted answer is the highest grade."""
    text = WORDINGS[wording]["grade"].format(instruction=instruction)
    return Question("grade", text, PAIR, +1, "grade", GRADES)
