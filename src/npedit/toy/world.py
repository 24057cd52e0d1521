"""The toy world: small scenes whose every edit has an exactly known answer.

A scene is a 2 x 2 grid of cells on a coloured background. Each cell is empty or holds one thing (shape, colour, pattern,
size), drawn with anti-aliasing and a small random offset. A style dims the whole scene (night) or veils it (fog).

Captions leave out what real captions leave out: nearly always where things are and how large, often the pattern, now and
then a whole thing or the background. So a caption alone does not determine an edit, and the critic is needed.

The oracle (`read_scene`, `judge`) works by analysis-by-synthesis and knows nothing of any network.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

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
SIZES = {"small": (3.3, 3.8), "large": (5.4, 6.0)}  # radius in pixels
BACKGROUNDS = {
    "grey": (0.50, 0.50, 0.50),
    "brown": (0.40, 0.25, 0.14),
    "beige": (0.85, 0.75, 0.58),
    "teal": (0.10, 0.40, 0.42),
}
STYLES = {  # gain, offset per channel: pixel -> gain * pixel + offset
    "day": (1.0, (0.0, 0.0, 0.0)),
    "night": (0.40, (0.0, 0.0, 0.12)),
    "fog": (0.45, (0.50, 0.50, 0.50)),
}
JITTER = 0.8  # largest offset of a thing from its cell's centre, in pixels
EDIT_TYPES = ("add", "remove", "replace", "recolour", "pattern", "background", "move", "resize", "style")


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
    def look(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.pattern, self.size


@dataclass(frozen=True)
class Scene:
    """Four cells (row by row; None is an empty cell), a background and a style."""

    cells: tuple[Thing | None, Thing | None, Thing | None, Thing | None]
    background: str
    style: str

    @property
    def filled(self) -> tuple[int, ...]:
        return tuple(i for i, thing in enumerate(self.cells) if thing is not None)

    @property
    def empty(self) -> tuple[int, ...]:
        return tuple(i for i, thing in enumerate(self.cells) if thing is None)

    def with_cell(self, cell: int, thing: Thing | None) -> Scene:
        cells = list(self.cells)
        cells[cell] = thing
        return replace(self, cells=tuple(cells))


@dataclass(frozen=True)
class Reading:
    """What the oracle sees. A cell is a look (shape, colour, pattern, size), None (empty) or "unreadable"."""

    cells: tuple[tuple[str, str, str, str] | None | str, ...]
    background: str
    style: str
    residual: float  # mean squared difference to the best scene, worst cell, in the day's contrast


@dataclass(frozen=True)
class Edit:
    """One edit of one scene. `cell` is the thing's cell (-1: none), `to_cell` where it goes (-1: any empty cell, or none)."""

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
    def touched(self) -> tuple[int, ...]:
        """Cells that the edit may change; all four for background and style."""
        if self.edit_type in ("background", "style"):
            return 0, 1, 2, 3
        return tuple(i for i in range(4) if self.reference.cells[i] != self.target.cells[i])


# ---------------------------------------------------------------------------------------------------------- drawing


def _coverage(shape: str, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Anti-aliased coverage (n, CELL, CELL) of one shape; radius and offsets are (n,) in pixels."""
    axis = torch.arange(CELL) + 0.5 - CELL / 2
    x = axis[None, None, :] - dx[:, None, None]
    y = axis[None, :, None] - dy[:, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.86 * r
    elif shape == "triangle":
        distance = torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.575 * r
    else:
        upright = torch.maximum(x.abs() - 0.36 * r, y.abs() - r)
        flat = torch.maximum(y.abs() - 0.36 * r, x.abs() - r)
        distance = torch.minimum(upright, flat)
    return (0.5 - distance).clamp(0, 1)


def _white(pattern: str, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
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
            thing = scene.cells[cell]
            groups.setdefault((thing.shape, thing.pattern), []).append((b, cell, thing))
    for (shape, pattern), members in groups.items():
        radius, dx, dy = torch.tensor([[t.radius, t.dx, t.dy] for _, _, t in members]).unbind(1)
        cover = _coverage(shape, radius, dx, dy)[:, None]
        white = _white(pattern, radius, dx, dy)[:, None]
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
    seen: set[tuple[str, str]] = set()
    for cell in rng.sample(range(4), count):
        thing = sample_thing(rng)
        while (thing.shape, thing.colour) in seen:
            thing = sample_thing(rng)
        seen.add((thing.shape, thing.colour))
        cells[cell] = thing
    style = rng.choice(("day", "day", "night", "fog"))
    return Scene(tuple(cells), rng.choice(tuple(BACKGROUNDS)), style)


def _name(scene: Scene, cell: int, rng: random.Random) -> str:
    """What an instruction calls a thing: enough words to tell it from the others in the scene."""
    thing = scene.cells[cell]
    others = [scene.cells[i] for i in scene.filled if i != cell]
    names = [f"{thing.colour} {thing.shape}"] * 2
    if all(o.shape != thing.shape for o in others):
        names.append(thing.shape)
    if all(o.colour != thing.colour for o in others):
        names.append(f"{thing.colour} shape")
    if thing.pattern != "solid":
        names.append(f"{thing.pattern} {thing.colour} {thing.shape}")
    return rng.choice(names)


# --------------------------------------------------------------------------------------------------------- language

# The last two of each list are held out of training. They use only words that others use.
INSTRUCTIONS = {
    "add": ("add a {x}", "put a {x} in the picture", "draw a {x}", "insert a {x}", "place a {x} in the scene",
            "put a {x} in the scene", "add a {x} to the picture"),
    "add_at": ("add a {x} at the {p}", "put a {x} at the {p}", "draw a {x} in the {p}", "insert a {x} at the {p}",
               "put a {x} in the {p}", "draw a {x} at the {p}"),
    "remove": ("remove the {x}", "delete the {x}", "erase the {x}", "take the {x} away", "get rid of the {x}",
               "take away the {x}", "remove the {x} from the picture"),
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
CAPTION_WORDS = 22  # no caption is longer
NOTHING = ("do nothing", "leave it as it is", "keep the picture as it is", "change nothing")


def instruction_for(edit_type: str, name: str, value: str, place: str, rng: random.Random, held_out: bool) -> str:
    """An instruction from the training templates, or (`held_out`) from those kept out of training."""
    templates = INSTRUCTIONS["add_at" if edit_type == "add" and place else edit_type]
    chosen = rng.choice(templates[-HELD_OUT:] if held_out else templates[:-HELD_OUT])
    return chosen.format(x=name, v=value, p=place)


def caption_for(scene: Scene, rng: random.Random, tell: tuple[int, ...] = (), also: tuple[str, ...] = ()) -> str:
    """A caption that leaves things out. `tell` are cells always told of; `also` facts always told ("background",
    "style", "pattern", "size", "place"; the last three concern the cells in `tell`)."""
    told = [c for c in scene.filled if c in tell or rng.random() < 0.85] or [rng.choice(scene.filled)]
    rng.shuffle(told)
    while True:
        caption = _caption(scene, rng, told, tell, also)
        if len(caption.split()) <= CAPTION_WORDS:
            return caption


def _caption(scene: Scene, rng: random.Random, told: list[int], tell: tuple[int, ...], also: tuple[str, ...]) -> str:
    phrases = []
    for cell in told:
        thing, sure = scene.cells[cell], cell in tell
        words = []
        if (sure and "size" in also) or rng.random() < 0.1:
            words.append(thing.size)
        if thing.pattern != "solid" and ((sure and "pattern" in also) or rng.random() < 0.5):
            words.append(thing.pattern)
        phrase = " ".join(["a", *words, thing.colour, thing.shape])
        if (sure and "place" in also) or rng.random() < 0.1:
            phrase += f" at the {PLACES[cell]}"
        phrases.append(phrase)
    caption = " and ".join(phrases)
    if "background" in also or rng.random() < 0.6:
        caption += f" on a {scene.background} background"
    if scene.style != "day" and ("style" in also or rng.random() < 0.75):
        caption += {"night": " at night", "fog": " in fog"}[scene.style]
    return caption


def described(caption: str, reading: Reading) -> bool:
    """Does the picture hold what the caption says: each thing it names, its pattern, size and place, background, style?"""
    head, _, rest = caption.partition(" on a ")
    tail = rest or head
    if rest and reading.background != rest.split()[0]:
        return False
    for words, style in ((" at night", "night"), (" in fog", "fog")):
        if tail.endswith(words):
            head = head.removesuffix(words)
            if reading.style != style:
                return False
    left = dict(enumerate(reading.cells))
    for phrase in head.split(" and "):
        thing, _, place = phrase.partition(" at the ")
        words = set(thing.split()) - {"a"}
        fits = [i for i, look in left.items() if isinstance(look, tuple) and words <= set(look)]
        fits = [i for i in fits if not place or PLACES[i] == place]
        if not fits:
            return False
        del left[fits[0]]
    return True


# ------------------------------------------------------------------------------------------------------------ edits


def sample_edit(rng: random.Random, edit_type: str = "", held_out: bool = False) -> Edit:
    """A random scene and a random edit of it that changes it. `held_out` takes the phrasings kept out of training.

    Raises:
        ValueError: the edit type is not one of `EDIT_TYPES`.
    """
    kind = edit_type or rng.choice(EDIT_TYPES)
    if kind not in EDIT_TYPES:
        raise ValueError(f"expected an edit type among {', '.join(EDIT_TYPES)}; got {kind!r}")
    things = {"remove": rng.choice((2, 3)), "add": rng.choice((1, 2))}.get(kind, 0)
    scene = sample_scene(rng, things)
    cell = -1 if kind in ("add", "background", "style") else rng.choice(scene.filled)
    to_cell, value, place, name, told, also = -1, "", "", "", (cell,), ()
    thing = scene.cells[cell] if cell >= 0 else None
    if thing is not None:
        name = _name(scene, cell, rng)
    if kind == "add":
        to_cell, place = rng.choice(scene.empty), ""
        new = sample_thing(rng, pattern=rng.choice(("solid", "solid", "striped", "dotted")))
        looks = {(scene.cells[c].shape, scene.cells[c].colour) for c in scene.filled}
        while (new.shape, new.colour) in looks:
            new = sample_thing(rng, pattern=new.pattern)
        name = " ".join(w for w in (new.pattern if new.pattern != "solid" else "", new.colour, new.shape) if w)
        target, told, also = scene.with_cell(to_cell, new), (to_cell,), ("pattern",)
        if rng.random() < 0.5:
            place = PLACES[to_cell]
        else:
            told, to_cell = (to_cell,), -1
    elif kind == "remove":
        target, told = scene.with_cell(cell, None), ()
    elif kind == "replace":
        value = rng.choice([s for s in SHAPES if s != thing.shape and _free(scene, cell, s, thing.colour)])
        target = scene.with_cell(cell, replace(thing, shape=value))
    elif kind == "recolour":
        value = rng.choice([c for c in COLOURS if c != thing.colour and _free(scene, cell, thing.shape, c)])
        target = scene.with_cell(cell, replace(thing, colour=value))
    elif kind == "pattern":
        value = rng.choice([p for p in PATTERNS if p != thing.pattern])
        target, also = scene.with_cell(cell, replace(thing, pattern=value)), ("pattern",)
    elif kind == "resize":
        value = "small" if thing.size == "large" else "large"
        target = scene.with_cell(cell, replace(thing, size=value, radius=rng.uniform(*SIZES[value])))
        also = ("size",) if rng.random() < 0.5 else ()
    elif kind == "move":
        to_cell = rng.choice(scene.empty)
        value = PLACES[to_cell]
        target = scene.with_cell(cell, None).with_cell(to_cell, thing)
        told, also = (to_cell,), (("place",) if rng.random() < 0.5 else ())
    elif kind == "background":
        value = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        target, told, also = replace(scene, background=value), (), ("background",)
    else:
        value = rng.choice([s for s in STYLES if s != scene.style])
        target, told, also = replace(scene, style=value), (), ("style",)
    return Edit(
        edit_type=kind,
        reference=scene,
        target=target,
        cell=cell,
        to_cell=to_cell,
        value=value,
        instruction=instruction_for(kind, name, value, place, rng, held_out),
        object=name,
        source_caption=caption_for(scene, rng),
        target_caption=caption_for(target, rng, told, also),
    )


def _free(scene: Scene, cell: int, shape: str, colour: str) -> bool:
    """Would a thing of this shape and colour in this cell still be the only one of its kind?"""
    return all((scene.cells[i].shape, scene.cells[i].colour) != (shape, colour) for i in scene.filled if i != cell)


# ----------------------------------------------------------------------------------------------------------- oracle

UNREADABLE = "unreadable"
RESIDUAL_LIMIT = 0.03  # mean squared difference per pixel and channel above which a cell is unreadable
_RADII = {"small": (3.4, 3.7), "large": (5.5, 5.9)}
_OFFSETS = (-0.8, -0.4, 0.0, 0.4, 0.8)


@lru_cache(maxsize=1)
def _bank() -> tuple[Tensor, Tensor, list[tuple[str, str, str]]]:
    """Every mask of the oracle: coverage by paint (m, 256), coverage by white (m, 256), and (shape, pattern, size)."""
    paint, white, names = [], [], []
    for shape in SHAPES:
        for size, radii in _RADII.items():
            grid = torch.tensor([[r, x, y] for r in radii for x in _OFFSETS for y in _OFFSETS])
            radius, dx, dy = grid.unbind(1)
            cover = _coverage(shape, radius, dx, dy).flatten(1)
            for pattern in PATTERNS:
                share = _white(pattern, radius, dx, dy).flatten(1)
                paint.append(cover * (1 - share))
                white.append(cover * share)
                names += [(shape, pattern, size)] * len(grid)
    return torch.cat(paint), torch.cat(white), names


def _fit_cells(pixels: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Best template of each cell. pixels (n, 3, 256) in the day's contrast, background (n, 3).

    Returns the mean squared residual (n,) and the template's index (n,): mask * len(COLOURS) + colour; -1 is empty.
    """
    paint, white, _ = _bank()
    d = pixels - background[:, :, None]
    power = d.square().sum((1, 2))
    on_paint = torch.einsum("ncp,mp->ncm", d, paint)
    on_white = torch.einsum("ncp,mp->ncm", d, white)
    pp, ww, pw = paint.square().sum(1), white.square().sum(1), (paint * white).sum(1)
    to_white = 1.0 - background
    scores = []
    for rgb in COLOURS.values():
        to_paint = torch.tensor(rgb) - background
        cross = torch.einsum("nc,ncm->nm", to_paint, on_paint) + torch.einsum("nc,ncm->nm", to_white, on_white)
        own = (
            to_paint.square().sum(1)[:, None] * pp
            + to_white.square().sum(1)[:, None] * ww
            + 2 * (to_paint * to_white).sum(1)[:, None] * pw
        )
        scores.append(own - 2 * cross)
    gain, index = torch.stack(scores, 2).flatten(1).min(1)
    empty = gain >= 0
    return (power + gain.clamp(max=0)) / (3 * CELL * CELL), torch.where(empty, -1, index)


def _ground() -> Tensor:
    """The pixels (32, 32) that no thing can reach: the corners of the cells."""
    axis = (torch.arange(CELL) + 0.5 - CELL / 2).abs()
    corner = (axis[:, None] > 6.4) & (axis[None, :] > 6.4)
    return corner.repeat(2, 2)


@torch.no_grad()
def read_scene(images: Tensor) -> list[Reading]:
    """Which scenes are these pictures? Images (b, 3, 32, 32) in [0, 1]. No network is asked.

    The background and style are the pair that leaves the smallest residual, among the three nearest to the corner pixels.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"expected images (b, 3, {SIDE}, {SIDE}); got {tuple(images.shape)}")
    return [reading for chunk in images.float().cpu().split(64) for reading in _read_chunk(chunk)]


def _read_chunk(images: Tensor) -> list[Reading]:
    pairs = [(b, s) for b in BACKGROUNDS for s in STYLES]
    shades = torch.tensor([[STYLES[s][0] * v + o for v, o in zip(BACKGROUNDS[b], STYLES[s][1])] for b, s in pairs])
    ground = images[:, :, _ground()].median(2).values
    near = torch.cdist(ground, shades).topk(3, largest=False).indices
    cells = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 3, CELL * CELL)
    fits = []
    for k in range(near.shape[1]):
        chosen = [pairs[i] for i in near[:, k].tolist()]
        gain = torch.tensor([STYLES[s][0] for _, s in chosen])[:, None, None, None]
        offset = torch.tensor([STYLES[s][1] for _, s in chosen])[:, None, :, None]
        backs = torch.tensor([BACKGROUNDS[b] for b, _ in chosen]).repeat_interleave(4, 0)
        residual, index = _fit_cells(((cells - offset) / gain).flatten(0, 1), backs)
        total = (residual.view(-1, 4) * gain.view(-1, 1).square()).sum(1)
        fits.append((total, residual.view(-1, 4), index.view(-1, 4), chosen))
    best = torch.stack([f[0] for f in fits]).argmin(0).tolist()
    _, _, names = _bank()
    colours = tuple(COLOURS)
    readings = []
    for i, k in enumerate(best):
        _, residual, index, chosen = fits[k]
        looks = []
        for r, j in zip(residual[i].tolist(), index[i].tolist()):
            if not r <= RESIDUAL_LIMIT:
                looks.append(UNREADABLE)
            elif j < 0:
                looks.append(None)
            else:
                shape, pattern, size = names[j // len(colours)]
                looks.append((shape, colours[j % len(colours)], pattern, size))
        readings.append(Reading(tuple(looks), *chosen[i], float(residual[i].max())))
    return readings


def reading_of(scene: Scene) -> Reading:
    """The reading that the scene itself must give."""
    return Reading(tuple(t.look if t else None for t in scene.cells), scene.background, scene.style, 0.0)


def _facts(reading: Reading) -> dict[str, object]:
    """A reading as independent facts: `2.colour`, `background`, ... An unreadable cell gives facts that equal nothing."""
    facts: dict[str, object] = {"background": reading.background, "style": reading.style}
    for i, look in enumerate(reading.cells):
        for k, key in enumerate(("shape", "colour", "pattern", "size")):
            facts[f"{i}.{key}"] = look[k] if isinstance(look, tuple) else look
    return facts


def goal(edit: Edit, reading: Reading) -> Scene:
    """The scene that the edit should have led to. Where an added thing may go anywhere, it is where the reading has it."""
    if edit.edit_type == "add" and edit.to_cell < 0:
        (home,) = edit.touched
        new = [i for i in edit.reference.empty if reading.cells[i] is not None]
        if len(new) == 1:
            return edit.reference.with_cell(new[0], edit.target.cells[home])
    return edit.target


def judge(edit: Edit, reading: Reading) -> tuple[bool, bool]:
    """(applied, preserved): was the edit carried out, and is all else as in the reference?

    Position is judged by cell. An added thing may have any size, and any empty cell where the instruction names none.
    """
    target = goal(edit, reading)
    wanted, seen, before = _facts(reading_of(target)), _facts(reading), _facts(reading_of(edit.reference))
    if edit.edit_type == "add":
        (home,) = (i for i in range(4) if target.cells[i] != edit.reference.cells[i])
        asked = {f"{home}.shape", f"{home}.colour", f"{home}.pattern"}
        free = {f"{home}.size"}
    elif edit.edit_type == "move":
        asked = {f"{edit.to_cell}.shape", f"{edit.to_cell}.colour"} | {k for k in wanted if k.startswith(f"{edit.cell}.")}
        free = {f"{edit.to_cell}.pattern", f"{edit.to_cell}.size"} if reading.cells[edit.to_cell] is None else set()
    else:
        asked, free = {k for k in wanted if wanted[k] != before[k]}, set()
    rest = set(wanted) - asked - free
    return all(seen[k] == wanted[k] for k in asked), all(seen[k] == wanted[k] for k in rest)


def outside_change(edit: Edit, image: Tensor, reference: Tensor) -> float | None:
    """Mean absolute pixel change in the cells that the edit does not touch; None where it touches all four."""
    cells = [i for i in range(4) if i not in edit.touched]
    if not cells:
        return None
    change = (image - reference).abs().mean(0).view(2, CELL, 2, CELL).mean((1, 3)).flatten()
    return float(change[cells].mean())
