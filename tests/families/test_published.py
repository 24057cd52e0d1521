"""What is known of published checkpoints, and what follows from it: number types by part, clipping, warnings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from npedit.cli.main import app
from npedit.families._published import CHECKPOINTS, find_published, sampling_guidance
from npedit.families._without_weights import family_without_weights
from npedit.families.flux import Flux
from npedit.families.krea2 import Krea2
from npedit.families.sana import FLOAT16_MAX, Sana
from npedit.generator import generate_images
from npedit.recipe.config import find_class, load_recipe, make_recipe
from npedit.recipe.packaged import recipe_path
from npedit.training.checkpoint_warnings import checkpoint_warnings
from npedit.training.models_without_weights import PUBLISHED
from npedit.training.parts import build_parts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sana_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "Sana_1600M_512px_diffusers"
    Sana.tiny(0).pipe.save_pretrained(folder)
    return folder


def toy_recipe(**family: str):
    raw = load_recipe("toy").as_dict()
    return make_recipe({**raw, "family": {**raw["family"], **family}, "trainer": {**raw["trainer"], "benchmark": ""}})


def test_a_checkpoint_is_known_by_its_id_and_by_a_folder_of_its_name():
    known = CHECKPOINTS["Tongyi-MAI/Z-Image-Turbo"]
    for weights in ("Tongyi-MAI/Z-Image-Turbo", "/models/Z-Image-Turbo", Path("x/Tongyi-MAI--Z-Image-Turbo")):
        assert find_published(weights) is known
    assert find_published("Tongyi-MAI/Z-Image") is find_published("embedded") is None
    assert all(c.sources for c in CHECKPOINTS.values())


def test_a_number_type_for_each_part(sana_folder):
    """In training, without weights, and from the recipe: denoiser, text encoder and VAE each have their own."""
    recipe = toy_recipe(name="sana", weights=str(sana_folder), dtype="float32", text_dtype="bfloat16")
    assert recipe.family.dtypes() == {
        "transformer": torch.float32, "vae": torch.float32, "default": torch.bfloat16,
    }  # fmt: skip
    dtypes = {"transformer": torch.float32, "vae": torch.float16, "default": torch.bfloat16}
    published = PUBLISHED / "Efficient-Large-Model--Sana_1600M_1024px_BF16_diffusers"
    for family in (Sana.load(sana_folder, dtypes, CPU), family_without_weights(Sana, published, dtypes)):
        found = {n: next(m.parameters()).dtype for n, m in family.pipe.components.items() if isinstance(m, nn.Module)}
        assert found == {"transformer": torch.float32, "vae": torch.float16, "text_encoder": torch.bfloat16}
    family = Sana.load(sana_folder, recipe.family.dtypes(), CPU)
    x = family.encode(torch.rand(1, 3, 16, 16))
    with torch.no_grad():
        v = family.velocity(family.base, x, torch.tensor([0.5]), family.encode_text(["a dog"]))
    assert v.dtype is torch.float32 and family.decode(v).isfinite().all()


def test_attention_of_a_float16_checkpoint_is_clipped_in_every_type(sana_folder, tmp_path):
    """As float16 does it: base, trainable copy, base of adapters. Other checkpoints are left alone."""
    other = tmp_path / "Sana_1600M_1024px_BF16_diffusers"
    Sana.tiny(0).pipe.save_pretrained(other)
    outputs = {}
    for folder in (sana_folder, other):
        family = Sana.load(folder, torch.float32, CPU)
        for net in (family.base, family.trainable_net(), family.lora_base()):
            attention = net.transformer_blocks[0].attn1
            with torch.no_grad():
                attention.to_out[0].bias.fill_(1e6)
                outputs[folder.name, len(outputs)] = attention(torch.randn(1, 4, 32)).abs().max()
    assert [float(v) for (name, _), v in outputs.items() if name == sana_folder.name] == [FLOAT16_MAX] * 3
    assert all(v > 9e5 for (name, _), v in outputs.items() if name == other.name)


def test_a_wrong_number_type_is_warned_of_and_training_says_it(sana_folder, caplog):
    bad = toy_recipe(name="sana", weights=str(sana_folder), dtype="bfloat16", text_dtype="float16")
    messages = checkpoint_warnings(bad)
    assert len(messages) == 2 and "got dtype bfloat16" in messages[0] and "1024px_BF16" in messages[0]
    assert "family.text_dtype" in messages[1]
    good = {"name": "sana", "weights": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "dtype": "bfloat16"}
    assert checkpoint_warnings(toy_recipe(**good)) == []
    assert checkpoint_warnings(toy_recipe()) == []


def test_a_step_distilled_teacher_is_warned_of(tmp_path, caplog):
    """By its name, by the pipeline's own mark, and at the start of training; not where no teacher is used."""
    for weights in ("black-forest-labs/FLUX.1-schnell", "Tongyi-MAI/Z-Image-Turbo"):
        (message,) = checkpoint_warnings(toy_recipe(weights=weights))
        assert weights in message and "distilled" in message and find_published(weights).instead in message
    marked, plain = Krea2.tiny(1), Krea2.tiny(0)
    assert len(checkpoint_warnings(toy_recipe(), marked)) == 1 and checkpoint_warnings(toy_recipe(), plain) == []
    folder = tmp_path / "FLUX.1-schnell"
    Flux.tiny(0).pipe.save_pretrained(folder)
    recipe = toy_recipe(weights=str(folder))
    build_parts(recipe)
    assert "is distilled to a few steps" in caplog.text
    raw = recipe.as_dict()
    raw["stages"][1]["settings"]["dmd_weight"] = 0
    assert checkpoint_warnings(make_recipe(raw)) == []


def test_estimate_says_it_before_training():
    """Also for a model whose configs are not in the package, which is then refused."""
    result = CliRunner().invoke(app, ["estimate", "toy", "family.weights=black-forest-labs/FLUX.1-schnell"])
    assert result.exit_code == 2
    assert "is distilled to a few steps" in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["sana-24gb", "z-image-80gb", "z-image-8x80gb", "z-image-scene-80gb", "paper"])
def test_no_recipe_that_ships_is_warned_of(name):
    recipe = load_recipe(recipe_path(name))
    assert checkpoint_warnings(recipe) == []
    assert (PUBLISHED / recipe.family.weights.replace("/", "--")).is_dir()


def rows_through(net: nn.Module, run) -> int:
    """How many pictures go through the net while `run` runs."""
    rows = []

    def count(module, args, named):
        given = args[0] if args else named.get("hidden_states", named.get("x"))
        rows.append(len(given))

    hook = net.register_forward_pre_hook(count, with_kwargs=True)
    run()
    hook.remove()
    return sum(rows)


# Seed 1 is FLUX with the scale as an input. Without it FLUX is the toy, or distilled.
BASES = [("flux", 1), ("krea2", 0), ("qwen_image", 0), ("sana", 0), ("sd3", 0), ("z_image", 0)]


@pytest.mark.parametrize(("name", "seed"), BASES)
@torch.no_grad()
def test_a_base_model_is_guided_as_often_as_by_its_own_pipeline(name: str, seed: int):
    family = find_class("families", name).tiny(seed)
    side = 32
    words = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "latent"}
    if name not in ("krea2", "sana"):
        words |= {"negative_prompt": " "}  # Qwen-Image does not guide without one
    words |= {"use_resolution_binning": False} if name == "sana" else {}
    theirs = rows_through(family.base, lambda: family.pipe("a dog", **words))
    noise = torch.randn(1, family.facts.channels, *[side // family.facts.stride] * 2)
    guidance = sampling_guidance(family)
    assert rows_through(family.base, lambda: generate_images(family, ["a dog"], noise, [1.0, 0.5], guidance)) == theirs


@pytest.mark.parametrize(("name", "folder"), [("flux", "FLUX.1-schnell"), ("z_image", "Z-Image-Turbo")])
def test_a_distilled_checkpoint_makes_its_pictures_without_guidance(tmp_path: Path, name: str, folder: str):
    kind = find_class("families", name)
    assert sampling_guidance(kind.tiny(0)) == kind.tiny(0).facts.guidance > 1
    kind.tiny(0).pipe.save_pretrained(tmp_path / folder)
    assert sampling_guidance(kind.load(tmp_path / folder, torch.float32, CPU)) == 1


def test_the_warning_of_a_distilled_teacher_says_once_what_to_take_instead():
    (warning,) = checkpoint_warnings(toy_recipe(name="flux", weights="FLUX.1-schnell", dtype="bfloat16"))
    assert warning.count("Prefer") == 1 and warning.endswith(" Prefer black-forest-labs/FLUX.1-dev.")
