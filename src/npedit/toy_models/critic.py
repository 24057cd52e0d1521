"""Train the toy's critic: an ordinary transformers LLaVA-OneVision at toy size (SigLIP + Qwen2).

Yes/No alone leaves a small model blind to images for a long time, so auxiliary linear heads, dropped at the end, train
it to predict what the world knows: what each cell holds (on the visual tokens), what the other image holds in the same
cell (on the language model's states of the second image), what it should hold after the edit and what is wrong with it
(there too), and what the instruction names (at the answer position).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.questions import IDENTITY_EDIT, questions_for
from npedit.toy.edits import EDIT_TYPES, Edit, sample_edit
from npedit.toy.oracle import expected_reading, expected_scene, find_faults, judge_edit
from npedit.toy.words import SPECIAL_TOKENS, VALUES, new_tokenizer, vocabulary
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
from npedit.toy_models.mistakes import degrade, sample_outcome

PATCH = 8
LOOKS = (("", *SHAPES), ("", *COLOURS), ("", *PATTERNS), ("", *SIZES))  # "" is an empty cell
HALF_DONE_SHARE = 0.12  # share of edits shown half done, a blend of reference and target: Yes as far as it is done
LABEL_SMOOTHING = 0.02  # the share of the other answer in each lesson: a margin that grows for ever has no slope
LABELS_PER_CELL = len(LOOKS) + 2  # labels a cell: its look, and the scene's background and style


def untrained_critic(seed: int) -> LlavaOnevision:
    """An untrained critic that knows the toy's words and its other spellings of them."""
    critic = LlavaOnevision.untrained(
        vocabulary()[len(SPECIAL_TOKENS) :], seed, vision=(128, 384, 3), text=(144, 432, 5)
    )
    critic.tokenizer = new_tokenizer(256, ends=False)
    return critic


# ------------------------------------------------------------------------------------------------------ what is asked


def questions_about_edit(edit: Edit, seen: Scene) -> list[tuple[str, int, float]]:
    """The short questions about an edit: (text, images looked at, true answer) when the edited picture is `seen`."""
    applied, preserved = judge_edit(edit, expected_reading(seen))
    if edit.edit_type == "remove":  # asked of one image: is the thing there, wherever it is?
        names = set(edit.object.split()) - {"shape"}
        applied = not any(t is not None and names <= set(t.look) for t in seen.cells)
        # the thing itself may be there or not, but what it has been changed into is something new
        preserved &= seen.cells[edit.cell] is None or _has_same_look(edit, seen)
    asked: list[tuple[str, int, float]] = []
    for q in questions_for(edit.edit_type, edit.instruction, edit.object, "short"):
        truth = preserved if q.kind == "identity" else applied == (q.answer > 0)
        asked.append((q.text, len(q.looks_at), truth))
    return asked


def _has_same_look(edit: Edit, seen: Scene) -> bool:
    """Does the edit's cell hold the same thing as in the reference, whatever its size?"""
    return seen.thing(edit.cell).look[:3] == edit.reference.thing(edit.cell).look[:3]


def sample_presence_question(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """Is there such a thing? Half the time there is; else a thing that shares something with one that is."""
    thing = scene.thing(rng.choice(scene.filled)) if scene.filled else sample_thing(rng)
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


def _cell_labels(scenes: list[Scene]) -> Tensor:
    """What each cell holds, (b, 4, LABELS_PER_CELL) class numbers."""
    backs, styles = tuple(BACKGROUNDS), tuple(STYLES)
    rows = []
    for s in scenes:
        both = [backs.index(s.background), styles.index(s.style)]
        looks = [t.look if t else ("",) * 4 for t in s.cells]
        rows.append([[names.index(v) for names, v in zip(LOOKS, look)] + both for look in looks])
    return torch.tensor(rows)


class _AuxiliaryHeads(nn.Module):
    """The throw-away heads."""

    def __init__(self, text: int):
        super().__init__()
        self.sizes = [len(names) for names in LOOKS] + [len(BACKGROUNDS), len(STYLES)]
        self.cell = nn.Linear(text, 3 * sum(self.sizes) + 4)  # own, the other's, wanted; faults
        self.answer = nn.Linear(text, 5 + len(VALUES))

    def cell_loss(self, out: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of per-cell predictions out (n, 4 cells, 4 patches, sum(sizes)) for labels (n, 4,
        LABELS_PER_CELL)."""
        losses = []
        for k, logits in enumerate(out.split(self.sizes, -1)):
            target = labels[:, :, None, k].expand(logits.shape[:3])
            losses.append(F.cross_entropy(logits.flatten(0, 2), target.flatten()))
        return torch.stack(losses).sum()


def _by_cell(tokens: Tensor) -> Tensor:
    """Visual tokens (n, 16, d) -> (n, 4 cells, 4 patches, d)."""
    n, _, d = tokens.shape
    return tokens.view(n, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, d)


def train_critic(
    folder: Path, vae: AutoencoderKL, steps: int, seed: int = 0, pairs: int = 28, singles: int = 16
) -> LlavaOnevision:
    """Train the critic on `pairs` edits (both questions each) and `singles` presence questions a step."""
    critic = untrained_critic(seed)
    model = critic.model.requires_grad_(True)
    heads = _AuxiliaryHeads(144)
    grid = (SIDE // PATCH) ** 2

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(pairs)]
        after = [sample_outcome(e, rng) for e in edits]
        done = [
            rng.random() if rng.random() < HALF_DONE_SHARE else None for _ in edits
        ]  # how far a half-done edit has come
        after = [a if d is None else e.target if d > 0.5 else e.reference for a, d, e in zip(after, done, edits)]
        alone = [sample_scene(rng) for _ in range(singles)]
        scenes = [e.reference for e in edits] + after + alone
        images = render(scenes)
        for i, (edit, d) in enumerate(zip(edits, done)):
            if d is not None:
                images[pairs + i] = torch.lerp(images[i], render([edit.target])[0], d)
        images = degrade(images, vae, rng, generator)
        seen = critic.encode_images(images)
        labels = _cell_labels(scenes)
        tower = torch.stack([s[:grid] for s in seen])
        # the projector's output is as wide as the language model; a head on it trains tower and projector alike
        dense = heads.cell_loss(heads.cell(_by_cell(tower))[..., : sum(heads.sizes)], labels)
        texts: list[str] = []
        truths: list[float] = []
        looks, second, shown = [], [], []
        facts: list[tuple[int, int] | None] = []
        for i, (edit, scene) in enumerate(zip(edits, after)):
            asked = questions_about_edit(edit, scene)
            share = done[i]
            if share is not None:
                (_, _, after_all), (_, _, before) = (
                    questions_about_edit(edit, edit.target)[0],
                    questions_about_edit(edit, edit.reference)[0],
                )
                asked = [(*asked[0][:2], share * after_all + (1 - share) * before), asked[1]]
            elif rng.random() < 0.06:
                same = questions_for(IDENTITY_EDIT, "", "", "short")[0].text
                asked = [(same, 2, expected_reading(scene) == expected_reading(edit.reference))]
            for text, count, truth in asked:
                texts.append(text)
                truths.append(truth)
                looks.append((seen[i], seen[pairs + i]) if count == 2 else (seen[pairs + i],))
                facts.append(_answer_facts(edit, count))
                second.append((i, pairs + i, len(texts) - 1) if count == 2 else None)
                shown.append(scene if count == 1 else None)
        for i, scene in enumerate(alone):
            text, truth = sample_presence_question(scene, rng)
            texts.append(text)
            truths.append(truth)
            looks.append((seen[2 * pairs + i],))
            facts.append(None)
            shown.append(scene)
        states, last = critic.hidden_states(texts, looks)
        logits = critic.model.lm_head(states[-1][torch.arange(len(last)), last])
        true = torch.tensor(truths, dtype=torch.float32)
        soft = LABEL_SMOOTHING + (1 - 2 * LABEL_SMOOTHING) * true
        said = logits.log_softmax(1)
        answers = -(soft * said[:, critic.yes] + (1 - soft) * said[:, critic.no]).mean()
        # second image's tokens: they end just before the newline and the word "answer"
        rows = [s for s in second if s is not None]
        at = last[[r for _, _, r in rows]]
        where = at[:, None] - 1 - grid + torch.arange(grid)
        between = states[-2][torch.tensor([r for _, _, r in rows])[:, None], where]
        own, other, wanted, bits = heads.cell(_by_cell(between)).split([sum(heads.sizes)] * 3 + [4], -1)
        firsts, seconds = labels[[a for a, _, _ in rows]], labels[[b for _, b, _ in rows]]
        goals = _cell_labels([_expected_scene(edits[a], after[a]) for a, _, _ in rows])
        cross = heads.cell_loss(own, seconds) + heads.cell_loss(other, firsts) + heads.cell_loss(wanted, goals)
        wrong = torch.tensor([_cell_faults(edits[a], after[a]) for a, _, _ in rows])
        match = F.binary_cross_entropy_with_logits(bits, wrong[:, :, None].expand_as(bits))
        # of one image: does the cell hold what the question asks for?
        single = {r: scene for r, scene in enumerate(shown) if scene is not None}
        where = last[list(single)][:, None] - 1 - grid + torch.arange(grid)
        holds = heads.cell(_by_cell(states[-2][torch.tensor(list(single))[:, None], where]))[..., -1]
        fits = torch.tensor([_cells_that_match(texts[r], scene) for r, scene in single.items()])
        match = match + F.binary_cross_entropy_with_logits(holds, fits[:, :, None].expand_as(holds))
        about_edits = [i for i, f in enumerate(facts) if f is not None]
        named, value = heads.answer(states[-2][torch.arange(len(last)), last][about_edits]).split([5, len(VALUES)], 1)
        about = torch.tensor([facts[i] for i in about_edits])
        final = F.cross_entropy(named, about[:, 0]) + F.cross_entropy(value, about[:, 1])
        correct = ((logits[:, critic.yes] > logits[:, critic.no]) == (true > 0.5)).float()
        pairs_right = correct[about_edits].mean()
        figures = {
            "right": float(pairs_right),
            "dense": float(dense.detach()),
            "cross": float(cross.detach()),
            "match": float(match.detach()),
            "final": float(final.detach()),
        }
        return 2 * answers + 0.3 * dense + 0.2 * cross + 2 * match + 0.3 * final, figures

    learned = nn.ModuleDict({"model": model, "heads": heads})
    rates: dict[str, Any] = {"lr": 1.5e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
    fit("critic", learned, loss, folder, steps, **rates, seed=seed, ema=0.998, again=True)
    model.requires_grad_(False)
    return critic


def _expected_scene(edit: Edit, seen: Scene) -> Scene:
    """What the second image should hold. An added thing may have any size: the one it has."""
    scene = expected_scene(edit, expected_reading(seen))
    for i, (thing, now) in enumerate(zip(scene.cells, seen.cells)):
        if edit.edit_type == "add" and thing is not None and now is not None and edit.reference.cells[i] is None:
            scene = scene.with_cell(i, replace(thing, size=now.size))
    return scene


def _cell_faults(edit: Edit, seen: Scene) -> list[list[float]]:
    """For each cell: is a fact that was asked for missing there, is one disturbed there, and the same of the whole
    scene."""
    undone, disturbed = find_faults(edit, expected_reading(seen))
    whole = {"background", "style"}
    return [
        [float(any(f.startswith(f"{i}.") for f in some)) for some in (undone, disturbed)]
        + [float(bool(some & whole)) for some in (undone, disturbed)]
        for i in range(4)
    ]


def _cells_that_match(question: str, scene: Scene) -> list[float]:
    """For each cell: does it hold what a presence question asks for?"""
    names = set(question.split(" a ", 1)[1].split()) - {"shape", "?"}
    return [float(t is not None and names <= set(t.look)) for t in scene.cells]


def _answer_facts(edit: Edit, images: int) -> tuple[int, int]:
    """What the answer position should know: the cell that the instruction names (4: none), and the value it asks
    for."""
    named = edit.cell if images == 2 and edit.cell >= 0 else 4
    return named, VALUES.index(edit.value or (PLACES[edit.to_cell] if edit.to_cell >= 0 else ""))


# --------------------------------------------------------------------------------------------------------- examination


@torch.no_grad()
def evaluate_critic(
    critic: LlavaOnevision, vae: AutoencoderKL, count: int, seed: int, damage: bool
) -> dict[str, float]:
    """Share of right answers on held-out scenes and phrasings, by kind of question ("edit/add", "identity",
    "presence", "same")."""
    rng = random.Random(f"held-out/critic/{seed}")
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[bool]] = {}
    for _ in range(0, count, 36):
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)], held_out=True) for i in range(36)]
        after = [sample_outcome(e, rng) for e in edits]
        images = render([e.reference for e in edits] + after)
        if damage:
            images = torch.cat([images[:36], degrade(images[36:], vae, rng, generator, share=1.0)])
        seen = critic.encode_images(images)
        texts, looks, truths, kinds = [], [], [], []
        for i, (edit, scene) in enumerate(zip(edits, after)):
            asked = questions_about_edit(edit, scene)
            same = questions_for(IDENTITY_EDIT, "", "", "short")[0].text
            asked.append((same, 2, expected_reading(scene) == expected_reading(edit.reference)))
            for (text, images_shown, truth), kind in zip(
                asked, (f"edit/{edit.edit_type}", f"identity/{edit.edit_type}", "same")
            ):
                texts.append(text)
                truths.append(truth)
                kinds.append(kind)
                looks.append((seen[i], seen[36 + i]) if images_shown == 2 else (seen[36 + i],))
            text, truth = sample_presence_question(scene, rng)
            texts.append(text)
            truths.append(truth)
            kinds.append("presence")
            looks.append((seen[36 + i],))
        says = critic.margin(texts, looks) > 0
        for kind, a, b in zip(kinds, says.tolist(), truths):
            right.setdefault(kind, []).append(a == b)
    return {kind: sum(r) / len(r) for kind, r in sorted(right.items())}
