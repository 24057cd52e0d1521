"""Train the toy's parts from random weights and save them as ordinary diffusers and transformers folders.

    FOLDER/base      FluxPipeline: vae, transformer, text encoders, tokenizers, scheduler
    FOLDER/critic    LLaVA-OneVision
    FOLDER/parts.json    what each part reached on held-out scenes

With lessons about scene edits, or about rubrics and grades, FOLDER/critic is the embedded critic, trained on; no other
part is made.

Each part is resumable: the same command resumes, and a finished part is not trained again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import embedded_weights
from npedit.runs.checkpoint import explain_write_errors, write_text
from npedit.toy.edits import EDIT_TYPES, sample_edit
from npedit.toy.oracle import judge_edit, read_scene
from npedit.toy.world import render
from npedit.toy_models import rubric_critic, scene_critic
from npedit.toy_models.base_model import caption_accuracy, train_base
from npedit.toy_models.critic import evaluate_critic, train_critic
from npedit.toy_models.embedded_critic import load_critic, load_vae
from npedit.toy_models.vae import reconstruction_psnr, train_vae

STEPS = {"vae": 1500, "base": 24000, "critic": 13500}  # batches; some three and a half hours on two CPU cores
CPU = torch.device("cpu")


def build_toy_models(folder: Path, steps: dict[str, int] | None = None, seed: int = 0) -> dict[str, object]:
    """Train VAE, text-to-image model and critic, one after the other, and measure them. Returns the content of
    `parts.json`.

    Raises:
        UserError: the folder belongs to other lessons, or cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _require_lessons(folder, "all")
    steps = STEPS | (steps or {})
    if not (folder / "vae").is_dir():
        _write_folder(train_vae(folder, steps["vae"], seed), folder / "vae")
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    if not (folder / "base").is_dir():
        pipe = copy.copy(train_base(folder, vae, steps["base"], seed))
        for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
            part.half()  # half the size; opened as float32
        _write_folder(pipe, folder / "base")
    if not (folder / "critic").is_dir():
        critic = train_critic(folder, vae, steps["critic"], seed)
        critic.model.half()
        _write_folder(critic, folder / "critic")
    measured = measure_models(folder)
    write_text(folder / "parts.json", json.dumps({"steps": steps, "seed": seed, **measured}, indent=1) + "\n")
    return measured


@dataclass(frozen=True)
class Lessons:
    """How the embedded critic is trained on: the functions, and their usual numbers of batches and of edits a batch."""

    train: Callable[..., LlavaOnevision]
    evaluate: Callable[..., dict[str, float]]
    steps: int
    edits_per_step: int


LESSONS = {
    "scene": Lessons(
        scene_critic.train_scene_critic,
        scene_critic.evaluate_scene_critic,
        scene_critic.STEPS,
        scene_critic.EDITS_PER_STEP,
    ),
    "rubric": Lessons(
        rubric_critic.train_rubric_critic,
        rubric_critic.evaluate_rubric_critic,
        rubric_critic.STEPS,
        rubric_critic.EDITS_PER_STEP,
    ),
}


def train_critic_on(
    folder: Path, lessons: str, steps: int = 0, seed: int = 0, items: int = 900, edits_per_step: int = 0
) -> dict[str, object]:
    """Train the embedded critic on with one of `LESSONS`, into FOLDER/critic, and measure it on `items` held-out edits.
    Returns the content of `parts.json`: shares of right answers by question. With 0, `steps` (batches) and
    `edits_per_step` are the usual ones. Resumable like `build_toy_models`.

    Raises:
        UserError: the folder belongs to other lessons, or cannot be written.
    """
    chosen = LESSONS[lessons]
    steps = steps or chosen.steps
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _require_lessons(folder, lessons)
    if not (folder / "critic").is_dir():
        critic = chosen.train(folder, steps, seed, edits_per_step or chosen.edits_per_step)
        critic.model.half()
        _write_folder(critic, folder / "critic")
    return _measure_critic(folder, chosen.evaluate, items, {"lessons": lessons, "steps": steps, "seed": seed})


def _require_lessons(folder: Path, lessons: str) -> None:
    """Refuse a folder whose critic had other lessons.

    Raises:
        UserError: it had.
    """
    facts = folder / "parts.json"
    found = json.loads(facts.read_text()).get("lessons", "all") if facts.is_file() else lessons
    if found != lessons:
        raise UserError(f"expected a folder of the lessons {lessons!r}; {folder} has {found!r}; choose another folder")


def _measure_critic(
    folder: Path, evaluate: Callable[..., dict[str, float]], items: int, facts: dict[str, object]
) -> dict[str, object]:
    """Measure FOLDER/critic on held-out edits and write the figures into `parts.json`, beside `facts`."""
    critic, vae = load_critic(folder / "critic"), load_vae()
    measured: dict[str, object] = {
        "critic_right_clean": evaluate(critic, vae, items, 1, damage=False),
        "critic_right_damaged": evaluate(critic, vae, items, 1, damage=True),
        "items": items,
    }
    facts = facts | {"steps": {"critic": facts["steps"]}}
    write_text(folder / "parts.json", json.dumps(facts | measured, indent=1) + "\n")
    return measured


def _write_folder(part: Any, folder: Path) -> None:
    """Save aside, then rename: a folder that is there is whole."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with explain_write_errors(folder):
        aside.mkdir()
        if isinstance(part, LlavaOnevision):
            part.save(aside)
        else:
            part.save_pretrained(aside)
    for path in aside.rglob("*.json"):  # the folder where a part was made concerns nobody
        found = json.loads(path.read_text())
        if found.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(found, indent=2) + "\n")
    os.replace(aside, folder)


def train_graded_critic(folder: Path, batches: int, items: int, seed: int = 0) -> float:
    """Train a critic for so many batches, on the embedded VAE, into FOLDER/critic; none is trained for 0 batches, where
    the embedded critic is meant. Returns its share of right answers on clean, held-out images, the mean over kinds of
    question, kept in FOLDER/right.json. Resumable like `build`."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    result_file = folder / "right.json"
    if not result_file.is_file():
        vae = load_vae()
        if batches and not (folder / "critic").is_dir():
            critic = train_critic(folder, vae, batches, seed)
            critic.model.half()
            _write_folder(critic, folder / "critic")
        critic = load_critic(folder / "critic" if batches else embedded_weights("critic"))
        accuracy = evaluate_critic(critic, vae, items, seed=1, damage=False)
        write_text(result_file, json.dumps({"batches": batches, "items": items, "right": accuracy}, indent=1) + "\n")
    found = json.loads(result_file.read_text())
    if found["batches"] != batches:
        raise UserError(
            f"expected a critic of {batches} batches in {folder}; got one of {found['batches']}; choose another folder"
        )
    return sum(found["right"].values()) / len(found["right"])


@torch.no_grad()
def vae_roundtrip_accuracy(family: Flux, items: int, seed: int) -> float:
    """Share of true edits that the oracle still accepts when they have been encoded and decoded: the editor's bound."""
    edits = [
        sample_edit(random.Random(f"held-out/vae/{seed}/{i}"), EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(items)
    ]
    images = render([e.target for e in edits])
    reconstructed = torch.cat([family.decode(family.encode(x)) for x in images.split(64)]).clamp(0, 1)
    return sum(all(judge_edit(e, r)) for e, r in zip(edits, read_scene(reconstructed), strict=True)) / items


def measure_models(folder: Path, items: int = 1800, seed: int = 1) -> dict[str, object]:
    """Scores of the parts as saved, on held-out scenes and phrasings: see `reconstruction_psnr`, `caption_accuracy` and
    `evaluate_critic`."""
    family = Flux.load(folder / "base", torch.float32, CPU)
    critic = LlavaOnevision.load(folder / "critic", torch.float32, CPU)
    vae = family.pipe.vae
    return {
        "vae_psnr_db": round(reconstruction_psnr(vae, 512, seed), 2),
        "edits_right_through_the_vae": vae_roundtrip_accuracy(family, 720, seed),
        "captions_right_20_steps_guidance_5": caption_accuracy(family, 512, seed),
        "captions_right_held_out_phrasings": caption_accuracy(family, 512, seed, held_out=True),
        "critic_right_clean": evaluate_critic(critic, vae, items, seed, damage=False),
        "critic_right_damaged": evaluate_critic(critic, vae, items, seed, damage=True),
        "items": items,
    }
