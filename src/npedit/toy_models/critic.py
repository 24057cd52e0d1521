"""Train the toy's critic: an ordinary transformers LLaVA-OneVision at toy size (SigLIP + Qwen2).

With the Yes/No loss alone a small model ignores the images for many steps. So auxiliary linear heads, which are dropped
after training, predict facts of the toy world: the content of each cell (from the visual tokens); the content of the
same cell in the other image, its wanted content, and its faults (from the language model's states of the second image);
and the cell and value that the instruction names (from the state at the answer position).
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
APPEARANCE_VALUES = (("", *SHAPES), ("", *COLOURS), ("", *PATTERNS), ("", *SIZES))  # "" is an empty cell
HALF_DONE_SHARE = 0.12  # share of edits shown half done: a blend of reference and target, P(Yes) is the done share
LABEL_SMOOTHING = 0.02  # of the answers; without it the margin grows without bound and the gradient vanishes
LABELS_PER_CELL = len(APPEARANCE_VALUES) + 2  # labels of a cell: its appearance, and the scene's background and style


def untrained_critic(seed: int) -> LlavaOnevision:
    """An untrained critic that knows the toy's words and its other spellings of them."""
    critic = LlavaOnevision.untrained(
        vocabulary()[len(SPECIAL_TOKENS) :], seed, vision=(128, 384, 3), text=(144, 432, 5)
    )
    critic.tokenizer = new_tokenizer(256, add_eos=False)
    return critic


# ------------------------------------------------------------------------------------------------------ questions


def questions_about_edit(edit: Edit, edited_scene: Scene) -> list[tuple[str, int, float]]:
    """The short questions about an edit whose edited picture shows `edited_scene`: (text, number of images, true
    answer)."""
    applied, preserved = judge_edit(edit, expected_reading(edited_scene))
    if edit.edit_type == "remove":  # asked about one image: is the thing anywhere in it?
        names = set(edit.object.split()) - {"shape"}
        applied = not any(t is not None and names <= set(t.appearance) for t in edited_scene.cells)
        # the thing itself may be there or not; a thing that it was changed into is new
        preserved &= edited_scene.cells[edit.cell] is None or _has_same_appearance(edit, edited_scene)
    questions: list[tuple[str, int, float]] = []
    for q in questions_for(edit.edit_type, edit.instruction, edit.object, "short"):
        truth = preserved if q.kind == "identity" else applied == (q.answer > 0)
        questions.append((q.text, len(q.looks_at), truth))
    return questions


def _has_same_appearance(edit: Edit, edited_scene: Scene) -> bool:
    """Whether the edit's cell holds the same thing as in the reference; sizes may differ."""
    return edited_scene.thing(edit.cell).appearance[:3] == edit.reference.thing(edit.cell).appearance[:3]


def sample_presence_question(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A question whether a thing is in the scene, and the true answer. Half of the things are; the others share a
    feature with one that is."""
    thing = scene.thing(rng.choice(scene.filled)) if scene.filled else sample_thing(rng)
    words = {"pattern": thing.pattern, "colour": thing.colour, "shape": thing.shape}
    for field, values in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("pattern", PATTERNS)):
        if rng.random() < 0.3:
            words[field] = rng.choice(values)
    keep = rng.choice(
        (("colour", "shape"), ("colour", "shape"), ("shape",), ("colour",), ("pattern", "colour", "shape"))
    )
    names = [words[k] for k in keep]
    truth = any(t is not None and set(names) <= set(t.appearance) for t in scene.cells)
    text = " ".join([n for n in names if n != "solid"] + ([] if "shape" in keep else ["shape"]))
    if "solid" in names:
        truth = any(t is not None and set(names) - {"solid"} <= set(t.appearance) for t in scene.cells)
    return questions_for("remove", "", text, "short")[0].text, truth


# ------------------------------------------------------------------------------------------------------------ training


def _cell_labels(scenes: list[Scene]) -> Tensor:
    """The labels of each cell, class numbers (b, 4, LABELS_PER_CELL)."""
    backgrounds, styles = tuple(BACKGROUNDS), tuple(STYLES)
    rows = []
    for s in scenes:
        scene_labels = [backgrounds.index(s.background), styles.index(s.style)]
        appearances = [t.appearance if t else ("",) * 4 for t in s.cells]
        rows.append(
            [
                [names.index(v) for names, v in zip(APPEARANCE_VALUES, appearance)] + scene_labels
                for appearance in appearances
            ]
        )
    return torch.tensor(rows)


class _AuxiliaryHeads(nn.Module):
    """The auxiliary heads, which are dropped after training."""

    def __init__(self, text: int):
        super().__init__()
        self.sizes = [len(names) for names in APPEARANCE_VALUES] + [len(BACKGROUNDS), len(STYLES)]
        self.cell = nn.Linear(text, 3 * sum(self.sizes) + 4)  # content here, in the other image, wanted; faults
        self.answer = nn.Linear(text, 5 + len(VALUES))

    def cell_loss(self, out: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of per-cell predictions out (n, 4 cells, 4 patches, sum(sizes)) for labels (n, 4,
        LABELS_PER_CELL)."""
        losses = []
        for k, logits in enumerate(out.split(self.sizes, -1)):
            target = labels[:, :, None, k].expand(logits.shape[:3])
            losses.append(F.cross_entropy(logits.flatten(0, 2), target.flatten()))
        return torch.stack(losses).sum()


def by_cell(tokens: Tensor) -> Tensor:
    """Visual tokens (n, 16, d) -> (n, 4 cells, 4 patches, d)."""
    n, _, d = tokens.shape
    return tokens.view(n, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, d)


def train_critic(
    resume_folder: Path,
    vae: AutoencoderKL,
    steps: int,
    seed: int = 0,
    edits_per_step: int = 28,
    presence_questions_per_step: int = 16,
) -> LlavaOnevision:
    """The critic, trained on `edits_per_step` edits (two questions each) and `presence_questions_per_step` presence
    questions in each step. `resume_folder` keeps the state of an interrupted training."""
    critic = untrained_critic(seed)
    model = critic.model.requires_grad_(True)
    heads = _AuxiliaryHeads(144)
    grid = (SIDE // PATCH) ** 2

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(edits_per_step)]
        edited_scenes = [sample_outcome(e, rng) for e in edits]
        progress = [
            rng.random() if rng.random() < HALF_DONE_SHARE else None for _ in edits
        ]  # the share of the edit that is done, for half-done edits
        edited_scenes = [
            a if d is None else e.target if d > 0.5 else e.reference for a, d, e in zip(edited_scenes, progress, edits)
        ]
        single_scenes = [sample_scene(rng) for _ in range(presence_questions_per_step)]
        scenes = [e.reference for e in edits] + edited_scenes + single_scenes
        images = render(scenes)
        for i, (edit, d) in enumerate(zip(edits, progress)):
            if d is not None:
                images[edits_per_step + i] = torch.lerp(images[i], render([edit.target])[0], d)
        images = degrade(images, vae, rng, generator)
        visual_tokens = critic.encode_images(images)
        labels = _cell_labels(scenes)
        image_tokens = torch.stack([s[:grid] for s in visual_tokens])
        # a head on the projector's output trains the vision tower and the projector
        dense_loss = heads.cell_loss(heads.cell(by_cell(image_tokens))[..., : sum(heads.sizes)], labels)
        texts: list[str] = []
        truths: list[float] = []
        token_lists, second_images, single_image_scenes = [], [], []
        facts: list[tuple[int, int] | None] = []
        for i, (edit, scene) in enumerate(zip(edits, edited_scenes)):
            questions = questions_about_edit(edit, scene)
            fraction = progress[i]
            if fraction is not None:
                (_, _, wanted_answer), (_, _, reference_answer) = (
                    questions_about_edit(edit, edit.target)[0],
                    questions_about_edit(edit, edit.reference)[0],
                )
                questions = [
                    (*questions[0][:2], fraction * wanted_answer + (1 - fraction) * reference_answer),
                    questions[1],
                ]
            elif rng.random() < 0.06:
                same = questions_for(IDENTITY_EDIT, "", "", "short")[0].text
                questions = [(same, 2, expected_reading(scene) == expected_reading(edit.reference))]
            for text, count, truth in questions:
                texts.append(text)
                truths.append(truth)
                token_lists.append(
                    (visual_tokens[i], visual_tokens[edits_per_step + i])
                    if count == 2
                    else (visual_tokens[edits_per_step + i],)
                )
                facts.append(_answer_facts(edit, count))
                second_images.append((i, edits_per_step + i, len(texts) - 1) if count == 2 else None)
                single_image_scenes.append(scene if count == 1 else None)
        for i, scene in enumerate(single_scenes):
            text, truth = sample_presence_question(scene, rng)
            texts.append(text)
            truths.append(truth)
            token_lists.append((visual_tokens[2 * edits_per_step + i],))
            facts.append(None)
            single_image_scenes.append(scene)
        states, last = critic.hidden_states(texts, token_lists)
        logits = critic.model.lm_head(states[-1][torch.arange(len(last)), last])
        truth_tensor = torch.tensor(truths, dtype=torch.float32)
        smoothed = LABEL_SMOOTHING + (1 - 2 * LABEL_SMOOTHING) * truth_tensor
        log_probabilities = logits.log_softmax(1)
        answer_loss = -(
            smoothed * log_probabilities[:, critic.yes] + (1 - smoothed) * log_probabilities[:, critic.no]
        ).mean()
        # the tokens of the second image end just before the newline and the word "answer"
        rows = [s for s in second_images if s is not None]
        answer_positions = last[[r for _, _, r in rows]]
        positions = answer_positions[:, None] - 1 - grid + torch.arange(grid)
        second_states = states[-2][torch.tensor([r for _, _, r in rows])[:, None], positions]
        own_logits, other_logits, wanted_logits, fault_logits = heads.cell(by_cell(second_states)).split(
            [sum(heads.sizes)] * 3 + [4], -1
        )
        first_labels, second_labels = labels[[a for a, _, _ in rows]], labels[[b for _, b, _ in rows]]
        wanted_labels = _cell_labels([_expected_scene(edits[a], edited_scenes[a]) for a, _, _ in rows])
        cross_loss = (
            heads.cell_loss(own_logits, second_labels)
            + heads.cell_loss(other_logits, first_labels)
            + heads.cell_loss(wanted_logits, wanted_labels)
        )
        faults = torch.tensor([_cell_faults(edits[a], edited_scenes[a]) for a, _, _ in rows])
        match_loss = F.binary_cross_entropy_with_logits(fault_logits, faults[:, :, None].expand_as(fault_logits))
        # questions about one image: does the cell hold what the question asks for?
        single = {r: scene for r, scene in enumerate(single_image_scenes) if scene is not None}
        positions = last[list(single)][:, None] - 1 - grid + torch.arange(grid)
        match_logits = heads.cell(by_cell(states[-2][torch.tensor(list(single))[:, None], positions]))[..., -1]
        matches = torch.tensor([_cells_that_match(texts[r], scene) for r, scene in single.items()])
        match_loss = match_loss + F.binary_cross_entropy_with_logits(
            match_logits, matches[:, :, None].expand_as(match_logits)
        )
        about_edits = [i for i, f in enumerate(facts) if f is not None]
        cell_logits, value_logits = heads.answer(states[-2][torch.arange(len(last)), last][about_edits]).split(
            [5, len(VALUES)], 1
        )
        answer_labels = torch.tensor([facts[i] for i in about_edits])
        answer_fact_loss = F.cross_entropy(cell_logits, answer_labels[:, 0]) + F.cross_entropy(
            value_logits, answer_labels[:, 1]
        )
        correct = ((logits[:, critic.yes] > logits[:, critic.no]) == (truth_tensor > 0.5)).float()
        edit_accuracy = correct[about_edits].mean()
        figures = {
            "right": float(edit_accuracy),
            "dense": float(dense_loss.detach()),
            "cross": float(cross_loss.detach()),
            "match": float(match_loss.detach()),
            "final": float(answer_fact_loss.detach()),
        }
        return 2 * answer_loss + 0.3 * dense_loss + 0.2 * cross_loss + 2 * match_loss + 0.3 * answer_fact_loss, figures

    trained = nn.ModuleDict({"model": model, "heads": heads})
    rates: dict[str, Any] = {"lr": 1.5e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
    fit("critic", trained, loss, resume_folder, steps, **rates, seed=seed, ema=0.998, with_restart=True)
    model.requires_grad_(False)
    return critic


def _expected_scene(edit: Edit, edited_scene: Scene) -> Scene:
    """The scene that the second image should show. An added thing may have any size: the expected one is the actual
    one."""
    scene = expected_scene(edit, expected_reading(edited_scene))
    for i, (thing, edited_thing) in enumerate(zip(scene.cells, edited_scene.cells)):
        if (
            edit.edit_type == "add"
            and thing is not None
            and edited_thing is not None
            and edit.reference.cells[i] is None
        ):
            scene = scene.with_cell(i, replace(thing, size=edited_thing.size))
    return scene


def _cell_faults(edit: Edit, edited_scene: Scene) -> list[list[float]]:
    """For each cell, four labels: a requested fact is missing in the cell, a fact has changed without request in the
    cell, and both again for the background and style of the whole scene."""
    undone, disturbed = find_faults(edit, expected_reading(edited_scene))
    scene_facts = {"background", "style"}
    return [
        [float(any(f.startswith(f"{i}.") for f in faults)) for faults in (undone, disturbed)]
        + [float(bool(faults & scene_facts)) for faults in (undone, disturbed)]
        for i in range(4)
    ]


def _cells_that_match(question: str, scene: Scene) -> list[float]:
    """For each cell, whether it holds the thing that a presence question asks for."""
    names = set(question.split(" a ", 1)[1].split()) - {"shape", "?"}
    return [float(t is not None and names <= set(t.appearance)) for t in scene.cells]


def _answer_facts(edit: Edit, images: int) -> tuple[int, int]:
    """The labels of the answer position: the cell that the instruction names (4: none), and the value that it asks
    for."""
    named = edit.cell if images == 2 and edit.cell >= 0 else 4
    return named, VALUES.index(edit.value or (PLACES[edit.to_cell] if edit.to_cell >= 0 else ""))


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_critic(
    critic: LlavaOnevision, vae: AutoencoderKL, count: int, seed: int, damage: bool
) -> dict[str, float]:
    """Share of right answers on held-out scenes and phrasings, by kind of question ("edit/add", "identity",
    "presence", "same")."""
    rng = random.Random(f"held-out/critic/{seed}")
    generator = torch.Generator().manual_seed(seed)
    results: dict[str, list[bool]] = {}
    for _ in range(0, count, 36):
        edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)], held_out=True) for i in range(36)]
        edited_scenes = [sample_outcome(e, rng) for e in edits]
        images = render([e.reference for e in edits] + edited_scenes)
        if damage:
            images = torch.cat([images[:36], degrade(images[36:], vae, rng, generator, share=1.0)])
        visual_tokens = critic.encode_images(images)
        texts, token_lists, truths, kinds = [], [], [], []
        for i, (edit, scene) in enumerate(zip(edits, edited_scenes)):
            questions = questions_about_edit(edit, scene)
            same = questions_for(IDENTITY_EDIT, "", "", "short")[0].text
            questions.append((same, 2, expected_reading(scene) == expected_reading(edit.reference)))
            for (text, images_shown, truth), kind in zip(
                questions, (f"edit/{edit.edit_type}", f"identity/{edit.edit_type}", "same")
            ):
                texts.append(text)
                truths.append(truth)
                kinds.append(kind)
                token_lists.append(
                    (visual_tokens[i], visual_tokens[36 + i]) if images_shown == 2 else (visual_tokens[36 + i],)
                )
            text, truth = sample_presence_question(scene, rng)
            texts.append(text)
            truths.append(truth)
            kinds.append("presence")
            token_lists.append((visual_tokens[36 + i],))
        is_yes = critic.margin(texts, token_lists) > 0
        for kind, a, b in zip(kinds, is_yes.tolist(), truths):
            results.setdefault(kind, []).append(a == b)
    return {kind: sum(r) / len(r) for kind, r in sorted(results.items())}
