"""Teach the toy's critic: an ordinary transformers LLaVA-OneVision at toy size (SigLIP + Qwen2).

Yes/No alone leaves a small model blind to images for a long time, so linear heads, thrown away at the end, teach it
what the world knows: what each cell holds (on the visual tokens), what the other image holds in the same cell (on the
language model's states of the second image), what it should hold after the edit and what is wrong with it (there too),
and what the instruction names (at the answer position).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.questions import NOTHING, questions_for
from npedit.toy.edits import EDIT_TYPES, Edit, sample_edit
from npedit.toy.fit import fit
from npedit.toy.oracle import faults, goal, judge, reading_of
from npedit.toy.words import MARKS, new_tokenizer, vocabulary
from npedit.toy.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    STYLES,
    Scene,
    render,
    sample_scene,
    sample_thing,
)

PATCH = 8
VALUES = (*SHAPES, *COLOURS, *PATTERNS, *SIZES, *BACKGROUNDS, *STYLES, *PLACES, "")
LOOKS = (("", *SHAPES), ("", *COLOURS), ("", *PATTERNS), ("", *SIZES))  # "" is an empty cell
HELD = len(LOOKS) + 2  # labels a cell: its look, and the scene's background and style


def new_critic(seed: int) -> LlavaOnevision:
    """An untrained critic that knows the toy's words and its other spellings of them."""
    critic = LlavaOnevision.new(vocabulary()[len(MARKS) :], seed, vision=(128, 384, 3), text=(144, 432, 5))
    critic.tokenizer = new_tokenizer(256, ends=False)
    return critic


# ------------------------------------------------------------------------------------------------------- what is shown


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
        return moved if rng.random() < 0.2 else moved.with_cell(cell, None)
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
                dx=max(-0.8, min(0.8, t.dx + rng.uniform(-0.4, 0.4))),
                dy=max(-0.8, min(0.8, t.dy + rng.uniform(-0.4, 0.4))),
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


# ---------------------------------------------------------------------------------------------------------- what is
# asked


def asked_about(edit: Edit, seen: Scene) -> list[tuple[str, int, bool]]:
    """The short questions about an edit: (text, images looked at, true answer) when the edited picture is `seen`."""
    applied, preserved = judge(edit, reading_of(seen))
    if edit.edit_type == "remove":  # asked of one image: is the thing there, wherever it is?
        names = set(edit.object.split()) - {"shape"}
        applied = not any(t is not None and names <= set(t.look) for t in seen.cells)
    asked = []
    for q in questions_for(edit.edit_type, edit.instruction, edit.object, "short"):
        truth = preserved if q.kind == "identity" else applied == (q.answer > 0)
        asked.append((q.text, len(q.looks_at), truth))
    return asked


def asked_of_one(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """Is there such a thing? Half the time there is; else a thing that shares something with one that is."""
    thing = scene.cells[rng.choice(scene.filled)] if scene.filled else sample_thing(rng)
    words = {"pattern": thing.pattern, "colour": thing.colour, "shape": thing.shape}
    for field, values in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("pattern", PATTERNS)):
        if rng.random() < 0.3:
            words[field] = rng.choice(values)
    keep = rng.choice(
        (("colour", "shape"), ("colour", "shape"), ("shape",), ("colour",), ("pattern", "colour", "shape"))
    )
    names = [words[k] for k in keep]
    truth = any(t is not None and set(names) <= set(t.look) for t in scene.cells)
    text = " ".join([n for n in names if n != "solid"] + ([] if "shape" in keep else ["shape"]))
    if "solid" in names:
        truth = any(t is not None and set(names) - {"solid"} <= set(t.look) for t in scene.cells)
    return questions_for("remove", "", text, "short")[0].text, truth


# -------------------------------------------------------------------------------------------------------------- lessons


def _labels(scenes: list[Scene]) -> Tensor:
    """What each cell holds, (b, 4, HELD) class numbers."""
    backs, styles = tuple(BACKGROUNDS), tuple(STYLES)
    rows = []
    for s in scenes:
        both = [backs.index(s.background), styles.index(s.style)]
        looks = [t.look if t else ("",) * 4 for t in s.cells]
        rows.append([[names.index(v) for names, v in zip(LOOKS, look)] + both for look in looks])
    return torch.tensor(rows)


class _Heads(nn.Module):
    """The throw-away heads."""

    def __init__(self, text: int):
        super().__init__()
        self.sizes = [len(names) for names in LOOKS] + [len(BACKGROUNDS), len(STYLES)]
        self.cell = nn.Linear(text, 3 * sum(self.sizes) + 4)  # own, the other's, wanted; faults
        self.answer = nn.Linear(text, 5 + len(VALUES))

    def cells(self, out: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of per-cell predictions out (n, 4 cells, 4 patches, sum(sizes)) for labels (n, 4,
        HELD)."""
        losses = []
        for k, logits in enumerate(out.split(self.sizes, -1)):
            target = labels[:, :, None, k].expand(logits.shape[:3])
            losses.append(F.cross_entropy(logits.flatten(0, 2), target.flatten()))
        return torch.stack(losses).sum()


def _by_cell(tokens: Tensor) -> Tensor:
    """Visual tokens (n, 16, d) -> (n, 4 cells, 4 patches, d)."""
    n, _, d = tokens.shape
    return tokens.view(n, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, d)


def teach_critic(
    folder: Path, vae: AutoencoderKL, steps: int, seed: int = 0, pairs: int = 28, singles: int = 16
) -> LlavaOnevision:
    """Train the critic on `pairs` edits (both questions each) and `singles` presence questions a step."""
    critic = new_critic(seed)
    model = critic.model.requires_grad_(True)
    heads = _Heads(144)
    grid = (SIDE // PATCH) ** 2

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(pairs)]
        after = [candidate(e, rng) for e in edits]
        alone = [sample_scene(rng) for _ in range(singles)]
        scenes = [e.reference for e in edits] + after + alone
        images = damaged(render(scenes), vae, rng, generator)
        seen = critic.see(images)
        labels = _labels(scenes)
        tower = torch.stack([s[:grid] for s in seen])
        # the projector's output is as wide as the language model; a head on it teaches tower and projector alike
        dense = heads.cells(heads.cell(_by_cell(tower))[..., : sum(heads.sizes)], labels)
        texts, looks, truths, facts, second, shown = [], [], [], [], [], []
        for i, (edit, scene) in enumerate(zip(edits, after)):
            asked = asked_about(edit, scene)
            if rng.random() < 0.06:
                same = questions_for(NOTHING, "", "", "short")[0].text
                asked = [(same, 2, reading_of(scene) == reading_of(edit.reference))]
            for text, count, truth in asked:
                texts.append(text)
                truths.append(truth)
                looks.append((seen[i], seen[pairs + i]) if count == 2 else (seen[pairs + i],))
                facts.append(_facts(edit, count))
                second.append((i, pairs + i, len(texts) - 1) if count == 2 else None)
                shown.append(scene if count == 1 else None)
        for i, scene in enumerate(alone):
            text, truth = asked_of_one(scene, rng)
            texts.append(text)
            truths.append(truth)
            looks.append((seen[2 * pairs + i],))
            facts.append(None)
            shown.append(scene)
        states, last = critic.hidden(texts, looks)
        logits = critic.model.lm_head(states[-1][torch.arange(len(last)), last])
        truth = torch.tensor(truths)
        answers = F.cross_entropy(logits, torch.where(truth, critic.yes, critic.no))
        # second image's tokens: they end just before the newline and the word "answer"
        rows = [s for s in second if s is not None]
        at = last[[r for _, _, r in rows]]
        where = at[:, None] - 1 - grid + torch.arange(grid)
        between = states[-2][torch.tensor([r for _, _, r in rows])[:, None], where]
        own, other, wanted, bits = heads.cell(_by_cell(between)).split([sum(heads.sizes)] * 3 + [4], -1)
        firsts, seconds = labels[[a for a, _, _ in rows]], labels[[b for _, b, _ in rows]]
        goals = _labels([_goal(edits[a], after[a]) for a, _, _ in rows])
        cross = heads.cells(own, seconds) + heads.cells(other, firsts) + heads.cells(wanted, goals)
        wrong = torch.tensor([_faults(edits[a], after[a]) for a, _, _ in rows])
        match = F.binary_cross_entropy_with_logits(bits, wrong[:, :, None].expand_as(bits))
        # of one image: does the cell hold what the question asks for?
        single = [r for r, scene in enumerate(shown) if scene is not None]
        where = last[single][:, None] - 1 - grid + torch.arange(grid)
        holds = heads.cell(_by_cell(states[-2][torch.tensor(single)[:, None], where]))[..., -1]
        fits = torch.tensor([_fits(texts[r], shown[r]) for r in single])
        match = match + F.binary_cross_entropy_with_logits(holds, fits[:, :, None].expand_as(holds))
        told = [i for i, f in enumerate(facts) if f is not None]
        named, value = heads.answer(states[-2][torch.arange(len(last)), last][told]).split([5, len(VALUES)], 1)
        about = torch.tensor([facts[i] for i in told])
        final = F.cross_entropy(named, about[:, 0]) + F.cross_entropy(value, about[:, 1])
        correct = ((logits[:, critic.yes] > logits[:, critic.no]) == truth).float()
        pairs_right = correct[told].mean()
        figures = {
            "right": float(pairs_right),
            "dense": float(dense.detach()),
            "cross": float(cross.detach()),
            "match": float(match.detach()),
            "final": float(final.detach()),
        }
        return 2 * answers + 0.3 * dense + 0.2 * cross + 2 * match + 0.3 * final, figures

    learned = nn.ModuleDict({"model": model, "heads": heads})
    fit("critic", learned, loss, folder, steps, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01, seed=seed, ema=0.998)
    model.requires_grad_(False)
    return critic


def _goal(edit: Edit, seen: Scene) -> Scene:
    """What the second image should hold. An added thing may have any size: the one it has."""
    scene = goal(edit, reading_of(seen))
    for i, (thing, now) in enumerate(zip(scene.cells, seen.cells)):
        if edit.edit_type == "add" and thing is not None and now is not None and edit.reference.cells[i] is None:
            scene = scene.with_cell(i, replace(thing, size=now.size))
    return scene


def _faults(edit: Edit, seen: Scene) -> list[list[float]]:
    """For each cell: is a fact that was asked for missing there, is one disturbed there, and the same of the whole
    scene."""
    undone, disturbed = faults(edit, reading_of(seen))
    whole = {"background", "style"}
    return [
        [float(any(f.startswith(f"{i}.") for f in some)) for some in (undone, disturbed)]
        + [float(bool(some & whole)) for some in (undone, disturbed)]
        for i in range(4)
    ]


def _fits(question: str, scene: Scene) -> list[float]:
    """For each cell: does it hold what a presence question asks for?"""
    names = set(question.split(" a ", 1)[1].split()) - {"shape", "?"}
    return [float(t is not None and names <= set(t.look)) for t in scene.cells]


def _facts(edit: Edit, images: int) -> tuple[int, int]:
    """What the answer position should know: the cell that the instruction names (4: none), and the value it asks
    for."""
    named = edit.cell if images == 2 and edit.cell >= 0 else 4
    return named, VALUES.index(edit.value or (PLACES[edit.to_cell] if edit.to_cell >= 0 else ""))


# --------------------------------------------------------------------------------------------------------- examination


@torch.no_grad()
def examine(critic: LlavaOnevision, vae: AutoencoderKL, count: int, seed: int, damage: bool) -> dict[str, float]:
    """Share of right answers on held-out scenes and phrasings, by kind of question ("edit/add", "identity",
    "presence", "same")."""
    rng = random.Random(f"held-out/critic/{seed}")
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[bool]] = {}
    for _ in range(0, count, 36):
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)], held_out=True) for i in range(36)]
        after = [candidate(e, rng) for e in edits]
        images = render([e.reference for e in edits] + after)
        if damage:
            images = torch.cat([images[:36], damaged(images[36:], vae, rng, generator, share=1.0)])
        seen = critic.see(images)
        texts, looks, truths, kinds = [], [], [], []
        for i, (edit, scene) in enumerate(zip(edits, after)):
            asked = asked_about(edit, scene)
            same = questions_for(NOTHING, "", "", "short")[0].text
            asked.append((same, 2, reading_of(scene) == reading_of(edit.reference)))
            for (text, images_shown, truth), kind in zip(
                asked, (f"edit/{edit.edit_type}", f"identity/{edit.edit_type}", "same")
            ):
                texts.append(text)
                truths.append(truth)
                kinds.append(kind)
                looks.append((seen[i], seen[36 + i]) if images_shown == 2 else (seen[36 + i],))
            text, truth = asked_of_one(scene, rng)
            texts.append(text)
            truths.append(truth)
            kinds.append("presence")
            looks.append((seen[36 + i],))
        says = critic.margin(texts, looks) > 0
        for kind, a, b in zip(kinds, says.tolist(), truths):
            right.setdefault(kind, []).append(a == b)
    return {kind: sum(r) / len(r) for kind, r in sorted(right.items())}
