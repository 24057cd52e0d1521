"""What an editor might return, right and wrong: the examples that the critic is trained and evaluated on."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from npedit.toy.edits import Edit
from npedit.toy.scene_edits import SceneEdit, shift_thing
from npedit.toy.world import (
    BACKGROUNDS,
    COLOURS,
    JITTER,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    sample_scene,
    sample_thing,
)  # fmt: skip

FIELDS = {"replace": "shape", "recolour": "colour", "pattern": "pattern", "resize": "size"}  # what an edit changes
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": tuple(SIZES)}


def _field(name: str, value: str) -> dict[str, Any]:
    """The keyword argument of `replace` that sets one field."""
    return {name: value}


def _with_value(thing: Thing, field: str, value: str, rng: random.Random) -> Thing:
    """The thing with another value in one field; a size brings its radius along."""
    changed = replace(thing, **_field(field, value))
    return replace(changed, radius=rng.uniform(*SIZES[value])) if field == "size" else changed


def _disturb(scene: Scene, rng: random.Random, spare: tuple[int, ...]) -> Scene:
    """The scene with one thing changed that no edit asked for, outside the cells in `spare` where that can be done."""
    open_cells = [i for i in range(4) if i not in spare]
    kind = (
        rng.choice(("cell", "cell", "cell", "background", "style"))
        if open_cells
        else rng.choice(("background", "style"))
    )
    if kind == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if kind == "style":
        return replace(scene, style=rng.choice([s for s in STYLES if s != scene.style]))
    cell = rng.choice(open_cells)
    thing = scene.cells[cell]
    if thing is None or rng.random() < 0.2:
        return scene.with_cell(cell, sample_thing(rng) if thing is None else None)
    field = rng.choice(tuple(VALUES))
    value = rng.choice([v for v in VALUES[field] if v != getattr(thing, field)])
    return scene.with_cell(cell, _with_value(thing, field, value, rng))


def _wrong_edit(edit: Edit, rng: random.Random) -> Scene:
    """An edit of the same type gone wrong: another value, or another thing."""
    scene = edit.reference
    for _ in range(20):
        other = _random_variant(edit, rng)
        if other != edit.target and other != scene:
            return other
    return scene


def _random_variant(edit: Edit, rng: random.Random) -> Scene:
    scene, kind = edit.reference, edit.edit_type
    if kind == "background":
        return replace(scene, background=rng.choice(tuple(BACKGROUNDS)))
    if kind == "style":
        return replace(scene, style=rng.choice(tuple(STYLES)))
    if kind == "add":
        (home,) = edit.changed_cells
        wanted = edit.target.thing(home)
        field = rng.choice(("shape", "colour", "pattern"))
        wrong = wanted if rng.random() < 0.25 else replace(wanted, **_field(field, rng.choice(VALUES[field])))
        return scene.with_cell(rng.choice(range(4)) if rng.random() < 0.4 else home, wrong)
    cell = edit.cell if rng.random() < 0.6 else rng.choice(scene.filled)
    thing = scene.thing(cell)
    if kind == "remove":
        return _incomplete_removal(edit, rng) if rng.random() < 0.6 else scene.with_cell(cell, None)
    if kind == "move":
        moved = scene.with_cell(rng.choice(scene.empty), thing)
        return moved if rng.random() < 0.5 else moved.with_cell(cell, None)
    value = edit.value if cell != edit.cell else rng.choice(VALUES[FIELDS[kind]])
    return scene.with_cell(cell, _with_value(thing, FIELDS[kind], value, rng))


def _incomplete_removal(edit: Edit, rng: random.Random) -> Scene:
    """A thing that should be gone and was only changed into another, or shrunk."""
    thing = edit.reference.thing(edit.cell)
    if rng.random() < 0.35:
        return edit.reference.with_cell(edit.cell, replace(thing, size="small", radius=rng.uniform(1.5, 4.0)))
    field = rng.choice(("shape", "shape", "colour", "pattern"))
    return edit.reference.with_cell(edit.cell, replace(thing, **_field(field, rng.choice(VALUES[field]))))


def _overdo(edit: Edit, rng: random.Random) -> Scene:
    """The edit carried out, and more of it: other things changed alike, the new thing in several cells."""
    scene, kind = edit.target, edit.edit_type
    others = [i for i in scene.filled if i not in edit.changed_cells]
    if kind in FIELDS and others:
        for cell in rng.sample(others, rng.randint(1, len(others))):
            scene = scene.with_cell(cell, _with_value(scene.thing(cell), FIELDS[kind], edit.value, rng))
    elif kind in ("add", "move"):
        home = next(i for i in edit.changed_cells if scene.cells[i] is not None)
        places = list(scene.empty) if rng.random() < 0.8 else others or list(scene.empty)
        for cell in rng.sample(places, rng.randint(1, len(places))):
            scene = scene.with_cell(cell, scene.cells[home])
    elif kind == "remove" and others:
        scene = scene.with_cell(rng.choice(others), None)
    return scene if scene != edit.target else _disturb(scene, rng, ())


def _change_edited_thing(edit: Edit, rng: random.Random) -> Scene:
    """The edit carried out, and something else about the very same thing changed with it."""
    scene = edit.target
    cells = [i for i in edit.changed_cells if scene.cells[i] is not None]
    fields = [f for f in VALUES if f != FIELDS.get(edit.edit_type)]
    if edit.edit_type in ("add", "background", "style") or not cells:
        return _overdo(edit, rng)
    thing, field = scene.thing(cells[0]), rng.choice([*fields, *(["size"] if "size" in fields else [])])
    value = rng.choice([v for v in VALUES[field] if v != getattr(thing, field)])
    return scene.with_cell(cells[0], _with_value(thing, field, value, rng))


def sample_outcome(edit: Edit, rng: random.Random) -> Scene:
    """What an editor might return: right, nothing done, wrong, right but disturbed, overdone, ..."""
    roll = rng.random()
    if roll < 0.32:
        scene = edit.target
    elif roll < 0.41:
        scene = edit.reference
    elif roll < 0.60:
        scene = _wrong_edit(edit, rng)
    elif roll < 0.73:
        scene = _disturb(edit.target, rng, edit.changed_cells if edit.edit_type not in ("background", "style") else ())
    elif roll < 0.84:
        scene = _overdo(edit, rng)
    elif roll < 0.93:
        scene = _change_edited_thing(edit, rng)
    elif roll < 0.97:
        scene = _disturb(edit.reference, rng, ())
    else:
        scene = sample_scene(rng)
    if rng.random() < 0.3:  # the same things, drawn anew a little aside
        things = [
            t
            and replace(
                t,
                dx=max(-JITTER, min(JITTER, t.dx + rng.uniform(-0.3, 0.3))),
                dy=max(-JITTER, min(JITTER, t.dy + rng.uniform(-0.3, 0.3))),
            )
            for t in scene.cells
        ]
        scene = replace(scene, cells=tuple(things))
    return scene


# ------------------------------------------------------------------------------------------------------ scene edits


def sample_scene_outcome(edit: SceneEdit, rng: random.Random) -> Scene:
    """What an editor might return for a scene edit: right, the reference, the subject changed, part of the scene
    missing, the subject drawn several times, ..."""
    roll = rng.random()
    if roll < 0.28:
        return vary_free_facts(edit, rng)
    if roll < 0.32:
        return edit.reference
    if roll < 0.36:
        return _disturb(edit.reference, rng, ())
    if roll < 0.48:
        return change_subject(edit, vary_free_facts(edit, rng), rng)
    if roll < 0.70:
        return _miss_a_fact(edit, vary_free_facts(edit, rng), rng)
    if roll < 0.74:
        return change_subject(edit, _miss_a_fact(edit, vary_free_facts(edit, rng), rng), rng)
    if roll < 0.79:
        return lose_subject(edit, vary_free_facts(edit, rng))
    if roll < 0.90:
        return repeat_subject(edit, vary_free_facts(edit, rng), rng)
    if roll < 0.97:
        return repeat_subject(edit, _miss_a_fact(edit, vary_free_facts(edit, rng), rng), rng)
    return sample_scene(rng)


def vary_free_facts(edit: SceneEdit, rng: random.Random) -> Scene:
    """A right scene: as asked, and what was not asked for is drawn anew. Sometimes there are other things."""
    scene = edit.target
    if "background" not in edit.asked:
        scene = replace(scene, background=rng.choice((edit.reference.background, *BACKGROUNDS)))
    if "style" not in edit.asked:
        scene = replace(scene, style=rng.choice((edit.reference.style, "day", *STYLES)))
    if "place" not in edit.asked:
        scene = _permute_cells(scene, rng)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        thing = sample_thing(rng)
        if scene.empty and thing.appearance[:2] != edit.subject.appearance[:2]:
            scene = scene.with_cell(rng.choice(scene.empty), thing)
    return scene


def _permute_cells(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, cells=tuple(rng.sample(scene.cells, len(scene.cells))))


def _subject_cell(edit: SceneEdit, scene: Scene) -> int:
    """The cell of the subject in a right scene."""
    return next(i for i in scene.filled if scene.thing(i).appearance == edit.subject.appearance)


def change_subject(edit: SceneEdit, scene: Scene, rng: random.Random) -> Scene:
    """The scene with one or two features of its subject changed; sizes and patterns more often than the others."""
    cells = [i for i in scene.filled if scene.thing(i).appearance == edit.subject.appearance]
    if not cells:
        return scene
    likelier_twice = ("size", "size", "pattern", "pattern", "colour", "shape")
    for field in dict.fromkeys(rng.sample(likelier_twice, rng.choice((1, 1, 2)))):
        thing = scene.thing(cells[0])
        value = rng.choice([v for v in VALUES[field] if v != getattr(thing, field)])
        scene = scene.with_cell(cells[0], _with_value(thing, field, value, rng))
    return scene


def _miss_a_fact(edit: SceneEdit, scene: Scene, rng: random.Random) -> Scene:
    harder = [fact for fact in edit.asked if fact in ("place", "companion")]
    return miss_fact(edit, scene, rng.choice([*edit.asked, *harder]), rng)


def miss_fact(edit: SceneEdit, scene: Scene, fact: str, rng: random.Random) -> Scene:
    """A right scene in which one asked fact (of `FACTS`) is as in the reference, or has another wrong value."""
    if fact == "background":
        wrong = [b for b in BACKGROUNDS if b != edit.target.background]
        return replace(scene, background=rng.choice((edit.reference.background, *wrong)))
    if fact == "style":
        wrong = [s for s in STYLES if s != edit.target.style]
        return replace(scene, style=rng.choice((edit.reference.style, *wrong)))
    if fact == "place":
        home = _subject_cell(edit, scene)
        other = rng.choice([i for i in range(4) if i != home])
        return scene.with_cell(home, scene.cells[other]).with_cell(other, scene.cells[home])
    return _spoil_companion(edit, scene, rng)


def _spoil_companion(edit: SceneEdit, scene: Scene, rng: random.Random) -> Scene:
    """The scene with the other thing gone, or changed in one field."""
    wanted = edit.target.thing(edit.companion)
    cell = next(i for i in scene.filled if scene.thing(i).appearance == wanted.appearance)
    if rng.random() < 0.5:
        return scene.with_cell(cell, None)
    field = rng.choice(("shape", "colour", "pattern"))
    value = rng.choice([v for v in VALUES[field] if v != getattr(wanted, field)])
    return scene.with_cell(cell, replace(scene.thing(cell), **_field(field, value)))


def lose_subject(edit: SceneEdit, scene: Scene) -> Scene:
    """A right scene without its subject."""
    return scene.with_cell(_subject_cell(edit, scene), None)


def repeat_subject(edit: SceneEdit, scene: Scene, rng: random.Random) -> Scene:
    """The scene with the subject in further cells, which were empty. Half of the repetitions have another size or
    pattern. A scene without an empty cell loses another thing."""
    looks = edit.subject.appearance[:2]
    others = [i for i in range(4) if i not in scene.empty and scene.thing(i).appearance[:2] != looks]
    cells = scene.empty or others[:1]
    for cell in rng.sample(cells, min(len(cells), rng.choice((1, 1, 3)))):
        thing = shift_thing(edit.subject, rng)
        if rng.random() < 0.5:
            field = rng.choice(("size", "pattern"))
            thing = _with_value(thing, field, rng.choice([v for v in VALUES[field] if v != getattr(thing, field)]), rng)
        scene = scene.with_cell(cell, thing)
    return scene


@torch.no_grad()
def degrade(
    images: Tensor, vae: AutoencoderKL, rng: random.Random, generator: torch.Generator, share: float = 0.6
) -> Tensor:
    """Some of the images as a generator might leave them: through the VAE with noisy latents, noisy, soft, off in
    colour."""
    images = images.clone()
    kinds = [rng.choice(("vae", "vae", "noise", "blur", "tint")) if rng.random() < share else "" for _ in images]
    rows = [i for i, k in enumerate(kinds) if k == "vae"]
    if rows:
        latents = vae.encode(images[rows] * 2 - 1).latent_dist.mean
        strength = 0.25 * torch.rand(len(rows), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
        images[rows] = (vae.decode(latents).sample + 1) / 2
    for i, kind in enumerate(kinds):
        if kind == "noise":
            images[i] += rng.uniform(0.01, 0.08) * torch.randn(images[i].shape, generator=generator)
        elif kind == "blur":
            soft = F.avg_pool2d(F.pad(images[i : i + 1], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
            images[i] = torch.lerp(images[i], soft, rng.uniform(0.2, 0.7))
        elif kind == "tint":
            images[i] += torch.tensor([rng.uniform(-0.05, 0.05) for _ in range(3)])[:, None, None]
    return images.clamp(0, 1)
