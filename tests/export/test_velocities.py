"""One call of the net in an exported pipeline is the family's own call: the same text, latents, velocity and pixels."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npedit.families.base import Family
from npedit.families.krea2 import Krea2
from npedit.families.z_image import ZImage
from npedit.recipe.config import find_class
from tests.support.family_checks import latents, pictures

FAMILIES = ("flux", "krea2", "qwen_image", "sana", "sd3", "z_image")
PROMPTS = ["make it night", "x" * 40, "paint the circle red, and leave all else as it is"]
TIMES = torch.tensor([1.0, 0.6, 0.1])


def make_pipeline(family: Family, net: nn.Module) -> Any:
    """The exported pipeline on the parts of the family, with this net."""
    kind = import_module(f"npedit.export.pipelines.{type(family).__module__.rsplit('.', 1)[-1]}").NPEditPipeline
    config = dict(family.pipe.config)
    settings = {k: config[k] for k in inspect.signature(kind.__init__).parameters if k in config}
    editor = {"sizes": [[32, 32]], "steps": 4, "schedule": dict(family.pipe.scheduler.config)}
    parts = {"transformer": net, "scheduler": family.few_step_scheduler(3.0)}
    return kind(**{**settings, **family.pipe.components, **parts, "editor": editor})


@pytest.fixture(scope="module", params=[*((name, 0) for name in FAMILIES), ("flux", 1), ("krea2", 1)], ids=str)
def models(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, Any]:
    """(a tiny family, a net of it whose references count, the exported pipeline)"""
    name, seed = request.param
    family = find_class("families", name).tiny(seed)
    net = family.trainable_net().eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p += 0.05 * torch.randn(p.shape, generator=stream)
    return family, net, make_pipeline(family, net)


@torch.no_grad()
def both_velocities(
    models: tuple[Family, nn.Module, Any], prompts: list[str], references: int
) -> tuple[Tensor, Tensor]:
    """The velocity of the family and that of the pipeline, for items of different prompts and times."""
    family, net, pipe = models
    x, t = latents(family, len(prompts), 32, 64), TIMES.repeat(2)[: len(prompts)]
    given = [latents(family, len(prompts), 32, 64, seed=1 + i) for i in range(references)]
    wanted = family.velocity(net, x, t, family.encode_text(prompts), given)
    return wanted, pipe._velocity(x, t, pipe._encode_text(prompts, family.device), given)


@pytest.mark.parametrize("references", [1, 2])
def test_the_velocity_is_the_familys(models: tuple[Family, nn.Module, Any], references: int) -> None:
    wanted, found = both_velocities(models, PROMPTS, references)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_velocity_is_the_familys_in_bfloat16(models: tuple[Family, nn.Module, Any]) -> None:
    net = models[1].to(torch.bfloat16)
    try:
        wanted, found = both_velocities(models, PROMPTS, 1)
    finally:
        net.float()
    torch.testing.assert_close(found.float(), wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_by_the_family(models: tuple[Family, nn.Module, Any]) -> None:
    family, _, pipe = models
    images = pictures(2, 32, 64)
    z = family.encode(images)
    torch.testing.assert_close(pipe._encode_images(images), z, atol=1e-6, rtol=0)
    decoded = (pipe._decode_latents(3 * z) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, family.decode(3 * z).clamp(0, 1), atol=1e-5, rtol=0)
    assert pipe._multiple == family.facts.multiple and pipe._most_references == family.most_references


# ----------------------------------------------------------------------------------------------------------- Z-Image


@pytest.mark.parametrize("references", [1, 3])
def test_z_images_picture_lies_after_a_caption_of_any_length(references: int) -> None:
    """Captions are padded to 32 tokens: lengths of a whole number of blocks, of one token more, and of one less."""
    family = ZImage.tiny(0)
    template = int(family.encode_text([""]).parts[1][0])
    prompts = ["x" * (tokens - template) for tokens in (63, 64, 65, 90, 96, 128)]
    net = family.trainable_net().eval().requires_grad_(False)
    wanted, found = both_velocities((family, net, make_pipeline(family, net)), prompts, references)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert "patchify_and_embed_omni" not in vars(net)  # nothing stays behind


def test_a_net_that_takes_frames_is_called_with_frames() -> None:
    family = ZImage.tiny(0)
    net = family.trainable_net().eval().requires_grad_(False)
    omni, _ = both_velocities((family, net, make_pipeline(family, net)), PROMPTS, 1)
    net.register_to_config(_references="frames")
    family.thinking = False  # as `open_net` sets it for such a net
    wanted, found = both_velocities((family, net, pipe := make_pipeline(family, net)), PROMPTS, 1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (wanted - omni).abs().max() > 1e-3 and pipe._most_references == 1


# ------------------------------------------------------------------------------------------------------------ Krea 2


@pytest.mark.parametrize("seed", [0, 1], ids=["base", "distilled"])
def test_krea_2s_noise_shift(seed: int) -> None:
    family = Krea2.tiny(seed)
    pipe = make_pipeline(family, family.base)
    for size in ((32, 32), (512, 1024)):
        assert pipe._noise_shift(*size) == pytest.approx(family.noise_shift(*size))
    assert (family.noise_shift(32, 32) == family.noise_shift(512, 1024)) is (seed == 1)
