"""What an editor might return, right and wrong: the examples that teach and examine the critic."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from npedit.toy.edits import Edit
from npedit.toy.world import (
    BACKGROUNDS,
    COLOURS,
    JITTER,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    sample_scene,
    sample_thing,
)  # fmt: skip


def _disturbed(scene: Scene, rng: random.Random, spare: tuple[int, ...]) -> Scene:
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
    field, values = rng.choice(
        (("shape", SHAPES), ("colour", tuple(COLOURS)), ("pattern", PATTERNS), ("size", tuple(SIZES)))
    )
    value = rng.choice([v for v in values if v != getattr(thing, field)])
    changed = replace(thing, **{field: value})
    if field == "size":
        changed = replace(changed, radius=rng.uniform(*SIZES[value]))
    return scene.with_cell(cell, changed)


def _near_miss(edit: Edit, rng: random.Random) -> Scene:
    """An edit of the same type gone wrong: another value, or another thing."""
    scene = edit.reference
    for _ in range(20):
        other = _variant(edit, rng)
        if other != edit.target and other != scene:
            return other
    return scene


def _variant(edit: Edit, rng: random.Random) -> Scene:
    scene, kind = edit.reference, edit.edit_type
    if kind == "background":
        return replace(scene, background=rng.choice(tuple(BACKGROUNDS)))
    if kind == "style":
        return replace(scene, style=rng.choice(tuple(STYLES)))
    if kind == "add":
        (home,) = edit.touched
        wanted = edit.target.cells[home]
        field, values = rng.choice((("shape", SHAPES), ("colour", tuple(COLOURS)), ("pattern", PATTERNS)))
        wrong = wanted if rng.random() < 0.25 else replace(wanted, **{field: rng.choice(values)})
        return scene.with_cell(rng.choice(range(4)) if rng.random() < 0.4 else home, wrong)
    cell = edit.cell if rng.random() < 0.6 else rng.choice(scene.filled)
    thing = scene.cells[cell]
    if kind == "remove":
        return scene.with_cell(cell, None)
    if kind == "move":
        moved = scene.with_cell(rng.choice(scene.empty), thing)
        return moved if rng.random() < 0.5 else moved.with_cell(cell, None)
    field = {"replace": "shape", "recolour": "colour", "pattern": "pattern", "resize": "size"}[kind]
    values = {"shape": SHAPES, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": tuple(SIZES)}[field]
    value = edit.value if cell != edit.cell else rng.choice(values)
    changed = replace(thing, **{field: value})
    return scene.with_cell(cell, replace(changed, radius=rng.uniform(*SIZES[value])) if field == "size" else changed)


def candidate(edit: Edit, rng: random.Random) -> Scene:
    """What an editor might return: right, nothing done, wrong, right but disturbed, ..."""
    roll = rng.random()
    if roll < 0.34:
        scene = edit.target
    elif roll < 0.46:
        scene = edit.reference
    elif roll < 0.68:
        scene = _near_miss(edit, rng)
    elif roll < 0.88:
        scene = _disturbed(edit.target, rng, edit.touched if edit.edit_type not in ("background", "style") else ())
    elif roll < 0.95:
        scene = _disturbed(edit.reference, rng, ())
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


@torch.no_grad()
def damaged(
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
