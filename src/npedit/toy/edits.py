"""Edits of the toy world and its language: instructions in many phrasings, captions that leave things out.

Captions leave out what real captions leave out: nearly always the places and sizes of things, often patterns, and
sometimes a thing or the background. So a caption alone does not determine an edit, and the critic is needed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from npedit.toy.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    sample_scene,
    sample_thing,
)  # fmt: skip

EDIT_TYPES = ("add", "remove", "replace", "recolour", "pattern", "background", "move", "resize", "style")


@dataclass(frozen=True)
class Edit:
    """One edit of one scene. `cell` is the thing's cell (-1: none), `to_cell` where it goes (-1: any empty cell, or
    none)."""

    edit_type: str
    reference: Scene
    target: Scene
    cell: int
    to_cell: int
    value: str  # the new shape, colour, pattern, size, background or style; "" if the edit has none
    instruction: str
    object: str  # the thing as the instruction calls it, with its article left out
    source_caption: str
    target_caption: str

    @property
    def changed_cells(self) -> tuple[int, ...]:
        """Cells that the edit may change; all four for background and style."""
        if self.edit_type in ("background", "style"):
            return 0, 1, 2, 3
        return tuple(i for i in range(4) if self.reference.cells[i] != self.target.cells[i])


def possible_names(scene: Scene, cell: int) -> list[str]:
    """The names of a thing in an instruction, each with enough words to distinguish it from the others in the scene.
    The likelier ones stand there twice."""
    thing = scene.thing(cell)
    others = [scene.thing(i) for i in scene.filled if i != cell]
    names = [f"{thing.colour} {thing.shape}"] * 2
    if all(o.shape != thing.shape for o in others):
        names.append(thing.shape)
    if all(o.colour != thing.colour for o in others):
        names.append(f"{thing.colour} shape")
    if thing.pattern != "solid":
        names.append(f"{thing.pattern} {thing.colour} {thing.shape}")
    return names


# --------------------------------------------------------------------------------------------------------- language

# The last two of each list are held out of training. They use only words that the others use.
INSTRUCTIONS = {
    "add": ("add a {x}", "put a {x} in the picture", "draw a {x}", "insert a {x}", "place a {x} in the scene",
            "put a {x} in the scene", "add a {x} to the picture"),
    "add_at": ("add a {x} at the {p}", "put a {x} at the {p}", "draw a {x} in the {p}", "insert a {x} at the {p}",
               "put a {x} in the {p}", "draw a {x} at the {p}"),
    "remove": ("remove the {x}", "delete the {x}", "erase the {x}", "take the {x} away", "get rid of the {x}",
               "away with the {x}", "rid the scene of the {x}", "delete the {x} in the scene",
               "erase the {x} in the picture",
               "take away the {x}", "remove the {x} in the picture"),
    "replace": ("replace the {x} with a {v}", "turn the {x} into a {v}", "swap the {x} for a {v}",
                "change the shape of the {x} to a {v}", "make the {x} a {v}",
                "change the {x} into a {v}", "turn the shape of the {x} into a {v}"),
    "recolour": ("paint the {x} {v}", "make the {x} {v}", "turn the {x} {v}", "change the colour of the {x} to {v}",
                 "recolour the {x} to {v}", "change the {x} to {v}", "make the colour of the {x} {v}"),
    "pattern": ("make the {x} {v}", "give the {x} a {v} pattern", "turn the {x} {v}",
                "change the pattern of the {x} to {v}", "put a {v} pattern on the {x}",
                "change the {x} to {v}", "make the pattern of the {x} {v}"),
    "background": ("make the background {v}", "change the background to {v}", "paint the background {v}",
                   "turn the background {v}", "replace the background with {v}",
                   "change the colour of the background to {v}", "make the colour of the background {v}"),
    "move": ("move the {x} to the {v}", "put the {x} at the {v}", "shift the {x} to the {v}",
             "place the {x} in the {v}", "move the {x} into the {v}",
             "put the {x} in the {v}", "place the {x} at the {v}"),
    "resize": ("make the {x} {v}", "change the size of the {x} to {v}", "resize the {x} to {v}", "turn the {x} {v}",
               "change the {x} to {v}", "make the size of the {x} {v}"),
    "style": ("make it {v}", "change the scene to {v}", "turn the picture into {v}", "make the scene {v}",
              "change the picture to {v}", "turn the scene into {v}"),
}  # fmt: skip
HELD_OUT = 2
# Captions: how the things, a list of things, the background and the styles are described. The last of each is held out.
CAPTIONS = {
    "all": ("{x}", "there is {x}", "a picture of {x}", "the scene shows {x}", "the picture shows {x}"),
    "joined": (" and ", " with ", " and there is "),
    "ground": ("on a {b} background", "in front of a {b} background", "on {b}", "in front of {b}"),
    "night": ("at night", "in the dark", "in the night"),
    "fog": ("in fog", "in the mist", "in the fog"),
}
CAPTION_WORDS = 23  # no caption is longer


def sample_instruction(edit_type: str, name: str, value: str, place: str, rng: random.Random, held_out: bool) -> str:
    """An instruction from the training templates, or (`held_out`) from those kept out of training."""
    templates = INSTRUCTIONS["add_at" if edit_type == "add" and place else edit_type]
    chosen = rng.choice(templates[-HELD_OUT:] if held_out else templates[:-HELD_OUT])
    return chosen.format(x=name, v=value, p=place)


def sample_full_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that describes every thing with its place, as a dense captioner would, and sometimes with pattern and
    size. With three things, some places may be left out."""
    return sample_caption(scene, rng, scene.filled, ("place",))


def sample_caption(
    scene: Scene,
    rng: random.Random,
    always_describe: tuple[int, ...] = (),
    always_state: tuple[str, ...] = (),
    held_out: bool = False,
) -> str:
    """A caption that leaves things out at random. The things in the cells `always_describe` are always described. The
    facts `always_state` ("background", "style", "pattern", "size", "place") are always stated; the last three concern
    the cells in `always_describe`. `held_out` takes the phrasings that are kept out of training."""
    described = [c for c in scene.filled if c in always_describe or rng.random() < 0.85] or [rng.choice(scene.filled)]
    rng.shuffle(described)
    for attempt in range(1000):
        required_facts = tuple(f for f in always_state if attempt < 8 or f != "place" or len(always_describe) == 1)
        caption = _compose_caption(scene, rng, described, always_describe, required_facts, held_out)
        if len(caption.split()) <= CAPTION_WORDS:
            return caption
    raise AssertionError(f"no caption of {scene} is short enough")


def _compose_caption(
    scene: Scene,
    rng: random.Random,
    described: list[int],
    always_describe: tuple[int, ...],
    always_state: tuple[str, ...],
    held_out: bool,
) -> str:
    def fill_template(part: str, **values: str) -> str:
        templates = CAPTIONS[part]
        return (templates[-1] if held_out else rng.choice(templates[:-1])).format(**values)

    phrases = []
    for cell in described:
        thing, is_required = scene.thing(cell), cell in always_describe
        adjectives = []
        if (is_required and "size" in always_state) or rng.random() < 0.1:
            adjectives.append(thing.size)
        if thing.pattern != "solid" and ((is_required and "pattern" in always_state) or rng.random() < 0.5):
            adjectives.append(thing.pattern)
        phrase = " ".join(["a", *adjectives, thing.colour, thing.shape])
        if (is_required and "place" in always_state) or rng.random() < 0.1:
            phrase += f" at the {PLACES[cell]}"
        phrases.append(phrase)
    caption = fill_template("all", x=fill_template("joined").join(phrases))
    if "background" in always_state or rng.random() < 0.6:
        caption += " " + fill_template("ground", b=scene.background)
    if scene.style != "day" and ("style" in always_state or rng.random() < 0.75):
        caption += " " + fill_template(scene.style)
    return caption


# ------------------------------------------------------------------------------------------------------------ edits


def sample_edit(rng: random.Random, edit_type: str = "", held_out: bool = False) -> Edit:
    """A random scene and a random edit of it that changes it. `held_out` takes the phrasings kept out of training.

    Raises:
        ValueError: the edit type is not one of `EDIT_TYPES`.
    """
    kind = edit_type or rng.choice(EDIT_TYPES)
    _check_edit_type(kind)
    things = {"remove": rng.choice((2, 3)), "add": rng.choice((1, 2))}.get(kind, 0)
    return sample_edit_of(sample_scene(rng, things), rng, kind, held_out)


def _check_edit_type(kind: str) -> None:
    if kind not in EDIT_TYPES:
        raise ValueError(f"expected an edit type among {', '.join(EDIT_TYPES)}; got {kind!r}")


def possible_edit_types(scene: Scene) -> tuple[str, ...]:
    """The edit types that `sample_edit_of` can apply to a scene, such that the scenes before and after the edit both
    have one to three things."""
    things = len(scene.filled)
    impossible = {"remove"} if things == 1 else {"add"} if things == 3 else set()
    return tuple(kind for kind in EDIT_TYPES if kind not in impossible) if 1 <= things <= 3 else ()


def sample_edit_of(scene: Scene, rng: random.Random, kind: str, held_out: bool = False) -> Edit:
    """A random edit of this scene that changes it, of a type among `possible_edit_types(scene)`.

    Raises:
        ValueError: the edit type is not one of `EDIT_TYPES`.
    """
    _check_edit_type(kind)
    cell = -1 if kind in ("add", "background", "style") else rng.choice(scene.filled)
    to_cell, value, place, name = -1, "", "", ""
    described: tuple[int, ...] = (cell,)
    always_state: tuple[str, ...] = ()
    if cell >= 0:
        thing, name = scene.thing(cell), rng.choice(possible_names(scene, cell))
    if kind == "add":
        to_cell, place = rng.choice(scene.empty), ""
        new, name = sample_new_thing(scene, rng)
        target, described, always_state = scene.with_cell(to_cell, new), (to_cell,), ("pattern",)
        if rng.random() < 0.5:
            place = PLACES[to_cell]
        else:
            described, to_cell = (to_cell,), -1
    elif kind == "remove":
        target, described = scene.with_cell(cell, None), ()
    elif kind == "replace":
        value = rng.choice([s for s in SHAPES if s != thing.shape and _is_unique(scene, cell, s, thing.colour)])
        target = scene.with_cell(cell, replace(thing, shape=value))
    elif kind == "recolour":
        value = rng.choice([c for c in COLOURS if c != thing.colour and _is_unique(scene, cell, thing.shape, c)])
        target = scene.with_cell(cell, replace(thing, colour=value))
    elif kind == "pattern":
        value = rng.choice([p for p in PATTERNS if p != thing.pattern])
        target, always_state = scene.with_cell(cell, replace(thing, pattern=value)), ("pattern",)
    elif kind == "resize":
        value = "small" if thing.size == "large" else "large"
        target = scene.with_cell(cell, replace(thing, size=value, radius=rng.uniform(*SIZES[value])))
        always_state = ("size",) if rng.random() < 0.5 else ()
    elif kind == "move":
        to_cell = rng.choice(scene.empty)
        value = PLACES[to_cell]
        target = scene.with_cell(cell, None).with_cell(to_cell, thing)
        described, always_state = (to_cell,), (("place",) if rng.random() < 0.5 else ())
    elif kind == "background":
        value = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        target, described, always_state = replace(scene, background=value), (), ("background",)
    else:
        value = rng.choice([s for s in STYLES if s != scene.style])
        target, described, always_state = replace(scene, style=value), (), ("style",)
    return Edit(
        edit_type=kind,
        reference=scene,
        target=target,
        cell=cell,
        to_cell=to_cell,
        value=value,
        instruction=sample_instruction(kind, name, value, place, rng, held_out),
        object=name,
        source_caption=sample_caption(scene, rng),
        target_caption=sample_caption(target, rng, described, always_state),
    )


def sample_new_thing(scene: Scene, rng: random.Random) -> tuple[Thing, str]:
    """A thing that differs in colour or shape from all of the scene, and its name."""
    new = sample_thing(rng, pattern=rng.choice(("solid", "solid", "striped", "dotted")))
    taken = {(scene.thing(c).shape, scene.thing(c).colour) for c in scene.filled}
    while (new.shape, new.colour) in taken:
        new = sample_thing(rng, pattern=new.pattern)
    return new, " ".join(w for w in (new.pattern if new.pattern != "solid" else "", new.colour, new.shape) if w)


def _is_unique(scene: Scene, cell: int, shape: str, colour: str) -> bool:
    """Whether no other cell holds a thing of this shape and colour."""
    return all((scene.thing(i).shape, scene.thing(i).colour) != (shape, colour) for i in scene.filled if i != cell)
