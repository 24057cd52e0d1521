"""A writer of training rows for the toy world, in place of a vision-language model (`npedit toy writer`).

The writer answers the requests of `npedit prepare`: `look`, `write`, `verify` and `caption`. It reads the scene in the
photo by analysis by synthesis (`oracle.py`), so it knows the right answer, and makes mistakes at chosen rates. The
truth of every row can be checked afterwards (`row_faults`), which no vision-language model allows.

The answer to a request depends on the seed and on the request alone, so answers in any order are the same answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from npedit.toy.edits import EDIT_TYPES, INSTRUCTIONS, Edit, possible_edit_types, sample_caption, sample_edit_of
from npedit.toy.language import (
    VALUES,
    Request,
    answer_question,
    find_things,
    is_target_caption,
    possible_results,
    questions_about,
    read_instruction,
)
from npedit.toy.oracle import expected_reading, matches_caption, read_scene, scene_from_reading
from npedit.toy.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIDE, Scene

MISTAKES = ("wrong object", "wrong caption", "impossible edit")
NEEDS_OBJECT = frozenset(("remove", "replace", "recolour", "pattern", "move", "resize"))
WHOLE = {"background": "background", "style": "photo"}  # what a proposal names as its object where no thing is edited


@dataclass(frozen=True)
class ErrorRates:
    """How often the writer is wrong: the share of proposals with a mistake, the share of answers of the `write` pass
    that are broken JSON, and the share of proposals that the `verify` pass judges wrongly."""

    mistakes: float = 0.0
    broken: float = 0.0
    verifier: float = 0.0


@dataclass(frozen=True)
class Findings:
    """What is true of a proposal and the unedited photo; `answers` has "yes" or "no" for each of its questions."""

    object_present: bool
    edit_possible: bool
    caption_right: bool
    answers: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.object_present and self.edit_possible and self.caption_right


def read_photo(picture: Image.Image) -> Scene:
    """The scene in a picture of 32 x 32 pixels.

    Raises:
        ValueError: the picture has another size, or does not show the toy world.
    """
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"expected a toy picture of {SIDE} x {SIDE} pixels; got {picture.width} x {picture.height}")
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return scene_from_reading(read_scene(pixels[None])[0])


# ------------------------------------------------------------------------------------------------------- the passes


def look(scene: Scene, rng: random.Random) -> dict[str, Any]:
    """The answer of the `look` pass: every thing with its place and attributes, and a caption in the toy's phrasing."""
    things = [(cell, scene.thing(cell)) for cell in scene.filled]
    objects = [
        {"name": f"{t.colour} {t.shape}", "where": PLACES[cell], "attributes": [t.pattern, t.size]}
        for cell, t in things
    ]
    return {"objects": objects, "caption": sample_caption(scene, rng)}


def write(
    scene: Scene, wanted: Sequence[str], rng: random.Random, rates: ErrorRates, source_caption: str = ""
) -> dict[str, Any]:
    """The answer of the `write` pass: a proposal for each wanted edit type that this scene and the toy's language
    allow, with a mistake in a share `rates.mistakes` of them. No right target caption repeats the source caption."""
    possible = possible_edit_types(scene)
    proposals = []
    for edit_type in wanted:
        if edit_type in possible:
            edit = sample_edit_of(scene, rng, edit_type)
            while edit.target_caption == source_caption:
                edit = sample_edit_of(scene, rng, edit_type)
            is_mistake, kind = rng.random() < rates.mistakes, rng.choice(MISTAKES)
            proposals.append(make_mistake(edit, kind, rng) if is_mistake else as_proposal(edit))
    return {"proposals": proposals}


def verify(scene: Scene, proposal: Mapping[str, Any], rng: random.Random, rates: ErrorRates) -> dict[str, Any]:
    """The answer of the `verify` pass; for a share `rates.verifier` of the proposals the verdict is the opposite.

    For an addition, `object_present` says whether the thing is in the photo already.
    """
    found = check_proposal(scene, proposal)
    is_addition = str(proposal.get("edit_type")) == "add"
    if rng.random() < rates.verifier:
        right = not found.is_right
        found = replace(found, object_present=True, edit_possible=True, caption_right=right)
    is_present = bool(find_things(scene, str(proposal.get("object", "")))) if is_addition else found.object_present
    reason = "; ".join(
        words
        for words, fine in (
            ("the object is not in the photo", found.object_present),
            ("the edit is not possible", found.edit_possible),
            ("the caption does not describe the result", found.caption_right),
        )
        if not fine
    )
    return {
        "object_present": is_present,
        "edit_possible": found.edit_possible,
        "caption_right": found.caption_right,
        "answers": list(found.answers),
        "reason": reason or "all is right",
    }


def caption(scene: Scene, asked: Mapping[str, Any], rng: random.Random, rates: ErrorRates) -> dict[str, Any]:
    """The answer of the `caption` pass to an edit type, an instruction and a source caption; with a false caption in a
    share `rates.mistakes`."""
    edit_type, instruction = str(asked.get("edit_type", "")), str(asked.get("instruction", ""))
    request = read_instruction(edit_type, instruction) if edit_type in EDIT_TYPES else None
    targets = possible_results(scene, request) if request else []
    if not request or not targets:
        return {"edit_possible": False, "object": "", "target_caption": "", "questions": []}
    edit = edit_to(scene, rng.choice(targets), request, instruction)
    is_mistake = rng.random() < rates.mistakes
    words = (
        _false_caption(edit, rng) if is_mistake else _true_caption(edit, request, str(asked.get("source_caption")), rng)
    )
    proposal = as_proposal(replace(edit, target_caption=words))
    return {"edit_possible": True, **{name: proposal[name] for name in ("object", "target_caption", "questions")}}


def edit_to(scene: Scene, target: Scene, request: Request, instruction: str) -> Edit:
    """The edit from a scene to one of the results of a request, without captions."""
    is_whole = request.edit_type in WHOLE
    added = [c for c in target.filled if c not in scene.filled]
    cell = -1 if is_whole else added[0] if request.edit_type == "add" else find_things(scene, request.name)[0]
    to_cell = PLACES.index(request.value) if request.edit_type == "move" else -1
    return Edit(request.edit_type, scene, target, cell, to_cell, request.value, instruction, request.name, "", "")


def _true_caption(edit: Edit, request: Request, source_caption: str, rng: random.Random) -> str:
    """A caption of the edit's result that does not repeat the source caption and, where the toy's captions do, states
    what the edit changed."""
    cells = tuple(c for c in edit.changed_cells if c in edit.target.filled and edit.edit_type not in WHOLE)
    facts = {"background": ("background",), "style": ("style",), "pattern": ("pattern",), "resize": ("size",),
             "move": ("place",)}  # fmt: skip
    for _ in range(100):
        made = sample_caption(edit.target, rng, cells, facts.get(edit.edit_type, ()))
        if made != source_caption and is_target_caption(made, edit.reference, request):
            break
    return made


def as_proposal(edit: Edit) -> dict[str, Any]:
    """An edit as a proposal of the `write` pass."""
    return {
        "edit_type": edit.edit_type,
        "instruction": edit.instruction,
        "object": WHOLE.get(edit.edit_type, edit.object),
        "target_caption": edit.target_caption,
        "questions": questions_about(edit),
    }


def check_proposal(scene: Scene, proposal: Mapping[str, Any]) -> Findings:
    """The truth about a proposal for a photo of this scene. For an edit type that needs no object in the photo,
    `object_present` is true."""
    edit_type = str(proposal.get("edit_type", ""))
    request = read_instruction(edit_type, str(proposal.get("instruction", ""))) if edit_type in EDIT_TYPES else None
    questions = [q for q in proposal.get("questions") or () if isinstance(q, Mapping)]
    answers = tuple(answer_question(scene, str(q.get("question", ""))) for q in questions)
    if request is None:
        return Findings(edit_type not in NEEDS_OBJECT, False, False, answers)
    is_present = edit_type not in NEEDS_OBJECT or (
        len(find_things(scene, request.name)) == 1 and str(proposal.get("object", "")) == request.name
    )
    caption = str(proposal.get("target_caption", ""))
    if edit_type in NEEDS_OBJECT and not is_present:
        return Findings(False, False, False, answers)
    possible = bool(possible_results(scene, request))
    return Findings(is_present, possible, is_target_caption(caption, scene, request), answers)


def row_faults(scene: Scene, row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row of training data, words of `MISTAKES` and "wrong source caption"; [] if all is right."""
    found = check_proposal(scene, row)
    faults = [
        fault
        for fault, fine in (
            ("wrong object", found.object_present),
            ("impossible edit", found.edit_possible or not found.object_present),
            ("wrong caption", found.caption_right or not found.edit_possible),
        )
        if not fine
    ]
    caption = str(row.get("source_caption") or "")
    if caption and not matches_caption(caption, expected_reading(scene)):
        faults.append("wrong source caption")
    return faults


# --------------------------------------------------------------------------------------------------------- mistakes


def make_mistake(edit: Edit, kind: str, rng: random.Random) -> dict[str, Any]:
    """The edit as a proposal with one mistake of this kind, or with a wrong caption if its type has no such mistake."""
    proposal = as_proposal(edit)
    if kind == "wrong object" and edit.object and edit.edit_type != "add":
        absent = _absent_name(edit.reference, rng)
        instruction = proposal["instruction"].replace(edit.object, absent)
        return {**proposal, "instruction": instruction, "object": absent}
    if kind == "impossible edit" and (impossible := _impossible_request(edit, rng)):
        caption = sample_caption(edit.reference, rng)
        return {**proposal, "instruction": impossible, "target_caption": caption}
    return {**proposal, "target_caption": _false_caption(edit, rng)}


def _absent_name(scene: Scene, rng: random.Random) -> str:
    """The name of a thing that is not in the scene."""
    names = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    return rng.choice([name for name in names if not find_things(scene, name)])


def _impossible_request(edit: Edit, rng: random.Random) -> str:
    """An instruction that asks for what is so already, or for a place that is taken; "" if there is none."""
    scene = edit.reference
    value, place = edit.value, ""
    if edit.edit_type in ("background", "style"):
        value = getattr(scene, edit.edit_type)
    elif edit.edit_type in ("move", "add"):
        taken = [PLACES[c] for c in scene.filled if c != edit.cell]
        if not taken:
            return ""
        value = place = rng.choice(taken)
    elif edit.edit_type in ("replace", "recolour", "pattern", "resize"):
        now = set(scene.thing(edit.cell).appearance)
        value = next(v for v in VALUES[edit.edit_type] if v in now)
    else:
        return ""
    template = rng.choice(INSTRUCTIONS["add_at" if edit.edit_type == "add" else edit.edit_type][:-2])
    return template.format(x=edit.object, v=value, p=place)


def _false_caption(edit: Edit, rng: random.Random) -> str:
    """A caption in the toy's phrasing that is false of the edit's result."""
    request = read_instruction(edit.edit_type, edit.instruction) or Request(edit.edit_type)
    while True:
        scene = edit.target
        if rng.random() < 0.5:
            caption = sample_caption(edit.reference, rng, edit.reference.filled, ("background",))
        else:
            scene = replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
            caption = sample_caption(scene, rng, (), ("background",))
        if not is_target_caption(caption, edit.reference, request):
            return caption
