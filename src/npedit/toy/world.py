"""The toy world: small scenes that are drawn exactly as they are described.

A scene is a 2 x 2 grid of cells on a coloured background. Each cell is empty or holds one thing (shape, colour,
pattern, size), drawn with anti-aliasing and a small random offset. A style dims the whole scene (night) or veils it
(fog). `edits.py` has the language and the edits, `oracle.py` tells which scene a picture shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SIDE = 32
CELL = SIDE // 2
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.98, 0.85, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "cyan": (0.15, 0.80, 0.85),
}
PATTERNS = ("solid", "striped", "dotted")
SIZES = {"small": (4.4, 4.8), "large": (6.0, 6.5)}  # radius in pixels
BACKGROUNDS = {
    "grey": (0.50, 0.50, 0.50),
    "brown": (0.40, 0.32, 0.10),
    "beige": (0.90, 0.68, 0.52),
    "teal": (0.08, 0.40, 0.50),
}
STYLES = {  # gain, offset per channel: pixel -> gain * pixel + offset
    "day": (1.0, (0.0, 0.0, 0.0)),
    "night": (0.50, (0.0, 0.0, 0.10)),
    "fog": (0.55, (0.45, 0.45, 0.45)),
}
JITTER = 0.5  # largest offset of a thing from its cell's centre, in pixels


@dataclass(frozen=True)
class Thing:
    """What a cell holds. `radius`, `dx`, `dy` are pixels; two things are *alike* if all but these three agree."""

    shape: str
    colour: str
    pattern: str
    size: str
    radius: float
    dx: float
    dy: float

    @property
    def appearance(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.pattern, self.size


@dataclass(frozen=True)
class Scene:
    """Four cells (row by row; None is an empty cell), a background and a style."""

    cells: tuple[Thing | None, ...]
    background: str
    style: str

    @property
    def filled(self) -> tuple[int, ...]:
        return tuple(i for i, thing in enumerate(self.cells) if thing is not None)

    @property
    def empty(self) -> tuple[int, ...]:
        return tuple(i for i, thing in enumerate(self.cells) if thing is None)

    def thing(self, cell: int) -> Thing:
        """Return the thing in a filled cell.

        Raises:
            ValueError: the cell is empty.
        """
        thing = self.cells[cell]
        if thing is None:
            raise ValueError(f"expected a filled cell among {self.filled}; got {cell}")
        return thing

    def with_cell(self, cell: int, thing: Thing | None) -> Scene:
        cells = list(self.cells)
        cells[cell] = thing
        return replace(self, cells=tuple(cells))


# ---------------------------------------------------------------------------------------------------------- drawing


def coverage(shape: str, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Anti-aliased coverage (n, CELL, CELL) of one shape; radius and offsets are (n,) in pixels."""
    axis = torch.arange(CELL) + 0.5 - CELL / 2
    x = axis[None, None, :] - dx[:, None, None]
    y = axis[None, :, None] - dy[:, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - 0.90 * r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.98 * r
    elif shape == "triangle":
        distance = torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.575 * r
    else:
        upright = torch.maximum(x.abs() - 0.30 * r, y.abs() - r)
        flat = torch.maximum(y.abs() - 0.30 * r, x.abs() - r)
        distance = torch.minimum(upright, flat)
    return (0.5 - distance).clamp(0, 1)


def white_share(pattern: str, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Share of white paint (n, CELL, CELL) inside a thing: stripes of period 4 pixels, or one dot in the middle."""
    axis = torch.arange(CELL) + 0.5 - CELL / 2
    x = (axis[None, None, :] - dx[:, None, None]).expand(-1, CELL, CELL)
    y = (axis[None, :, None] - dy[:, None, None]).expand(-1, CELL, CELL)
    if pattern == "striped":
        return (0.5 + 1.3 * torch.sin(torch.pi / 2 * y)).clamp(0, 1)
    if pattern == "dotted":
        return (0.5 + 0.42 * radius[:, None, None] - (x**2 + y**2).sqrt()).clamp(0, 1)
    return torch.zeros_like(x)


def render(scenes: list[Scene]) -> Tensor:
    """Draw scenes: float images (b, 3, 32, 32) in [0, 1]."""
    images = torch.tensor([BACKGROUNDS[s.background] for s in scenes])[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    groups: dict[tuple[str, str], list[tuple[int, int, Thing]]] = {}
    for b, scene in enumerate(scenes):
        for cell in scene.filled:
            thing = scene.thing(cell)
            groups.setdefault((thing.shape, thing.pattern), []).append((b, cell, thing))
    for (shape, pattern), members in groups.items():
        radius, dx, dy = torch.tensor([[t.radius, t.dx, t.dy] for _, _, t in members]).unbind(1)
        cover = coverage(shape, radius, dx, dy)[:, None]
        white = white_share(pattern, radius, dx, dy)[:, None]
        paint = torch.tensor([COLOURS[t.colour] for _, _, t in members])[:, :, None, None]
        paint = (1 - white) * paint + white
        for k, (b, cell, _) in enumerate(members):
            top, left = CELL * (cell // 2), CELL * (cell % 2)
            patch = images[b, :, top : top + CELL, left : left + CELL]
            patch += cover[k] * (paint[k] - patch)
    gain = torch.tensor([STYLES[s.style][0] for s in scenes])[:, None, None, None]
    offset = torch.tensor([STYLES[s.style][1] for s in scenes])[:, :, None, None]
    return images * gain + offset


# --------------------------------------------------------------------------------------------------------- sampling


def sample_thing(rng: random.Random, **fixed: str) -> Thing:
    """A random thing; `fixed` pins shape, colour, pattern or size."""
    size = fixed.get("size", rng.choice(tuple(SIZES)))
    return Thing(
        shape=fixed.get("shape", rng.choice(SHAPES)),
        colour=fixed.get("colour", rng.choice(tuple(COLOURS))),
        pattern=fixed.get("pattern", rng.choice(PATTERNS)),
        size=size,
        radius=rng.uniform(*SIZES[size]),
        dx=rng.uniform(-JITTER, JITTER),
        dy=rng.uniform(-JITTER, JITTER),
    )


def sample_scene(rng: random.Random, things: int = 0) -> Scene:
    """A random scene of one to three things (or `things`), no two of the same colour and shape."""
    count = things or rng.choice((1, 2, 2, 3))
    cells: list[Thing | None] = [None] * 4
    taken: set[tuple[str, str]] = set()
    for cell in rng.sample(range(4), count):
        thing = sample_thing(rng)
        while (thing.shape, thing.colour) in taken:
            thing = sample_thing(rng)
        taken.add((thing.shape, thing.colour))
        cells[cell] = thing
    style = rng.choice(("day", "day", "night", "fog"))
    return Scene(tuple(cells), rng.choice(tuple(BACKGROUNDS)), style)
