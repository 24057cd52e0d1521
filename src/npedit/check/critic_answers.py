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
from npedit.item_questions import USUAL_QUESTIONS, QuestionChoice, Use
from npedit.questions import IDENTITY_EDIT
from npedit.scoring.critic_scores import CriticScores, score_with_critic


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
    stages = [stage.settings for stage in subject.recipe.stages]
    rubric: Use = "beside" if any(getattr(s, "rubric", "off") != "off" for s in stages) else "off"
    grade: Use = "beside" if any(getattr(s, "grade", "off") != "off" for s in stages) else "off"
    return None if rubric == grade == "off" else QuestionChoice(rubric, grade, identity_weight=0)


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
