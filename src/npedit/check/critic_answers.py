"""The critic's answers to questions about edits whose right answers are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from npedit.check.known_edits import OBJECT_ABSENT, KnownEdit
from npedit.check.subject import Subject
from npedit.critics.base import Critic
from npedit.data import collate
from npedit.generator import items_per_pass
from npedit.item_questions import USUAL_QUESTIONS, QuestionChoice, Use, item_questions
from npedit.questions import IDENTITY_EDIT
from npedit.recipe.config import find_class
from npedit.scoring.critic_scores import CriticScores, score_with_critic

EDIT_KINDS = ("edit", "presence", "returned")  # questions of every recipe that ask whether the edit was carried out


@dataclass(frozen=True)
class Answer:
    """One answer of the critic: `p` of the wanted answer, and whether that answer is the truth."""

    edit: KnownEdit
    kind: str  # "edit", "presence" (the question of a removal), "returned", "identity", "rubric" or "grade"
    p: float
    truth: bool


def ask_critic(critic: Critic, wording: str, edits: Sequence[KnownEdit]) -> list[Answer]:
    """The critic's answers to all questions about these edits whose truth is known."""
    answers = []
    for members in _same_size(edits):
        scores = _score(critic, wording, members)
        for item, kind, name, p in zip(scores.items, scores.kinds, scores.names, scores.p.tolist()):
            truth = _truth(members[item], kind, name)
            reported = name if name in ("presence", "returned") else kind
            answers += [] if truth is None else [Answer(members[item], reported, p, truth)]
    return answers


def _truth(edit: KnownEdit, kind: str, name: str) -> bool | None:
    """Whether the wanted answer to a question is the right one; None if that is not known."""
    if name == "returned":
        return None if edit.returned is None else not edit.returned
    return edit.applied if kind == "edit" else edit.preserved


def ask_own_questions(critic: Critic, wording: str, edits: Sequence[KnownEdit], choice: QuestionChoice) -> list[Answer]:
    """The critic's answers to the rubrics and graded questions of `choice`, about edits of which is known whether they
    were carried out. The p of a rubric is the lowest p of its questions. Whether a copy passes a rubric is known: a
    rubric has to tell an edit from the unedited photo. A photo that only lacks the object is not asked about.

    Raises:
        ValueError: the critic cannot answer with a grade.
    """
    known = [e for e in edits if e.applied is not None and e.probe != OBJECT_ABSENT]
    known = [e for e in known if e.example.edit_type != IDENTITY_EDIT]
    answers = []
    for members in _same_size(known):
        found, lowest = _score(critic, wording, members, choice), dict[tuple[int, str], float]()
        for item, kind, p in zip(found.items, found.kinds, found.p.tolist()):
            if kind in ("rubric", "grade"):
                lowest[item, kind] = min(p, lowest.get((item, kind), 1.0))
        answers += [Answer(members[i], kind, p, bool(members[i].applied)) for (i, kind), p in lowest.items()]
    return answers


def recipe_choice(subject: Subject) -> QuestionChoice | None:
    """The rubrics and grades that the recipe's stages ask, each beside the usual questions; None if no stage does."""
    choices = stage_choices(subject)
    rubric: Use = "beside" if any(c.rubric != "off" for c in choices) else "off"
    grade: Use = "beside" if any(c.grade != "off" for c in choices) else "off"
    return None if rubric == grade == "off" else QuestionChoice(rubric, grade, identity_weight=0)


def stage_choices(subject: Subject) -> list[QuestionChoice]:
    """The questions that each stage asks which needs the critic; the usual ones where the step has no choice."""
    asking = [s for s in subject.recipe.stages if "critic" in find_class("steps", s.step).requirements(s.settings)]
    own = [getattr(stage.settings, "question_choice", None) for stage in asking]
    return [choose() if choose else USUAL_QUESTIONS for choose in own]


def asked_kinds(subject: Subject) -> frozenset[str]:
    """The kinds of questions, as in `Answer.kind`, that training asks about the examples. An edit question stands for
    those of all edit types."""
    wording = subject.parts.wording
    kinds = {
        entry.question.kind
        for choice in stage_choices(subject)
        for e in subject.examples
        for entry in item_questions(e.edit_type, e.instruction, e.object, e.questions, wording, choice)
    }
    return frozenset(kinds | (set(EDIT_KINDS) if "edit" in kinds else set()))


def _same_size(edits: Sequence[KnownEdit]) -> list[list[KnownEdit]]:
    """The edits in groups of one picture size each."""
    groups: dict[tuple[int, ...], list[KnownEdit]] = defaultdict(list)
    for edit in edits:
        groups[tuple(edit.edited.shape)].append(edit)
    return list(groups.values())


def _score(
    critic: Critic, wording: str, members: Sequence[KnownEdit], choice: QuestionChoice = USUAL_QUESTIONS
) -> CriticScores:
    batch, edited = collate([e.example for e in members]), torch.stack([e.edited for e in members])
    return score_with_critic(critic, wording, batch, edited, items_per_pass(*edited.shape[-2:]), choice)
