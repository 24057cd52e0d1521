"""The oracle: which scene a picture shows, and whether an edit was applied with the rest preserved.

The oracle works by analysis-by-synthesis: it compares a picture with everything that the world can draw. It uses no
neural network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from npedit.toy.edits import CAPTIONS, Edit
from npedit.toy.scene_edits import SceneEdit
from npedit.toy.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    STYLES,
    Scene,
    Thing,
    coverage,
    white_share,
)  # fmt: skip

UNREADABLE = "unreadable"
Appearance = tuple[str, str, str, str] | None | str  # (shape, colour, pattern, size), empty, or UNREADABLE
RESIDUAL_LIMIT = 0.03  # mean squared difference per pixel and channel above which a cell is unreadable
_RADII = {"small": (4.5, 4.7), "large": (6.1, 6.4)}
_OFFSETS = (-0.35, 0.0, 0.35)


@dataclass(frozen=True)
class Reading:
    """The scene that the oracle recognises. A cell is (shape, colour, pattern, size), None (empty) or "unreadable"."""

    cells: tuple[Appearance, ...]
    background: str
    style: str
    residual: float  # mean squared difference to the best scene, worst cell, in the day's contrast


@lru_cache(maxsize=1)
def _template_bank() -> tuple[Tensor, Tensor, list[tuple[str, str, str]]]:
    """Every mask of the oracle: coverage by paint (m, 256), coverage by white (m, 256), and (shape, pattern, size)."""
    paint, white, names = [], [], []
    for shape in SHAPES:
        for size, radii in _RADII.items():
            grid = torch.tensor([[r, x, y] for r in radii for x in _OFFSETS for y in _OFFSETS])
            radius, dx, dy = grid.unbind(1)
            cover = coverage(shape, radius, dx, dy).flatten(1)
            for pattern in PATTERNS:
                share = white_share(pattern, radius, dx, dy).flatten(1)
                paint.append(cover * (1 - share))
                white.append(cover * share)
                names += [(shape, pattern, size)] * len(grid)
    return torch.cat(paint), torch.cat(white), names


def _fit_cells(pixels: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Best template of each cell. pixels (n, 3, 256) in the day's contrast, background (n, 3).

    Returns the mean squared residual (n,) and the template's index (n,): mask * len(COLOURS) + colour; -1 is empty.
    """
    paint, white, _ = _template_bank()
    difference = pixels - background[:, :, None]
    power = difference.square().sum((1, 2))
    on_paint = torch.einsum("ncp,mp->ncm", difference, paint)
    on_white = torch.einsum("ncp,mp->ncm", difference, white)
    pp, ww, pw = paint.square().sum(1), white.square().sum(1), (paint * white).sum(1)
    to_white = 1.0 - background
    scores = []
    for rgb in COLOURS.values():
        to_paint = torch.tensor(rgb) - background
        cross = torch.einsum("nc,ncm->nm", to_paint, on_paint) + torch.einsum("nc,ncm->nm", to_white, on_white)
        template_power = (
            to_paint.square().sum(1)[:, None] * pp
            + to_white.square().sum(1)[:, None] * ww
            + 2 * (to_paint * to_white).sum(1)[:, None] * pw
        )
        scores.append(template_power - 2 * cross)
    gain, index = torch.stack(scores, 2).flatten(1).min(1)
    empty = gain >= 0
    return (power + gain.clamp(max=0)) / (3 * CELL * CELL), torch.where(empty, -1, index)


def _corner_mask() -> Tensor:
    """The pixels (32, 32) that no thing can reach: the corners of the cells."""
    axis = (torch.arange(CELL) + 0.5 - CELL / 2).abs()
    corner = (axis[:, None] > 7) & (axis[None, :] > 7)
    return corner.repeat(2, 2)


@torch.no_grad()
def read_scene(images: Tensor) -> list[Reading]:
    """The scene that each picture shows. Images are (b, 3, 32, 32) in [0, 1].

    Background and style are the pair with the smallest residual, among the three pairs nearest to the corner pixels.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"expected images (b, 3, {SIDE}, {SIDE}); got {tuple(images.shape)}")
    return [reading for chunk in images.float().cpu().split(64) for reading in _read_chunk(chunk)]


def _read_chunk(images: Tensor) -> list[Reading]:
    pairs = [(b, s) for b in BACKGROUNDS for s in STYLES]
    shades = torch.tensor([[STYLES[s][0] * v + o for v, o in zip(BACKGROUNDS[b], STYLES[s][1])] for b, s in pairs])
    ground = images[:, :, _corner_mask()].median(2).values
    nearest = torch.cdist(ground, shades).topk(3, largest=False).indices
    cells = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 3, CELL * CELL)
    candidates = []
    for k in range(nearest.shape[1]):
        chosen = [pairs[i] for i in nearest[:, k].tolist()]
        gain = torch.tensor([STYLES[s][0] for _, s in chosen])[:, None, None, None]
        offset = torch.tensor([STYLES[s][1] for _, s in chosen])[:, None, :, None]
        backs = torch.tensor([BACKGROUNDS[b] for b, _ in chosen]).repeat_interleave(4, 0)
        residual, index = _fit_cells(((cells - offset) / gain).flatten(0, 1), backs)
        total = (residual.view(-1, 4) * gain.view(-1, 1).square()).sum(1)
        candidates.append((total, residual.view(-1, 4), index.view(-1, 4), chosen))
    best = torch.stack([f[0] for f in candidates]).argmin(0).tolist()
    _, _, names = _template_bank()
    colours = tuple(COLOURS)
    readings = []
    for i, k in enumerate(best):
        _, residual, index, chosen = candidates[k]
        background, style = chosen[i]
        cells_read: list[Appearance] = []
        for r, j in zip(residual[i].tolist(), index[i].tolist()):
            if not r <= RESIDUAL_LIMIT:
                cells_read.append(UNREADABLE)
            elif j < 0:
                cells_read.append(None)
            else:
                shape, pattern, size = names[j // len(colours)]
                cells_read.append((shape, colours[j % len(colours)], pattern, size))
        readings.append(Reading(tuple(cells_read), background, style, float(residual[i].max())))
    return readings


def expected_reading(scene: Scene) -> Reading:
    """The reading of a picture that shows the scene exactly."""
    return Reading(tuple(t.appearance if t else None for t in scene.cells), scene.background, scene.style, 0.0)


def _reading_facts(reading: Reading) -> dict[str, object]:
    """A reading as independent facts: `2.colour`, `background`, ... An unreadable cell gives facts that equal
    nothing."""
    facts: dict[str, object] = {"background": reading.background, "style": reading.style}
    for i, appearance in enumerate(reading.cells):
        for k, key in enumerate(("shape", "colour", "pattern", "size")):
            facts[f"{i}.{key}"] = appearance[k] if isinstance(appearance, tuple) else appearance
    return facts


def expected_scene(edit: Edit, reading: Reading) -> Scene:
    """The scene that the edit should have led to. Where an added thing may be in any cell, it is in the cell in which
    the reading has it."""
    if edit.edit_type == "add" and edit.to_cell < 0:
        (cell,) = edit.changed_cells
        new = [i for i in edit.reference.empty if reading.cells[i] is not None]
        if len(new) == 1:
            return edit.reference.with_cell(new[0], edit.target.cells[cell])
    return edit.target


def judge_edit(edit: Edit, reading: Reading) -> tuple[bool, bool]:
    """(applied, preserved): whether the edit was applied, and whether all else is as in the reference.

    Position is judged by cell. An added thing may have any size, and any empty cell where the instruction names none.
    Of a scene edit: (scene right, subject kept); see `missing_scene_facts` and `is_subject_kept`.
    """
    if isinstance(edit, SceneEdit):
        return not missing_scene_facts(edit, reading), is_subject_kept(edit, reading)
    undone, disturbed = find_faults(edit, reading)
    return not undone, not disturbed


def is_subject_kept(edit: SceneEdit, reading: Reading) -> bool:
    """Whether exactly one thing has the subject's colour and shape, and this thing has its pattern and size too."""
    cells = _subject_cells(edit, reading)
    return len(cells) == 1 and reading.cells[cells[0]] == edit.subject.appearance


def missing_scene_facts(edit: SceneEdit, reading: Reading) -> set[str]:
    """What the instruction asks of the scene and the picture does not show: names of `scene_edits.FACTS`, and
    "readable" if the content of a cell is nothing of the toy world.

    The place is right if a thing of the subject's colour and shape is there. The other thing is right in any cell if
    its colour, shape and pattern are.
    """
    is_shown = {
        "background": reading.background == edit.target.background,
        "style": reading.style == edit.target.style,
        "place": edit.to_cell in _subject_cells(edit, reading),
        "companion": bool(companion_cells(edit, reading)),
    }
    missing = {fact for fact in edit.asked if not is_shown[fact]}
    return missing | ({"readable"} if UNREADABLE in reading.cells else set())


def _subject_cells(edit: SceneEdit, reading: Reading) -> list[int]:
    """The cells of things with the subject's colour and shape."""
    return [i for i, a in enumerate(reading.cells) if isinstance(a, tuple) and a[:2] == edit.subject.appearance[:2]]


def companion_cells(edit: SceneEdit, reading: Reading) -> list[int]:
    """The cells of things with the colour, shape and pattern of the other thing that the instruction asks for."""
    if edit.companion < 0:
        return []
    wanted = edit.target.thing(edit.companion).appearance[:3]
    return [i for i, a in enumerate(reading.cells) if isinstance(a, tuple) and a[:3] == wanted]


def find_faults(edit: Edit, reading: Reading) -> tuple[set[str], set[str]]:
    """The faults of an edited picture: requested facts that are missing, and facts changed without request.

    A fact is "background", "style", or a cell's "2.shape", "2.colour", "2.pattern", "2.size".
    """
    target = expected_scene(edit, reading)
    wanted, found, original = (
        _reading_facts(expected_reading(target)),
        _reading_facts(reading),
        _reading_facts(expected_reading(edit.reference)),
    )
    if edit.edit_type == "add":
        (cell,) = (i for i in range(4) if target.cells[i] != edit.reference.cells[i])
        asked = {f"{cell}.shape", f"{cell}.colour", f"{cell}.pattern"}
        unconstrained = {f"{cell}.size"}
    elif edit.edit_type == "move":
        asked = {f"{edit.to_cell}.shape", f"{edit.to_cell}.colour"} | {
            k for k in wanted if k.startswith(f"{edit.cell}.")
        }
        unconstrained = (
            {f"{edit.to_cell}.pattern", f"{edit.to_cell}.size"} if reading.cells[edit.to_cell] is None else set()
        )
    else:
        asked, unconstrained = {k for k in wanted if wanted[k] != original[k]}, set()
    unasked = set(wanted) - asked - unconstrained
    return {k for k in asked if found[k] != wanted[k]}, {k for k in unasked if found[k] != wanted[k]}


def change_outside_edit(edit: Edit, image: Tensor, reference: Tensor) -> float | None:
    """Mean absolute pixel change in the cells that the edit does not touch; None where it touches all four."""
    cells = [i for i in range(4) if i not in edit.changed_cells]
    if not cells:
        return None
    change = (image - reference).abs().mean(0).view(2, CELL, 2, CELL).mean((1, 3)).flatten()
    return float(change[cells].mean())


@lru_cache(maxsize=1)
def _caption_patterns() -> tuple[re.Pattern, re.Pattern, dict[str, re.Pattern], re.Pattern]:
    """Regular expressions of the captions' openings, conjunctions, styles and backgrounds."""

    def any_template(part: str, suffix: str) -> str:
        longest_first = sorted(CAPTIONS[part], key=len, reverse=True)
        return (
            "|".join(re.escape(t).replace(r"\{b\}", r"(?:\w+)").replace(r"\{x\}", "") for t in longest_first) + suffix
        )

    styles = {s: re.compile(rf" (?:{any_template(s, '')})$") for s in ("night", "fog")}
    return (
        re.compile(rf"^(?:{any_template('all', '')})"),
        re.compile(any_template("joined", "")),
        styles,
        re.compile(rf" (?:{any_template('ground', '')})$"),
    )


def matches_caption(caption: str, reading: Reading) -> bool:
    """Whether the picture shows all that the caption says: each thing with its pattern, size and place, the background,
    the style."""
    opening, joint, styles, ground = _caption_patterns()
    for style, pattern in styles.items():
        if pattern.search(caption):
            caption = pattern.sub("", caption)
            if reading.style != style:
                return False
    stated = ground.search(caption)
    if stated:
        caption = caption[: stated.start()]
        if reading.background not in stated[0].split():
            return False
    remaining = dict(enumerate(reading.cells))
    for phrase in joint.split(opening.sub("", caption)):
        thing, _, place = phrase.partition(" at the ")
        words = set(thing.split()) - {"a"}
        candidates = [
            i for i, appearance in remaining.items() if isinstance(appearance, tuple) and words <= set(appearance)
        ]
        candidates = [i for i in candidates if not place or PLACES[i] == place]
        if not candidates:
            return False
        del remaining[candidates[0]]
    return True


def scene_from_reading(reading: Reading) -> Scene:
    """The scene that a reading describes; each thing has a middle radius and is in the middle of its cell.

    Raises:
        ValueError: a cell is unreadable.
    """
    cells: list[Thing | None] = []
    for number, appearance in enumerate(reading.cells):
        if isinstance(appearance, str):
            raise ValueError(f"expected a picture of the toy world; got one whose {PLACES[number]} shows nothing of it")
        size = sum(SIZES[appearance[3]]) / 2 if appearance else 0.0
        cells.append(Thing(*appearance, size, 0.0, 0.0) if appearance else None)
    return Scene(tuple(cells), reading.background, reading.style)
