"""Scene edits of the toy world (free-form customisation): the subject of a photo, asked for in another scene.

The instruction names the subject and asks for two or three of: another background, another style, another place,
another thing beside the subject. All else is free, except the subject's identity: its colour, shape, pattern and size.
The instruction and the target caption leave out most of the identity, so only the reference tells it. Several photos
show the same subject, as in a data set whose photos are grouped by subject.

Target captions state the subject's place. The embedded text-to-image model often draws a thing twice if its caption
names no place, and DMD then teaches the student to do the same. Where the instruction leaves the place free, the target
caption puts the subject where the photo has it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npedit.toy.edits import (
    CAPTION_WORDS,
    CAPTIONS,
    EDIT_TYPES,
    HELD_OUT,
    Edit,
    possible_names,
    sample_caption,
    sample_edit,
    sample_new_thing,
)  # fmt: skip
from npedit.toy.world import BACKGROUNDS, JITTER, PLACES, STYLES, Scene, Thing, sample_scene, sample_thing

SCENE = "scene"
ALL_EDIT_TYPES = (*EDIT_TYPES, SCENE)
FACTS = ("background", "style", "place", "companion")  # what an instruction may ask of the scene
PHOTOS = 4  # photos of one subject
Photo = tuple[Scene, int]  # a scene, and the cell of the subject in it

# How an instruction begins (the last two are held out of training), and how it asks for each fact (the last is held
# out). Every word is one that the embedded models know.
OPENINGS = (
    "place the {x}", "put the {x}", "draw the {x}", "a picture of the {x}", "give a picture of the {x}", "move the {x}",
    "make a picture of the {x}", "the picture shows the {x}",
)  # fmt: skip
REQUESTS = {
    "place": ("at the {v}", "in the {v}", "to the {v}"),
    "companion": ("with a {v}", "and a {v}", "and with a {v}"),
    "background": ("on a {v} background", "in front of a {v} background", "on {v}", "with a {v} background"),
    "day": ("in the day", "at day", "in day"),
    "night": ("at night", "in the dark", "in the night"),
    "fog": ("in fog", "in the mist", "in the fog"),
}


@dataclass(frozen=True)
class SceneEdit(Edit):
    """A subject asked for in another scene. `cell` is the subject's cell in the reference and `to_cell` its cell in the
    target, which is one of many right scenes. `asked` are the facts (of `FACTS`) that the instruction states;
    `companion` is the cell of the other thing in the target (-1: none is asked for)."""

    asked: tuple[str, ...] = ()
    companion: int = -1

    @property
    def changed_cells(self) -> tuple[int, ...]:
        """All four: a scene edit may change every cell."""
        return 0, 1, 2, 3

    @property
    def subject(self) -> Thing:
        """The subject, as the reference shows it."""
        return self.reference.thing(self.cell)


def sample_item(rng: random.Random, edit_type: str, held_out: bool = False, photos: Sequence[Photo] = ()) -> Edit:
    """A random edit of a type among `ALL_EDIT_TYPES`. A scene edit uses `photos`; see `sample_scene_edit`.

    Raises:
        ValueError: the edit type is not one of `ALL_EDIT_TYPES`.
    """
    if edit_type == SCENE:
        return sample_scene_edit(rng, held_out, photos)
    return sample_edit(rng, edit_type, held_out)


def sample_photos(rng: random.Random, count: int = PHOTOS) -> list[Photo]:
    """Random scenes that all show the same subject, each with the subject's cell."""
    subject = sample_thing(rng)
    return [_sample_photo(subject, rng) for _ in range(count)]


def _sample_photo(subject: Thing, rng: random.Random) -> Photo:
    scene = sample_scene(rng)
    while any((t.shape, t.colour) == (subject.shape, subject.colour) for t in scene.cells if t):
        scene = sample_scene(rng)
    cell = rng.choice(scene.filled)
    return scene.with_cell(cell, shift_thing(subject, rng)), cell


def shift_thing(thing: Thing, rng: random.Random) -> Thing:
    """The thing with another random offset from the middle of its cell."""
    return replace(thing, dx=rng.uniform(-JITTER, JITTER), dy=rng.uniform(-JITTER, JITTER))


def sample_scene_edit(rng: random.Random, held_out: bool = False, photos: Sequence[Photo] = ()) -> SceneEdit:
    """A random scene edit whose asked facts all differ from the reference. `held_out` takes the phrasings kept out of
    training.

    The first of `photos` is the reference; the subject's name distinguishes the subject in all of them. Without
    photos, one is drawn.
    """
    photos = photos or sample_photos(rng, 1)
    reference, cell = photos[0]
    names = [name for name in possible_names(reference, cell) if all(name in possible_names(*p) for p in photos)]
    name = rng.choice(names)
    asked = _sample_asked_facts(rng)
    target, to_cell, companion, companion_name = _sample_target(reference, cell, asked, rng)
    values = {"place": PLACES[to_cell], "background": target.background, "companion": companion_name}
    return SceneEdit(
        edit_type=SCENE,
        reference=reference,
        target=target,
        cell=cell,
        to_cell=to_cell,
        value="",
        instruction=_sample_instruction(name, asked, values | {"style": target.style}, rng, held_out),
        object=name,
        source_caption=sample_caption(reference, rng),
        target_caption=_sample_target_caption(target, to_cell, companion, asked, rng),
        asked=asked,
        companion=companion,
    )


def _sample_asked_facts(rng: random.Random) -> tuple[str, ...]:
    chosen = rng.sample(FACTS, rng.choice((2, 2, 3)))
    return tuple(fact for fact in FACTS if fact in chosen)


def _sample_target(
    reference: Scene, cell: int, asked: Sequence[str], rng: random.Random
) -> tuple[Scene, int, int, str]:
    """A scene that the instruction asks for, the cells of subject and companion, and the companion's name."""
    backgrounds = [b for b in BACKGROUNDS if "background" not in asked or b != reference.background]
    styles = [s for s in STYLES if s != reference.style] if "style" in asked else ["day", "day", "night", "fog"]
    to_cell = rng.choice([i for i in range(4) if i != cell]) if "place" in asked else cell
    cells: list[Thing | None] = [None] * 4
    cells[to_cell] = shift_thing(reference.thing(cell), rng)
    companion, name = -1, ""
    if "companion" in asked:
        companion = rng.choice([i for i in range(4) if i != to_cell])
        cells[companion], name = sample_new_thing(reference, rng)
    return Scene(tuple(cells), rng.choice(backgrounds), rng.choice(styles)), to_cell, companion, name


def _sample_instruction(
    name: str, asked: Sequence[str], values: dict[str, str], rng: random.Random, held_out: bool
) -> str:
    """An instruction of at most `CAPTION_WORDS` words. The place follows the subject; the other facts come in any
    order."""
    openings = OPENINGS[-HELD_OUT:] if held_out else OPENINGS[:-HELD_OUT]
    for _ in range(1000):
        rest = [fact for fact in asked if fact != "place"]
        rng.shuffle(rest)
        parts = [rng.choice(openings).format(x=name)]
        for fact in [*(["place"] if "place" in asked else []), *rest]:
            requests = REQUESTS[values["style"] if fact == "style" else fact]
            parts.append((requests[-1] if held_out else rng.choice(requests[:-1])).format(v=values[fact]))
        text = " ".join(parts)
        if len(text.split()) <= CAPTION_WORDS:
            return text
    raise AssertionError(f"no instruction about {name} that asks for {', '.join(asked)} is short enough")


def _sample_target_caption(
    target: Scene, to_cell: int, companion: int, asked: Sequence[str], rng: random.Random
) -> str:
    """A caption that states the asked background and style, the subject's place, and half of the time the subject's
    pattern. The subject's size is hardly ever stated."""
    for _ in range(1000):
        things = [f"{_describe(target.thing(to_cell), rng)} at the {PLACES[to_cell]}"]
        if companion >= 0:
            things.append(_describe(target.thing(companion), rng, with_pattern=True))
        rng.shuffle(things)
        caption = rng.choice(CAPTIONS["all"][:-1]).format(x=rng.choice(CAPTIONS["joined"][:-1]).join(things))
        if "background" in asked:
            caption += " " + rng.choice(CAPTIONS["ground"][:-1]).format(b=target.background)
        if "style" in asked and target.style != "day":
            caption += " " + rng.choice(CAPTIONS[target.style][:-1])
        if len(caption.split()) <= CAPTION_WORDS:
            return caption
    raise AssertionError(f"no caption of {target} is short enough")


def _describe(thing: Thing, rng: random.Random, with_pattern: bool = False) -> str:
    words = [thing.size] if rng.random() < 0.1 else []
    if thing.pattern != "solid" and (with_pattern or rng.random() < 0.5):
        words.append(thing.pattern)
    return " ".join(["a", *words, thing.colour, thing.shape])
