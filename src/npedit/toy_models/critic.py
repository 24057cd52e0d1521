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
from npedit.toy.oracle import faults, goal, judge, reading_of
from npedit.toy.words import MARKS, VALUES, new_tokenizer, vocabulary
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
from npedit.toy_models.fit import fit
from npedit.toy_models.mistakes import candidate, damaged

PATCH = 8
LOOKS = (("", *SHAPES), ("", *COLOURS), ("", *PATTERNS), ("", *SIZES))  # "" is an empty cell
HALF_DONE = 0.12  # share of edits shown half done, a blend of reference and target: Yes as far as it is done
DOUBT = 0.02  # the share of the other answer in each lesson: a margin that grows for ever has no slope
HELD = len(LOOKS) + 2  # labels a cell: its look, and the scene's background and style


def new_critic(seed: int) -> LlavaOnevision:
    """An untrained critic that knows the toy's words and its other spellings of them."""
    critic = LlavaOnevision.new(vocabulary()[len(MARKS) :], seed, vision=(128, 384, 3), text=(144, 432, 5))
    critic.tokenizer = new_tokenizer(256, ends=False)
    return critic


# ------------------------------------------------------------------------------------------------------ what is asked


def asked_about(edit: Edit, seen: Scene) -> list[tuple[str, int, bool]]:
    """The short questions about an edit: (text, images looked at, true answer) when the edited picture is `seen`."""
    applied, preserved = judge(edit, reading_of(seen))
    if edit.edit_type == "remove":  # asked of one image: is the thing there, wherever it is?
        names = set(edit.object.split()) - {"shape"}
        applied = not any(t is not None and names <= set(t.look) for t in seen.cells)
        # the thing itself may be there or not, but what it has been changed into is something new
        preserved &= seen.cells[edit.cell] is None or _alike(edit, seen)
    asked = []
    for q in questions_for(edit.edit_type, edit.instruction, edit.object, "short"):
        truth = preserved if q.kind == "identity" else applied == (q.answer > 0)
        asked.append((q.text, len(q.looks_at), truth))
    return asked


def _alike(edit: Edit, seen: Scene) -> bool:
    """Does the edit's cell hold the same thing as in the reference, whatever its size?"""
    return seen.cells[edit.cell].look[:3] == edit.reference.cells[edit.cell].look[:3]


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
        done = [rng.random() if rng.random() < HALF_DONE else None for _ in edits]  # how far a half-done edit has come
        after = [a if d is None else e.target if d > 0.5 else e.reference for a, d, e in zip(after, done, edits)]
        alone = [sample_scene(rng) for _ in range(singles)]
        scenes = [e.reference for e in edits] + after + alone
        images = render(scenes)
        for i, (edit, d) in enumerate(zip(edits, done)):
            if d is not None:
                images[pairs + i] = torch.lerp(images[i], render([edit.target])[0], d)
        images = damaged(images, vae, rng, generator)
        seen = critic.see(images)
        labels = _labels(scenes)
        tower = torch.stack([s[:grid] for s in seen])
        # the projector's output is as wide as the language model; a head on it teaches tower and projector alike
        dense = heads.cells(heads.cell(_by_cell(tower))[..., : sum(heads.sizes)], labels)
        texts, looks, truths, facts, second, shown = [], [], [], [], [], []
        for i, (edit, scene) in enumerate(zip(edits, after)):
            asked = asked_about(edit, scene)
            if done[i] is not None:
                (_, _, after_all), (_, _, before) = (
                    asked_about(edit, edit.target)[0],
                    asked_about(edit, edit.reference)[0],
                )
                asked = [(*asked[0][:2], done[i] * after_all + (1 - done[i]) * before), asked[1]]
            elif rng.random() < 0.06:
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
        truth = torch.tensor(truths, dtype=torch.float32)
        soft = DOUBT + (1 - 2 * DOUBT) * truth
        said = logits.log_softmax(1)
        answers = -(soft * said[:, critic.yes] + (1 - soft) * said[:, critic.no]).mean()
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
        correct = ((logits[:, critic.yes] > logits[:, critic.no]) == (truth > 0.5)).float()
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
    rates = {"lr": 1.5e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
    fit("critic", learned, loss, folder, steps, **rates, seed=seed, ema=0.998, again=True)
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
