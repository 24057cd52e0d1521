"""The toy's language, understood: what an instruction asks for, which scenes it may lead to, what a question asks.

Everything is decided by the templates of `edits.py` and by the facts of a scene; no neural network is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from npedit.toy.edits import INSTRUCTIONS, Edit
from npedit.toy.oracle import expected_reading, matches_caption
from npedit.toy.world import BACKGROUNDS, COLOURS, PATTERNS, PLACES, SHAPES, SIZES, STYLES, Scene, Thing

VALUES: dict[str, tuple[str, ...]] = {  # edit type -> the words that its instruction may ask for
    "replace": SHAPES,
    "recolour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
    "move": PLACES,
    "resize": tuple(SIZES),
    "style": tuple(STYLES),
}
THING_WORDS = frozenset((*SHAPES, *COLOURS, *PATTERNS, *SIZES, "shape"))
QUESTIONS = {  # the questions about an edited picture, by the fact that they ask for
    "presence": "is there a {x} ?",
    "place": "is the {x} at the {p} ?",
    "look": "is the {x} {v} ?",
    "background": "is the background {v} ?",
    "style": "is it {v} ?",
}


@dataclass(frozen=True)
class Request:
    """What an instruction asks for: the thing's name, the new value and the place; "" where it names none."""

    edit_type: str
    name: str = ""
    value: str = ""
    place: str = ""


# ---------------------------------------------------------------------------------------------------------- reading


@lru_cache(maxsize=64)
def _patterns(edit_type: str) -> tuple[re.Pattern[str], ...]:
    """A regular expression of each instruction template of an edit type."""
    templates = [t for key in (edit_type, f"{edit_type}_at") for t in INSTRUCTIONS.get(key, ())]
    groups = {
        "x": "(?P<x>[a-z ]+)",
        "v": f"(?P<v>{'|'.join(VALUES.get(edit_type, ()))})",
        "p": f"(?P<p>{'|'.join(PLACES)})",
    }
    return tuple(
        re.compile("".join(groups.get(part, re.escape(part)) for part in re.split(r"\{(\w)\}", template)))
        for template in templates
    )


def read_instruction(edit_type: str, instruction: str) -> Request | None:
    """What an instruction of this edit type asks for; None if it is not an instruction of that type."""
    for pattern in _patterns(edit_type):
        if found := pattern.fullmatch(instruction.strip().lower()):
            parts = found.groupdict()
            name = parts.get("x") or ""
            if set(name.split()) <= THING_WORDS:
                return Request(edit_type, name, parts.get("v") or "", parts.get("p") or "")
    return None


def find_things(scene: Scene, name: str) -> list[int]:
    """The cells whose thing has every word of the name, such as "striped red circle" or "red shape"."""
    words = set(name.lower().split()) - {"a", "the", "shape"}
    return [c for c in scene.filled if words and words <= set(scene.thing(c).appearance)]


# ------------------------------------------------------------------------------------------------------------ edits


def possible_results(scene: Scene, request: Request) -> list[Scene]:
    """The scenes that the request may lead to, several for an added thing whose cell or size is free. The list is empty
    if the edit is impossible: the thing is absent or ambiguous, the place is taken, or nothing would change."""
    if request.edit_type == "add":
        return _possible_additions(scene, request)
    if request.edit_type in ("background", "style"):
        is_style = request.edit_type == "style"
        target = replace(scene, style=request.value) if is_style else replace(scene, background=request.value)
        return [target] if target != scene else []
    cells = find_things(scene, request.name)
    if len(cells) != 1:
        return []
    cell, thing = cells[0], scene.thing(cells[0])
    if request.edit_type == "remove":
        return [scene.with_cell(cell, None)]
    if request.edit_type == "move":
        to_cell = PLACES.index(request.value)
        return [scene.with_cell(cell, None).with_cell(to_cell, thing)] if to_cell in scene.empty else []
    changed = {
        "replace": replace(thing, shape=request.value),
        "recolour": replace(thing, colour=request.value),
        "pattern": replace(thing, pattern=request.value),
        "resize": replace(thing, size=request.value),
    }[request.edit_type]
    return [scene.with_cell(cell, changed)] if changed != thing else []


def _possible_additions(scene: Scene, request: Request) -> list[Scene]:
    words = set(request.name.split())
    shapes, colours = words & set(SHAPES), words & set(COLOURS)
    if len(shapes) != 1 or len(colours) != 1:
        return []
    pattern = next(iter(words & set(PATTERNS)), "solid")
    cells = [c for c in scene.empty if request.place in ("", PLACES[c])]
    sizes = words & set(SIZES) or set(SIZES)
    return [
        scene.with_cell(cell, make_thing(shapes.copy().pop(), colours.copy().pop(), pattern, size))
        for cell in cells
        for size in sorted(sizes)
    ]


def make_thing(shape: str, colour: str, pattern: str, size: str) -> Thing:
    """A thing of this appearance, of a middle radius, in the middle of its cell."""
    return Thing(shape, colour, pattern, size, sum(SIZES[size]) / 2, 0.0, 0.0)


def states_result(request: Request) -> bool:
    """Whether the toy's own target captions always state the result of such an edit."""
    if request.edit_type in ("add", "replace", "recolour", "background"):
        return True
    return (request.edit_type, request.value) in {("pattern", "striped"), ("pattern", "dotted")} or (
        request.edit_type == "style" and request.value != "day"
    )


def is_target_caption(caption: str, scene: Scene, request: Request) -> bool:
    """Whether a caption is true of a result of the request, and tells of the edit where the toy's own captions do."""
    if not any(matches_caption(caption, expected_reading(target)) for target in possible_results(scene, request)):
        return False
    return not (states_result(request) and matches_caption(caption, expected_reading(scene)))


# -------------------------------------------------------------------------------------------------------- questions


def questions_about(edit: Edit) -> list[dict[str, str]]:
    """One question about the result of an edit, with the wanted answer: {"question", "answer": "yes" or "no"}."""
    if edit.edit_type == "add":
        asked = QUESTIONS["presence"].format(x=edit.object), "yes"
    elif edit.edit_type == "remove":
        asked = QUESTIONS["presence"].format(x=edit.object), "no"
    elif edit.edit_type in ("background", "style"):
        asked = QUESTIONS[edit.edit_type].format(v=edit.value), "yes"
    else:
        before, after = (s.thing(c) for s, c in ((edit.reference, edit.cell), (edit.target, _cell_after(edit))))
        name = f"{before.colour} {before.shape}"
        asked = {
            "move": (QUESTIONS["place"].format(x=name, p=edit.value), "yes"),
            "pattern": (QUESTIONS["look"].format(x=name, v=edit.value), "yes"),
            "resize": (QUESTIONS["look"].format(x=name, v=edit.value), "yes"),
        }.get(edit.edit_type, (QUESTIONS["presence"].format(x=f"{after.colour} {after.shape}"), "yes"))
    return [{"question": asked[0], "answer": asked[1]}]


def _cell_after(edit: Edit) -> int:
    return edit.to_cell if edit.edit_type == "move" else edit.cell


@lru_cache(maxsize=1)
def _question_patterns() -> dict[str, re.Pattern[str]]:
    groups = {"x": "(?P<x>[a-z ]+)", "v": "(?P<v>[a-z]+)", "p": f"(?P<p>{'|'.join(PLACES)})"}
    return {
        fact: re.compile("".join(groups.get(part, re.escape(part)) for part in re.split(r"\{(\w)\}", template)))
        for fact, template in QUESTIONS.items()
    }


def read_question(question: str) -> tuple[str, dict[str, str]]:
    """The fact that a question of `QUESTIONS` asks for, and its words by placeholder; ("", {}) for another question."""
    for fact, pattern in _question_patterns().items():
        found = pattern.fullmatch(question.strip().lower())
        parts = found.groupdict() if found else {}
        if found and set(parts.get("x", "").split()) <= THING_WORDS:
            return fact, parts
    return "", {}


def answer_question(scene: Scene, question: str) -> str:
    """ "yes" or "no" to a question of `QUESTIONS`; "no" to one that cannot be understood."""
    fact, parts = read_question(question)
    if fact in ("", "background", "style"):
        return "yes" if fact and getattr(scene, fact) == parts["v"] else "no"
    cells = find_things(scene, f"{parts['x']} {parts.get('v', '')}")
    return "yes" if any(parts.get("p") in (None, PLACES[c]) for c in cells) else "no"
