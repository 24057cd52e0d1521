"""What the critic says of an edit: was the instruction carried out, and is the rest unchanged?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from npedit.critics.base import Critic
from npedit.data import Example, collate
from npedit.data._photos import nearest_size, resize, to_tensor
from npedit.errors import UserError
from npedit.interop.edit_words import read_removed_object
from npedit.item_questions import QuestionChoice
from npedit.nets.device import pick_device
from npedit.questions import OTHER, SCENE
from npedit.recipe.config import EMBEDDED, CriticChoice, Recipe, find_class, load_recipe, torch_dtype
from npedit.recipe.packaged import recipe_path
from npedit.runs.editor_weights import read_recipe
from npedit.runs.resolve import resolve_editor
from npedit.scoring.critic_scores import score_with_critic

Size = tuple[int, int]  # (height, width) in pixels
UNNAMED_SUBJECT = "the subject"  # no question that names it is asked


@dataclass(frozen=True)
class Verdict:
    """The critic's probability that the instruction was carried out, and that the rest is unchanged; None for a scene,
    in which the rest is free."""

    done: float
    rest_kept: float | None

    def __str__(self) -> str:
        kept = "" if self.rest_kept is None else f", rest kept {self.rest_kept:.0%}"
        return f"done {self.done:.0%}{kept}"


class CriticQueue:
    """A critic that many threads may ask, one after the other. `open_critic` is called at the first question. With
    `is_about_scenes` all edits are scenes (`questions.py`): a photo's subject somewhere else."""

    def __init__(self, open_critic: Callable[[], Critic], wording: str, is_about_scenes: bool = False) -> None:
        self.wording, self.is_about_scenes = wording, is_about_scenes
        self._open_critic = open_critic
        self._critic: Critic | None = None
        self._lock = threading.Lock()

    def ask(
        self, before: Image.Image, edited: Sequence[Image.Image], instruction: str, sizes: Sequence[Size]
    ) -> list[Verdict]:
        """A verdict on each edited picture. The pictures are scaled to the editor's size (among `sizes`), at which the
        critic saw them in training."""
        size = nearest_size((before.height, before.width), sizes)
        reference, after = (torch.stack([to_tensor(resize(im, size)) for im in ims]) for ims in ([before], edited))
        example = _make_example(reference[0], instruction, self.is_about_scenes)
        with self._lock:
            if self._critic is None:
                self._critic = self._open_critic()
            return _verdicts(self._critic, self.wording, [example] * len(edited), after)


def _make_example(reference: Tensor, instruction: str, is_scene: bool) -> Example:
    """The edit that the critic is asked about. A removal is asked about in its own words, where the instruction names
    plainly what is removed; all other edits but scenes have the edit type `other`."""
    if is_scene:
        return Example("", reference, instruction, SCENE, UNNAMED_SUBJECT, "", "")
    removed = read_removed_object(instruction)
    return Example("", reference, instruction, "remove" if removed else OTHER, removed, "", "")


def _verdicts(critic: Critic, wording: str, examples: Sequence[Example], edited: Tensor) -> list[Verdict]:
    asks_identity = all(example.edit_type != SCENE for example in examples)
    choice = QuestionChoice(identity_weight=float(asks_identity))
    scores = score_with_critic(critic, wording, collate(examples), edited, choice=choice)
    p: dict[tuple[int, str], float] = {}
    for item, kind, value in zip(scores.items, scores.kinds, scores.p.tolist(), strict=True):
        p[item, kind] = min(value, p.get((item, kind), 1.0))  # all questions of a kind must be answered as wanted
    return [Verdict(p[i, "edit"], p.get((i, "identity"))) for i in range(len(examples))]


def find_recipe(name: str) -> Recipe | None:
    """The recipe that an editor was trained with; None for an editor without a run, or whose recipe cannot be read."""
    try:
        return load_recipe(recipe_path("toy")) if name == EMBEDDED else read_recipe(resolve_editor(name))
    except UserError:
        return None


def find_critic(name: str, recipe: Recipe | None, is_asked_for: bool) -> CriticQueue | None:
    """The critic of an editor's recipe, not opened yet: the critic in the package, or any other if it is asked for.

    Raises:
        UserError: a critic is asked for, and the editor has no recipe, or its recipe no critic.
    """
    chosen = recipe.critic if recipe else None
    if chosen and (is_asked_for or chosen.weights == EMBEDDED):
        return CriticQueue(lambda: _open_critic(chosen), chosen.wording, recipe is not None and trains_scenes(recipe))
    if is_asked_for:
        raise UserError(f"--critic: expected an editor whose run has a critic in its recipe; got {name}; leave it out")
    return None


def trains_scenes(recipe: Recipe) -> bool:
    """Whether scenes are the only edits that a recipe trains."""
    settings: Any = recipe.data.settings
    types = tuple(getattr(settings, "edit_types", ()))
    return types == (SCENE,) or dict(getattr(settings, "shares", {})).get(SCENE) == 1


def _open_critic(chosen: CriticChoice) -> Critic:
    kind, device = find_class("critics", chosen.name), pick_device()
    return kind.load(chosen.folder(), torch_dtype(chosen.dtype), device, chosen.resolution, chosen.bits)
