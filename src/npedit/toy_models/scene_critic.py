"""Train the toy's critic on scene edits (free-form customisation): `npedit toy build FOLDER --lessons scene`.

The training begins with the embedded critic, and no word is added to its vocabulary. As in `critic.py`, linear heads
that are dropped after training predict facts of the toy world, so that the model looks at the images from the start.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.questions import Question, questions_for
from npedit.recipe.config import embedded_weights
from npedit.toy.oracle import Reading, companion_cells, expected_reading, is_subject_kept
from npedit.toy.scene_edits import SCENE, SceneEdit, sample_photos, sample_scene_edit
from npedit.toy.world import BACKGROUNDS, PATTERNS, PLACES, SIDE, SIZES, STYLES, Scene, render
from npedit.toy_models.critic import LABEL_SMOOTHING, PATCH, by_cell
from npedit.toy_models.embedded_critic import load_critic, train_on
from npedit.toy_models.mistakes import degrade, sample_scene_outcome

STEPS = 2000  # batches; some twenty minutes on one CPU core
EDITS_PER_STEP = 28
SHARES = {"scene": 1.0, "subject": 0.5, "returned": 0.15}  # of edits that get a question: the first is learnt slowest
HALF_DONE_SHARE = 0.1  # share of edits shown half done: a blend of reference and target, P(scene is there) is the share
GRID = (SIDE // PATCH) ** 2
CELL_FACTS = 3  # a cell holds the subject by name, by its whole look, or the other thing
ASKED = (("", *BACKGROUNDS), ("", *STYLES), ("", *PLACES), PATTERNS, tuple(SIZES))
MISSING = ("background", "style", "place", "companion", "subject", "pattern", "size", "repeated")
NO_LABELS = (-1.0,) * len(MISSING)


@dataclass(frozen=True)
class Lesson:
    """A question about an edited scene. `pictures` are numbers of images, `truth` is P(Yes), `cells` (4, CELL_FACTS) is
    what each cell of the last image holds, `asked` are class numbers in `ASKED`, `missing` is 0 or 1 for each of
    `MISSING`. A label that the question's images cannot tell is -1."""

    question: Question
    pictures: tuple[int, ...]
    truth: float
    cells: tuple[tuple[float, ...], ...]
    asked: tuple[int, ...]
    missing: tuple[float, ...]


# ------------------------------------------------------------------------------------------------------------- truths


def true_answers(edit: SceneEdit, scene: Scene) -> dict[str, bool]:
    """Whether Yes is right, by the name of the question, if the edited image shows `scene`."""
    return {
        "scene": not _missing_by_name(edit, scene),
        "subject": is_subject_kept(edit, expected_reading(scene)),
        "returned": is_returned(edit, scene),
    }


def is_returned(edit: SceneEdit, scene: Scene) -> bool:
    """Whether the scene is the reference's, unchanged or with one change: a cell, the background or the style. A right
    scene has at least two, because the instruction asks for at least two facts."""
    before, after = expected_reading(edit.reference), expected_reading(scene)
    changes = sum(a != b for a, b in zip(before.cells, after.cells, strict=True))
    return changes + (before.background != after.background) + (before.style != after.style) <= 1


def _named_cells(edit: SceneEdit, reading: Reading) -> list[int]:
    """The cells of things that the subject's name fits: the scene question is asked without the reference."""
    words = set(edit.object.split()) - {"shape"}
    return [i for i, look in enumerate(reading.cells) if isinstance(look, tuple) and words <= set(look)]


def _missing_by_name(edit: SceneEdit, scene: Scene) -> set[str]:
    """What the instruction asks for and the scene does not show: of `MISSING`, the first five."""
    reading = expected_reading(scene)
    named = _named_cells(edit, reading)
    is_shown = {
        "background": scene.background == edit.target.background,
        "style": scene.style == edit.target.style,
        "place": edit.to_cell in named,
        "companion": bool(companion_cells(edit, reading)),
    }
    return {fact for fact in edit.asked if not is_shown[fact]} | (set() if named else {"subject"})


# ------------------------------------------------------------------------------------------------------------ lessons


def make_lessons(edit: SceneEdit, scene: Scene, reference: int, edited: int, other: int | None) -> list[Lesson]:
    """The questions about one edit, with their labels. `reference`, `edited` and `other` are the numbers of the images
    of the reference, of `scene`, and of another photo of the subject."""
    pictures = {"reference": reference, "edited": edited, "other": reference if other is None else other}
    truths = true_answers(edit, scene)
    lessons = []
    for question in questions_for(SCENE, edit.instruction, edit.object, "short", has_other=other is not None):
        looks_at = tuple(pictures[name] for name in question.looks_at)
        labels = _labels(question.name, edit, scene)
        lessons.append(Lesson(question, looks_at, float(truths[question.name]), *labels))
    return lessons


def _labels(name: str, edit: SceneEdit, scene: Scene) -> tuple[tuple, tuple[int, ...], tuple[float, ...]]:
    """The labels `cells`, `asked` and `missing` of a lesson."""
    cells = _cell_labels(name, edit, scene)
    if name == "scene":
        missing = _missing_by_name(edit, scene)
        target = edit.target
        values = {"background": target.background, "style": target.style, "place": PLACES[edit.to_cell]}
        asked = [
            ASKED[k].index(values[f] if f in edit.asked else "") for k, f in enumerate(("background", "style", "place"))
        ]
        return cells, (*asked, -1, -1), (*(float(m in missing) for m in MISSING[:5]), -1.0, -1.0, -1.0)
    if name == "subject":
        subject = edit.subject
        asked = [PATTERNS.index(subject.pattern), tuple(SIZES).index(subject.size)]
        return cells, (-1, -1, -1, *asked), (-1.0,) * 4 + _missing_of_subject(edit, scene)
    return cells, (-1,) * 5, NO_LABELS


def _missing_of_subject(edit: SceneEdit, scene: Scene) -> tuple[float, float, float, float]:
    """Whether no thing has the subject's colour and shape; else whether none of these has its pattern, its size, and
    whether there are several."""
    subject = edit.subject
    alike = [t for t in scene.cells if t and (t.shape, t.colour) == (subject.shape, subject.colour)]
    if not alike:
        return 1.0, -1.0, -1.0, -1.0
    return (
        0.0,
        float(all(t.pattern != subject.pattern for t in alike)),
        float(all(t.size != subject.size for t in alike)),
        float(len(alike) > 1),
    )


def _cell_labels(name: str, edit: SceneEdit, scene: Scene) -> tuple[tuple[float, ...], ...]:
    reading = expected_reading(scene)
    named, companions = _named_cells(edit, reading), companion_cells(edit, reading)
    rows: list[tuple[float, ...]] = []
    for i, look in enumerate(reading.cells):
        if name == "scene":
            rows.append((float(i in named), -1.0, float(i in companions)))
        elif name == "subject":
            is_alike = isinstance(look, tuple) and look[:2] == edit.subject.appearance[:2]
            rows.append((float(is_alike), float(look == edit.subject.appearance), -1.0))
        else:
            rows.append((-1.0,) * CELL_FACTS)
    return tuple(rows)


def sample_lessons(
    rng: random.Random,
    count: int,
    held_out: bool = False,
    half_done_share: float = 0.0,
    shares: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Tensor, list[Lesson]]:
    """Images (3 * count, 3, 32, 32): references, edited images, other photos of the subjects; and the lessons about
    them. `shares` are those of the edits that get a question, by its name; without a share, all do."""
    photos = [sample_photos(rng, 2) for _ in range(count)]
    edits = [sample_scene_edit(rng, held_out, p) for p in photos]
    scenes = [sample_scene_outcome(e, rng) for e in edits]
    images = render([e.reference for e in edits] + scenes + [p[1][0] for p in photos])
    lessons: list[Lesson] = []
    for i, (edit, scene) in enumerate(zip(edits, scenes)):
        if rng.random() < half_done_share:
            share = rng.random()
            images[count + i] = torch.lerp(images[i], render([edit.target])[0], share)
            (first, *_) = make_lessons(edit, edit.target, i, count + i, None)
            lessons.append(
                Lesson(first.question, first.pictures, share, ((-1.0,) * CELL_FACTS,) * 4, first.asked, NO_LABELS)
            )
            continue
        other = 2 * count + i if rng.random() < 0.5 else None
        asked = make_lessons(edit, scene, i, count + i, other)
        lessons += [lesson for lesson in asked if rng.random() < shares.get(lesson.question.name, 1.0)]
    return images, lessons


# ----------------------------------------------------------------------------------------------------------- training


class _Heads(nn.Module):
    """The auxiliary heads, which are dropped after training."""

    def __init__(self, width: int):
        super().__init__()
        self.cell = nn.Linear(width, CELL_FACTS)
        self.answer = nn.Linear(width, len(MISSING) + sum(map(len, ASKED)))

    def cell_loss(self, states: Tensor, lessons: Sequence[Lesson]) -> Tensor:
        """Loss of what each cell holds, from the states (n, 4 cells, 4 patches, width) of the last image."""
        labels = torch.tensor([lesson.cells for lesson in lessons])[:, :, None]
        return _masked_bce(self.cell(states), labels.expand(-1, -1, states.shape[2], -1))

    def answer_loss(self, states: Tensor, lessons: Sequence[Lesson]) -> Tensor:
        """Loss of what was asked for and what is missing, from the states (n, width) at the answer position."""
        missing, *asked = self.answer(states).split([len(MISSING), *map(len, ASKED)], 1)
        labels = torch.tensor([lesson.asked for lesson in lessons])
        losses = [_masked_cross_entropy(logits, labels[:, k]) for k, logits in enumerate(asked)]
        return _masked_bce(missing, torch.tensor([lesson.missing for lesson in lessons])) + torch.stack(losses).mean()


def _masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are not -1; 0 if there are none."""
    known = int((labels >= 0).sum())
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / max(1, known)


def _masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over the labels that are not -1."""
    known = labels >= 0
    return F.binary_cross_entropy_with_logits(logits[known], labels[known])


def train_scene_critic(
    folder: Path, steps: int = STEPS, seed: int = 0, edits_per_step: int = EDITS_PER_STEP
) -> LlavaOnevision:
    """The embedded critic, trained on for `steps` batches of scene edits. `folder` keeps the state of an interrupted
    training."""
    critic = load_critic(embedded_weights("critic"))
    torch.manual_seed(seed)
    heads = _Heads(critic.model.config.text_config.hidden_size)
    return train_on(
        "scene-critic",
        critic,
        heads,
        lambda rng: sample_lessons(rng, edits_per_step, False, HALF_DONE_SHARE, SHARES),
        lambda images, lessons: _lesson_loss(critic, heads, images, lessons),
        folder,
        steps,
        seed,
    )


def _lesson_loss(
    critic: LlavaOnevision, heads: _Heads, images: Tensor, lessons: Sequence[Lesson]
) -> tuple[Tensor, dict[str, float]]:
    visual_tokens = critic.encode_images(images)
    looks = [[visual_tokens[k] for k in lesson.pictures] for lesson in lessons]
    states, last = critic.hidden_states([lesson.question.text for lesson in lessons], looks)
    rows = torch.arange(len(last))
    logits = critic.model.lm_head(states[-1][rows, last])
    truth = torch.tensor([lesson.truth for lesson in lessons])
    smoothed, log_p = LABEL_SMOOTHING + (1 - 2 * LABEL_SMOOTHING) * truth, logits.log_softmax(1)
    answer_loss = -(smoothed * log_p[:, critic.yes] + (1 - smoothed) * log_p[:, critic.no]).mean()
    positions = last[:, None] - 1 - GRID + torch.arange(GRID)  # the last image's tokens, before newline and "answer"
    cell_loss = heads.cell_loss(by_cell(states[-2][rows[:, None], positions]), lessons)
    fact_loss = heads.answer_loss(states[-2][rows, last], lessons)
    right = ((logits[:, critic.yes] > logits[:, critic.no]) == (truth > 0.5)).float()
    figures = {
        name: float(right[[i for i, lesson in enumerate(lessons) if lesson.question.name == name]].mean())
        for name in ("scene", "subject", "returned")
    }
    figures |= {"cells": float(cell_loss.detach()), "facts": float(fact_loss.detach())}
    return 2 * answer_loss + 2 * cell_loss + fact_loss, figures


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_scene_critic(
    critic: LlavaOnevision, vae: AutoencoderKL, count: int, seed: int, damage: bool
) -> dict[str, float]:
    """Share of right answers about `count` held-out scene edits in held-out phrasings, by question; "subject/other" is
    asked with another photo of the subject."""
    rng, generator = random.Random(f"held-out/scene-critic/{seed}"), torch.Generator().manual_seed(seed)
    results: dict[str, list[bool]] = {}
    for start in range(0, count, 36):
        size = min(36, count - start)
        images, lessons = sample_lessons(rng, size, held_out=True)
        if damage:
            images[size : 2 * size] = degrade(images[size : 2 * size], vae, rng, generator, share=1.0)
        visual_tokens = critic.encode_images(images)
        looks = [[visual_tokens[k] for k in lesson.pictures] for lesson in lessons]
        is_yes = critic.margin([lesson.question.text for lesson in lessons], looks) > 0
        for lesson, answer in zip(lessons, is_yes.tolist()):
            name = lesson.question.name + ("/other" if "other" in lesson.question.looks_at else "")
            results.setdefault(name, []).append(answer == (lesson.truth > 0.5))
    return {name: sum(right) / len(right) for name, right in sorted(results.items())}
