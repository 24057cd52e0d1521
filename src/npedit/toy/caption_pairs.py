"""Source and target captions in the same words: they differ in what the edit changes, and in nothing else.

The captions of `edits.py` are written one by one, each with its own words and omissions. A captioner that rewrites the
caption of a photo for an edit keeps the words. Losses that compare the two captions need such pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npedit.toy.edits import CAPTION_WORDS, CAPTIONS, Edit
from npedit.toy.world import PLACES, Scene

# What both captions state of the thing, or of the scene, that an edit changes.
STATED = {
    "add": "pattern",
    "pattern": "pattern",
    "resize": "size",
    "move": "place",
    "background": "background",
    "style": "style",
}
SOMETIMES_STATED = ("resize", "move")  # as in `edits.sample_edit_of`


def with_paired_captions(edit: Edit, rng: random.Random) -> Edit:
    """The local edit, with captions in the same words. They are equal if the edit changes nothing that they state."""
    places = _changed_cells(edit)
    stated = STATED.get(edit.edit_type, "")
    if edit.edit_type in SOMETIMES_STATED and rng.random() < 0.5:
        stated = ""
    described = _sample_described(edit, places, rng)
    for _ in range(1000):
        words = _Words(rng.random(), stated, places)
        source, target = words.caption(edit.reference, described), words.caption(edit.target, described)
        if max(len(source.split()), len(target.split())) <= CAPTION_WORDS:
            return replace(edit, source_caption=source, target_caption=target)
    raise AssertionError(f"no captions of {edit} are short enough")


def _changed_cells(edit: Edit) -> tuple[int, ...]:
    """The cells of the thing that the edit is about, before and after it."""
    if edit.cell < 0 and edit.edit_type != "add":
        return ()
    return tuple(i for i in range(4) if edit.reference.cells[i] != edit.target.cells[i])


def _sample_described(edit: Edit, changed: tuple[int, ...], rng: random.Random) -> list[int]:
    """The cells whose things the captions describe, in random order: the changed ones, and most of the others."""
    others = [i for i in range(4) if i not in changed and edit.reference.cells[i] is not None]
    chosen = [i for i in others if rng.random() < 0.85]
    if edit.edit_type in ("add", "remove", "background", "style") and not chosen:
        chosen = [rng.choice(others)]  # else a caption would describe no thing
    groups = [changed, *((cell,) for cell in chosen)]  # a moved thing keeps its place in the list of things
    rng.shuffle(groups)
    return [cell for group in groups for cell in group]


@dataclass(frozen=True)
class _Words:
    """The words and omissions of two captions. The same `seed` draws the same for both scenes. `stated` is always
    stated of the things in the cells `changed`, or of the scene."""

    seed: float
    stated: str
    changed: tuple[int, ...]

    def caption(self, scene: Scene, described: Sequence[int]) -> str:
        rng = random.Random(self.seed)
        everything, joined, ground = (rng.choice(CAPTIONS[part][:-1]) for part in ("all", "joined", "ground"))
        has_background, has_style, style = rng.random() < 0.6, rng.random() < 0.75, rng.random()
        things = [self._describe(scene, cell) for cell in described if scene.cells[cell] is not None]
        caption = everything.format(x=joined.join(things))
        if has_background or self.stated == "background":
            caption += " " + ground.format(b=scene.background)
        if scene.style != "day" and (has_style or self.stated == "style"):
            caption += " " + random.Random(style).choice(CAPTIONS[scene.style][:-1])
        return caption

    def _describe(self, scene: Scene, cell: int) -> str:
        """A thing's size, pattern and place, each stated or not, with its colour and shape."""
        is_changed, thing = cell in self.changed, scene.thing(cell)
        rng = random.Random(f"{self.seed}/{'changed' if is_changed else cell}")
        is_stated = dict(zip(("size", "pattern", "place"), (rng.random() < share for share in (0.1, 0.5, 0.1))))
        if is_changed and self.stated:
            is_stated[self.stated] = True
        words = [thing.size] if is_stated["size"] else []
        words += [thing.pattern] if is_stated["pattern"] and thing.pattern != "solid" else []
        phrase = " ".join(["a", *words, thing.colour, thing.shape])
        return phrase + (f" at the {PLACES[cell]}" if is_stated["place"] else "")
