"""Edits whose right answers are known, made from the user's own photos without any model.

A copy of the photo carries out no edit and changes nothing. Another photo, and a photo whose colours, brightness,
sharpness, crop or patches are changed, is not "exactly as in the first image". A photo whose captions do not mention an
object does not show the object, so it does not show the subject of a scene either. The instruction "make the photo
darker" is carried out by a darker photo.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from npedit.check.captions import content_words
from npedit.data import Example
from npedit.questions import IDENTITY_EDIT, SCENE

# An edit of these types may change all of a photo.
GLOBAL_TYPES = frozenset(("background", "style", "tone", SCENE, "other", IDENTITY_EDIT))
LEAST_CHANGE = 0.06  # mean absolute change of a patch's pixels, of the full range
COPY, OTHER_PHOTO, OBJECT_ABSENT = "identical pair", "unrelated photo", "object absent"
OTHER_SUBJECT = "photo of another subject"


@dataclass(frozen=True)
class KnownEdit:
    """An edit with known answers. `probe` says how it was made. `edited` is (3, H, W) in [0, 1]. `applied` and
    `preserved` are the truth; None is not known and not asked. So is `returned`: the edited image is the reference,
    which is asked about a scene."""

    probe: str
    example: Example
    edited: Tensor
    applied: bool | None
    preserved: bool | None
    returned: bool | None = None


def make_known_edits(examples: Sequence[Example], seed: int = 0) -> list[KnownEdit]:
    """All known edits of these examples. `object absent` looks for another photo whose captions lack the object."""
    rng = random.Random(f"{seed}/known edits")
    found: list[KnownEdit] = []
    for number, example in enumerate(examples):
        same_size = [e for e in examples if e.reference.shape == example.reference.shape and e.id != example.id]
        found += _changed_photos(example)
        found += _own_instructions(example, number)
        if same_size:
            found += _other_photos(example, same_size, rng)
            found += _patched_photos(example, rng.choice(same_size))
    return found


def _changed_photos(example: Example) -> Iterator[KnownEdit]:
    yield KnownEdit(COPY, example, example.reference, example.edit_type == IDENTITY_EDIT, True, returned=True)
    if example.edit_type in GLOBAL_TYPES - {IDENTITY_EDIT}:
        return
    for name, change in PHOTO_CHANGES.items():
        edited = change(example.reference)
        if float((edited - example.reference).abs().mean()) >= LEAST_CHANGE:
            yield KnownEdit(name, example, edited, None, False)


def rotate_colours(image: Tensor) -> Tensor:
    """Red becomes green, green becomes blue, blue becomes red."""
    return image[[2, 0, 1]]


def darken(image: Tensor) -> Tensor:
    """Less than half as bright."""
    return 0.45 * image


def blur(image: Tensor) -> Tensor:
    """Without detail finer than an eighth of the shorter side."""
    height, width = image.shape[-2:]
    side = max(2, min(height, width) // 8)
    small = F.interpolate(image[None], (max(1, height // side), max(1, width // side)), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0].clamp(0, 1)


def crop_centre(image: Tensor) -> Tensor:
    """The middle of the picture, enlarged 1.6 times."""
    height, width = image.shape[-2:]
    top, left = round(0.19 * height), round(0.19 * width)
    part = image[None, :, top : height - top, left : width - left]
    return F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0].clamp(0, 1)


def remove_colours(image: Tensor) -> Tensor:
    """Black and white."""
    return image.mean(0, keepdim=True).expand_as(image)


PHOTO_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "colour": rotate_colours,
    "brightness": darken,
    "blur": blur,
    "crop": crop_centre,
}
OWN_INSTRUCTIONS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("tone", "make the photo much darker", darken),
    ("style", "turn the photo into black and white", remove_colours),
    ("other", "blur the whole photo strongly", blur),
    ("other", "zoom in on the middle of the photo", crop_centre),
)


def _own_instructions(example: Example, number: int) -> Iterator[KnownEdit]:
    """One instruction that a simple change of the whole photo carries out: carried out, not at all, and another one."""
    kind, instruction, change = OWN_INSTRUCTIONS[number % len(OWN_INSTRUCTIONS)]
    _, _, other_change = OWN_INSTRUCTIONS[(number + 1) % len(OWN_INSTRUCTIONS)]
    asked = replace(example, edit_type=kind, instruction=instruction, object="", questions="")
    edited, other = change(example.reference), other_change(example.reference)
    if min(float((edited - example.reference).abs().mean()), float((edited - other).abs().mean())) < LEAST_CHANGE:
        return
    yield KnownEdit("own instruction: carried out", asked, edited, True, None)
    yield KnownEdit("own instruction: not carried out", asked, example.reference, False, True)
    yield KnownEdit("own instruction: another change", asked, other, False, None)


def _other_photos(example: Example, others: Sequence[Example], rng: random.Random) -> Iterator[KnownEdit]:
    other = rng.choice(others)
    if example.edit_type not in GLOBAL_TYPES and float((other.reference - example.reference).abs().mean()) > 0.02:
        yield KnownEdit(OTHER_PHOTO, example, other.reference, None, False)
    if example.edit_type in ("remove", SCENE):
        words = content_words(example.object)
        without = [e for e in others if words and not words & content_words(f"{e.source_caption} {e.object}")]
        absent = rng.choice(without).reference if without else None
        if absent is not None and example.edit_type == SCENE:
            yield KnownEdit(OTHER_SUBJECT, example, absent, None, False, returned=False)
        elif absent is not None:
            yield KnownEdit(OBJECT_ABSENT, example, absent, True, None)


def _patched_photos(example: Example, other: Example) -> Iterator[KnownEdit]:
    """Two patches in opposite quarters are pasted from another photo, or filled with their border's mean colour. At
    least one of them lies outside of what a local edit may change."""
    if example.edit_type in GLOBAL_TYPES:
        return
    for name, source in (("patch pasted", other.reference), ("patch removed", None)):
        for first in (0, 1):
            edited = example.reference.clone()
            changes = [_patch(edited, example.reference, source, *corner) for corner in ((0, first), (1, 1 - first))]
            if min(changes) >= LEAST_CHANGE:
                yield KnownEdit(name, example, edited, None, False)
                break


def _patch(edited: Tensor, image: Tensor, source: Tensor | None, row: int, column: int) -> float:
    """Change the middle of one quarter of `edited` in place; returns the mean absolute change of its pixels."""
    height, width = image.shape[-2:]
    top, left = row * (height // 2) + height // 16, column * (width // 2) + width // 16
    place = (slice(None), slice(top, top + 3 * height // 8), slice(left, left + 3 * width // 8))
    before = image[place]
    if source is None:
        border = torch.cat([before[:, 0], before[:, -1], before[:, :, 0], before[:, :, -1]], 1)
        edited[place] = border.mean(1)[:, None, None]
    else:
        edited[place] = source[place]
    return float((edited[place] - before).abs().mean())
