"""Train the toy's critic on rubrics and grades: `npedit toy build FOLDER --lessons rubric`.

The training begins with the embedded critic. Five unused rows of its vocabulary become the digits 1 to 5. The lessons
mix the questions that a data row carries (`toy/language.py`), the graded question, and the usual questions, which must
not be forgotten. A linear head that is dropped after training predicts what each cell of the edited image holds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from npedit.critics.base import scale_margin
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.item_questions import grade_question
from npedit.questions import GRADES
from npedit.recipe.config import embedded_weights
from npedit.toy.edits import EDIT_TYPES, Edit, sample_edit
from npedit.toy.language import QUESTIONS, answer_question, find_things, questions_about, read_question
from npedit.toy.oracle import expected_reading, find_faults
from npedit.toy.world import BACKGROUNDS, PATTERNS, PLACES, SIDE, SIZES, STYLES, Scene, render, sample_thing
from npedit.toy_models.critic import LABEL_SMOOTHING, PATCH, by_cell, questions_about_edit
from npedit.toy_models.embedded_critic import load_critic, train_on
from npedit.toy_models.mistakes import degrade, sample_outcome

STEPS = 600  # batches; some twenty minutes on one CPU core
EDITS_PER_STEP = 18  # each with two usual questions, two of rubrics and a grade
HALF_DONE_SHARE = 0.2  # share of edits shown half done: a blend of reference and target
GRID = (SIDE // PATCH) ** 2
FALSE_VALUES = {"look": (*PATTERNS, *SIZES), "background": tuple(BACKGROUNDS), "style": tuple(STYLES)}


@dataclass(frozen=True)
class Lesson:
    """A question about an edited image. `pictures` are numbers of images. `truth` in [0, 1] is P(Yes), or how far the
    edit has been carried out. `cells` (4,) says whether each cell of the edited image holds what a rubric's question
    names, or is () where there is nothing to hold."""

    kind: str  # "usual", "grade", or the fact that a rubric's question asks for
    text: str
    pictures: tuple[int, ...]
    truth: float
    cells: tuple[float, ...] = ()


def share_done(edit: Edit, scene: Scene) -> float:
    """How far an edit has been carried out in a scene: the share of the requested facts that it shows, in [0, 1]; 0 for
    the unedited scene."""
    missing, at_first = (find_faults(edit, expected_reading(s))[0] for s in (scene, edit.reference))
    return max(0.0, 1 - len(missing) / len(at_first))


def grade_targets(shares: Tensor) -> Tensor:
    """Probabilities (n, 5) of the grades whose expected score is `shares` (n,): on the two grades next to it."""
    return (1 - (4 * shares[:, None] - torch.arange(5)).abs()).clamp_min(0)


# ------------------------------------------------------------------------------------------------------------ lessons


def sample_lessons(
    rng: random.Random, count: int, held_out: bool = False, half_done_share: float = 0.0
) -> tuple[Tensor, list[Lesson]]:
    """Images (2 * count, 3, 32, 32), references and edited images, and the lessons about them."""
    edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)], held_out) for i in range(count)]
    scenes = [sample_outcome(edit, rng) for edit in edits]
    images = render([edit.reference for edit in edits] + scenes)
    lessons: list[Lesson] = []
    for i, (edit, scene) in enumerate(zip(edits, scenes, strict=True)):
        pair = (i, count + i)
        if rng.random() < half_done_share:
            share = rng.random()
            images[count + i] = torch.lerp(images[i], render([edit.target])[0], share)
            lessons.append(Lesson("grade", grade_question(edit.instruction, "short").text, pair, share))
        else:
            lessons += _lessons_about(edit, scene, pair, rng)
    return images, lessons


def _lessons_about(edit: Edit, scene: Scene, pair: tuple[int, int], rng: random.Random) -> list[Lesson]:
    """The usual questions, the grade, the edit's own rubric, and any other question about the edited scene."""
    lessons = [
        Lesson("usual", text, pair[2 - looks :], float(truth))
        for text, looks, truth in questions_about_edit(edit, scene)
    ]
    lessons.append(Lesson("grade", grade_question(edit.instruction, "short").text, pair, share_done(edit, scene)))
    (own,) = questions_about(edit)
    return lessons + [_rubric_lesson(text, scene, pair[1]) for text in (own["question"], sample_question(scene, rng))]


def sample_question(scene: Scene, rng: random.Random) -> str:
    """A random question of the kinds in `QUESTIONS`. About half of them are true of the scene."""
    fact = rng.choice(tuple(QUESTIONS))
    cell = rng.choice(scene.filled or range(4))
    thing = scene.cells[cell] or sample_thing(rng)
    look = rng.choice((thing.pattern, thing.size))
    value = {"look": look, "background": scene.background, "style": scene.style}.get(fact, "")
    words = {"x": f"{thing.colour} {thing.shape}", "p": PLACES[cell], "v": value}
    if rng.random() < 0.5:
        other = sample_thing(rng)
        changed = {
            "x": f"{rng.choice((thing.colour, other.colour))} {other.shape}",
            "p": rng.choice(PLACES),
            "v": rng.choice(FALSE_VALUES.get(fact, ("",))),
        }
        key = rng.choice([key for key in words if f"{{{key}}}" in QUESTIONS[fact]])
        words[key] = changed[key]
    return QUESTIONS[fact].format(**words)


def _rubric_lesson(question: str, scene: Scene, picture: int) -> Lesson:
    fact, words = read_question(question)
    truth = float(answer_question(scene, question) == "yes")
    things = find_things(scene, f"{words.get('x', '')} {words.get('v', '')}")
    cells = tuple(float(cell in things) for cell in range(4)) if "x" in words else ()
    return Lesson(fact, question, (picture,), truth, cells)


# ----------------------------------------------------------------------------------------------------------- training


def tokenizer_with_digits(old: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The toy's tokenizer in which five of the unused words are the digits 1 to 5; the other words keep their ids."""
    state = json.loads(old.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for number, digit in enumerate(GRADES):
        vocabulary[digit] = vocabulary.pop(f"<spare{number}>")
    state["pre_tokenizer"]["pattern"]["Regex"] = "[^a-z1-5<>]+"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=old.pad_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        additional_special_tokens=["<image>"],
        model_max_length=old.model_max_length,
    )


def train_rubric_critic(
    folder: Path, steps: int = STEPS, seed: int = 0, edits_per_step: int = EDITS_PER_STEP
) -> LlavaOnevision:
    """The embedded critic, trained on for `steps` batches of rubrics, grades and usual questions. `folder` keeps the
    state of an interrupted training."""
    critic = load_critic(embedded_weights("critic"))
    critic.tokenizer = tokenizer_with_digits(critic.tokenizer)
    torch.manual_seed(seed)
    head = nn.Linear(critic.model.config.text_config.hidden_size, 1)
    return train_on(
        "rubric-critic",
        critic,
        head,
        lambda rng: sample_lessons(rng, edits_per_step, False, HALF_DONE_SHARE),
        lambda images, lessons: _lesson_loss(critic, head, images, lessons),
        folder,
        steps,
        seed,
    )


def _lesson_loss(
    critic: LlavaOnevision, head: nn.Linear, images: Tensor, lessons: Sequence[Lesson]
) -> tuple[Tensor, dict[str, float]]:
    """The answers' loss and the cells' loss, and what to show."""
    visual_tokens = critic.encode_images(images)
    looks = [[visual_tokens[k] for k in lesson.pictures] for lesson in lessons]
    states, last = critic.hidden_states([lesson.text for lesson in lessons], looks)
    rows = torch.arange(len(last))
    logits = critic.model.lm_head(states[-1][rows, last])
    answer_loss = -(_answer_targets(critic, lessons) * logits.log_softmax(1)).sum(1).mean()
    held = [r for r, lesson in enumerate(lessons) if lesson.cells]
    positions = last[held][:, None] - 1 - GRID + torch.arange(GRID)  # the tokens before newline and "answer"
    cells = head(by_cell(states[-2][torch.tensor(held)[:, None], positions]))[..., 0]
    labels = torch.tensor([lessons[r].cells for r in held])[:, :, None].expand_as(cells)
    cell_loss = F.binary_cross_entropy_with_logits(cells, labels)
    figures = _right_shares(critic, logits.detach(), lessons) | {"cells": float(cell_loss.detach())}
    return 2 * answer_loss + cell_loss, figures


def _answer_targets(critic: LlavaOnevision, lessons: Sequence[Lesson]) -> Tensor:
    """The wanted probabilities over the vocabulary (n, vocabulary)."""
    truth = torch.tensor([lesson.truth for lesson in lessons])
    targets = torch.zeros(len(lessons), critic.model.config.text_config.vocab_size)
    smoothed = LABEL_SMOOTHING + (1 - 2 * LABEL_SMOOTHING) * truth
    is_graded = torch.tensor([lesson.kind == "grade" for lesson in lessons])
    targets[~is_graded, critic.yes] = smoothed[~is_graded]
    targets[~is_graded, critic.no] = 1 - smoothed[~is_graded]
    graded = is_graded.nonzero()
    targets[graded, torch.tensor(critic.answer_ids(GRADES))] = grade_targets(smoothed[is_graded])
    return targets


def _right_shares(critic: LlavaOnevision, logits: Tensor, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Shares of right answers to the usual questions and to rubrics, and the mean error of grades in [0, 4]."""
    margins = logits[:, critic.yes] - logits[:, critic.no]
    grades = 4 * scale_margin(logits[:, critic.answer_ids(GRADES)]).sigmoid()
    right: dict[str, list[float]] = {"usual": [], "rubric": [], "grade error": []}
    for lesson, margin, grade in zip(lessons, margins.tolist(), grades.tolist(), strict=True):
        if lesson.kind == "grade":
            right["grade error"].append(abs(grade - 4 * lesson.truth))
        else:
            name = "usual" if lesson.kind == "usual" else "rubric"
            right[name].append(float((margin > 0) == (lesson.truth > 0.5)))
    return {name: sum(values) / len(values) for name, values in right.items() if values}


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_rubric_critic(
    critic: LlavaOnevision, vae: AutoencoderKL, count: int, seed: int, damage: bool
) -> dict[str, float]:
    """About `count` held-out edits in held-out phrasings: shares of right answers to the usual questions ("usual") and
    to rubrics, by the fact that is asked for ("rubric/place"); the share of grades that are above 3 exactly where more
    than half of the edit was carried out ("grade"); and the mean error of a grade ("grade error", 0 to 4)."""
    rng, generator = random.Random(f"held-out/rubric-critic/{seed}"), torch.Generator().manual_seed(seed)
    results: dict[str, list[float]] = {}
    for start in range(0, count, 36):
        size = min(36, count - start)
        images, lessons = sample_lessons(rng, size, held_out=True, half_done_share=0.1)
        if damage:
            images[size:] = degrade(images[size:], vae, rng, generator, share=1.0)
        tokens = critic.encode_images(images)
        logits = critic.logits([lesson.text for lesson in lessons], [[tokens[k] for k in x.pictures] for x in lessons])
        scores = scale_margin(logits[:, critic.answer_ids(GRADES)]).sigmoid()
        p_yes = (logits[:, critic.yes] - logits[:, critic.no]).sigmoid()
        for lesson, score, p in zip(lessons, scores.tolist(), p_yes.tolist(), strict=True):
            if lesson.kind == "grade":
                results.setdefault("grade error", []).append(4 * abs(score - lesson.truth))
            name = lesson.kind if lesson.kind in ("usual", "grade") else f"rubric/{lesson.kind}"
            said = score if lesson.kind == "grade" else p
            results.setdefault(name, []).append(float((said > 0.5) == (lesson.truth > 0.5)))
    return {name: sum(values) / len(values) for name, values in sorted(results.items())}
