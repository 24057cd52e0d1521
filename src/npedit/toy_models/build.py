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
from npedit.toy_models.base_model import caption_accuracy, train_base
from npedit.toy_models.critic import evaluate_critic, train_critic
from npedit.toy_models.rubric_critic import EDITS_PER_STEP as RUBRIC_EDITS_PER_STEP
from npedit.toy_models.rubric_critic import STEPS as RUBRIC_STEPS
from npedit.toy_models.rubric_critic import evaluate_rubric_critic, train_rubric_critic
from npedit.toy_models.scene_critic import EDITS_PER_STEP as SCENE_EDITS_PER_STEP
from npedit.toy_models.scene_critic import STEPS as SCENE_STEPS
from npedit.toy_models.scene_critic import evaluate_scene_critic, load_critic, load_vae, train_scene_critic
from npedit.toy_models.vae import reconstruction_psnr, train_vae

STEPS = {"vae": 1500, "base": 24000, "critic": 13500}  # batches; some three and a half hours on two CPU cores
CPU = torch.device("cpu")


def build_toy_models(folder: Path, steps: dict[str, int] | None = None, seed: int = 0) -> dict[str, object]:
    """Train VAE, text-to-image model and critic, one after the other, and measure them. Returns the content of
    `parts.json`."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
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


def build_scene_critic(
    folder: Path,
    steps: int = SCENE_STEPS,
    seed: int = 0,
    items: int = 900,
    edits_per_step: int = SCENE_EDITS_PER_STEP,
) -> dict[str, object]:
    """Train the embedded critic on with scene edits, into FOLDER/critic, and measure it. Returns the content of
    `parts.json`: shares of right answers by question. Resumable like `build_toy_models`."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "critic").is_dir():
        critic = train_scene_critic(folder, steps, seed, edits_per_step)
        critic.model.half()
        _write_folder(critic, folder / "critic")
    return _measure_critic(folder, evaluate_scene_critic, items, {"lessons": "scene", "steps": steps, "seed": seed})


def build_rubric_critic(
    folder: Path,
    steps: int = RUBRIC_STEPS,
    seed: int = 0,
    items: int = 900,
    edits_per_step: int = RUBRIC_EDITS_PER_STEP,
) -> dict[str, object]:
    """Train the embedded critic on with rubrics and grades, into FOLDER/critic, and measure it. Returns the content of
    `parts.json`, as `evaluate_rubric_critic` gives it. Resumable like `build_toy_models`."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "critic").is_dir():
        critic = train_rubric_critic(folder, steps, seed, edits_per_step)
        critic.model.half()
        _write_folder(critic, folder / "critic")
    return _measure_critic(folder, evaluate_rubric_critic, items, {"lessons": "rubric", "steps": steps, "seed": seed})


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
        vae = AutoencoderKL.from_pretrained(embedded_weights("base") / "vae").requires_grad_(False)
        if batches and not (folder / "critic").is_dir():
            critic = train_critic(folder, vae, batches, seed)
            critic.model.half()
            _write_folder(critic, folder / "critic")
        critic = LlavaOnevision.load(folder / "critic" if batches else embedded_weights("critic"), torch.float32, CPU)
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
