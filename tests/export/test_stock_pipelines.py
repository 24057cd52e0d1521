"""What docs/export.md says about diffusers' own pipelines: the arguments with which some give our editor's pictures,
and why others cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from npedit import flow, generator
from npedit.data._photos import to_pil, to_tensor
from npedit.editor import Editor
from npedit.export.export import export_editor
from npedit.families._shared import unpack_latents
from npedit.families.base import EncodedText, Family
from npedit.families.flux import Flux
from npedit.families.qwen_image import QwenImage
from npedit.families.sana import Sana
from npedit.families.z_image import ZImage
from tests.support.exported import SIZES, write_editor
from tests.support.family_checks import pictures, record_calls

STEPS, SEED = 3, 11
PROMPTS = ["paint the circle red", "make it night, and leave everything else as it is"]


def photos(count: int, height: int, width: int, seed: int = 3) -> list[Image.Image]:
    return [to_pil(image) for image in pictures(count, height, width, seed)]


def trained_net(family: Family) -> nn.Module:
    """A net whose output differs from the base's."""
    net = family.trainable_net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net.eval().requires_grad_(False)


def stock(kind: Any, family: Family, net: nn.Module, height: int, width: int, **more: Any) -> Any:
    """A pipeline of diffusers on the family's parts, with the editor's net and few-step scheduler."""
    scheduler = family.few_step_scheduler(family.noise_shift(height, width))
    pipe = kind(**{**family.pipe.components, "transformer": net, "scheduler": scheduler, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def global_noise(shape: tuple[int, ...], packed: bool) -> list[Tensor]:
    """The noise of each step after `torch.manual_seed(SEED)`. The pipelines whose latents are packed draw the noise of
    the first step before they pack them, and later noise in the packed shape."""
    draw = torch.Generator().manual_seed(SEED)
    noise = [torch.randn(shape, generator=draw)]
    b, c, h, w = shape
    for _ in range(STEPS - 1):
        tokens = torch.randn((b, h * w // 4, 4 * c) if packed else shape, generator=draw)
        noise.append(unpack_latents(tokens, h // 2, w // 2) if packed else tokens)
    return noise


@torch.no_grad()
def edited(
    family: Family, net: nn.Module, text: EncodedText, references: list[Tensor], size: tuple[int, int], packed: bool
) -> Tensor:
    """The training sampler's clean latents, with the noise that a stock pipeline draws after `torch.manual_seed`."""
    shape = (len(text), family.facts.channels, *(side // family.facts.stride for side in size))
    times = flow.few_step_times(STEPS, family.noise_shift(*size)).tolist()
    extra = torch.stack(references[1:], 1) if references[1:] else None
    return generator.generate_few_step(family, net, text, references[0], times, global_noise(shape, packed), extra)


def run_seeded(pipe: Callable[..., Any], **arguments: Any) -> Any:
    torch.manual_seed(SEED)
    return pipe(num_inference_steps=STEPS, **arguments).images


# ------------------------------------------------------------------------------------------------------------ FLUX.1


def kontext_arguments(family: Flux, height: int, width: int) -> dict[str, Any]:
    """What docs/export.md tells to give."""
    return {
        "height": height, "width": width, "max_area": height * width, "_auto_resize": False, "guidance_scale": 3.5,
        "max_sequence_length": family.text_length,
    }  # fmt: skip


@pytest.mark.parametrize("size", [(24, 40), (32, 32)])
@pytest.mark.parametrize("seed", [0, 1], ids=["schnell", "dev"])
def test_kontext_gives_the_editors_pictures(seed: int, size: tuple[int, int]) -> None:
    family = Flux.tiny(seed)
    net = trained_net(family)
    pipe = stock(FluxKontextPipeline, family, net, *size)
    images = photos(2, *size)
    theirs = run_seeded(pipe, image=images, prompt=PROMPTS, output_type="pt", **kontext_arguments(family, *size))
    reference = family.encode(torch.stack([to_tensor(image) for image in images]))
    x0 = edited(family, net, family.encode_text(PROMPTS), [reference], size, packed=True)
    torch.testing.assert_close(theirs, family.decode(x0).clamp(0, 1), atol=1e-4, rtol=0)
    assert (family.decode(x0).clamp(0, 1) - torch.stack([to_tensor(i) for i in images])).abs().mean() > 0.05


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kontext_opens_an_exported_editor(lora: bool, tmp_path: Path) -> None:
    """As docs/export.md does it: on the base model's folder, with the export's scheduler and weights."""
    out, size = tmp_path / "out", SIZES[0]
    export_editor(str(write_editor("flux", tmp_path, lora)), out, "diffusers")
    editor = Editor.open(out, device="cpu")
    assert isinstance(editor.family, Flux)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")}
    if not lora:
        parts["transformer"] = FluxTransformer2DModel.from_pretrained(out, subfolder="transformer")
    pipe = FluxKontextPipeline.from_pretrained(tmp_path / "base", **parts)
    if lora:
        pipe.load_lora_weights(out)
    images = photos(2, *size)
    theirs = run_seeded(pipe, image=images, prompt=PROMPTS, output_type="pt", **kontext_arguments(editor.family, *size))
    reference = editor.family.encode(torch.stack([to_tensor(image) for image in images]))
    x0 = edited(editor.family, editor.net, editor.family.encode_text(PROMPTS), [reference], size, packed=True)
    torch.testing.assert_close(theirs, editor.family.decode(x0).clamp(0, 1), atol=1e-4, rtol=0)


def test_kontexts_generator_does_not_repeat_a_picture() -> None:
    """The pipeline draws the first noise with the generator, and later noise without it."""
    family = Flux.tiny(0)
    pipe = stock(FluxKontextPipeline, family, trained_net(family), 24, 40)
    run = partial(pipe, image=photos(1, 24, 40), prompt=PROMPTS[0], output_type="pt", num_inference_steps=STEPS,
                  **kontext_arguments(family, 24, 40))  # fmt: skip
    one, other = (run(generator=torch.Generator().manual_seed(SEED)).images for _ in range(2))
    assert (one - other).abs().max() > 1e-3
    one, other = (run_seeded(run) for _ in range(2))
    assert torch.equal(one, other)


# -------------------------------------------------------------------------------------------------------- Qwen-Image


@pytest.fixture
def small_megapixel(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A size (H, W) to which Qwen-Image's editing pipelines scale references. They scale all to 1024 x 1024 pixels in
    area, which is too much for a test; here the area is small."""
    whole = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: whole(32 * 64, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 64)
    return 32, 64


@pytest.mark.parametrize(("kind", "count"), [
    (QwenImageEditPipeline, 1), (QwenImageEditPlusPipeline, 1), (QwenImageEditPlusPipeline, 2),
])  # fmt: skip
def test_qwen_image_edit_gives_the_editors_pictures(kind: Any, count: int, small_megapixel: tuple[int, int]) -> None:
    """At a size that these pipelines keep, and with the prompt encoded by QwenImagePipeline."""
    family, size = QwenImage.tiny(0), small_megapixel
    net, images = trained_net(family), photos(count, *size)
    pipe = stock(kind, family, net, *size, processor=None)
    text, mask = family.pipe.encode_prompt(PROMPTS[1], max_sequence_length=512)
    theirs = run_seeded(pipe, image=images, prompt_embeds=text, prompt_embeds_mask=mask, height=size[0], width=size[1],
                        true_cfg_scale=1.0, output_type="pt")  # fmt: skip
    references = [family.encode(to_tensor(image)[None]) for image in images]
    x0 = edited(family, net, family.encode_text(PROMPTS[1:]), references, size, packed=True)
    torch.testing.assert_close(theirs, family.decode(x0).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "kept"), [
    ((1024, 1024), True), ((832, 1248), True), ((512, 512), False), ((1024, 1536), False),
])  # fmt: skip
def test_which_sizes_qwen_image_edit_keeps(size: tuple[int, int], kept: bool) -> None:
    height, width = size
    scaled = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, width / height)[:2]
    assert (scaled == (width, height)) is kept


# ----------------------------------------------------------------------------------------------------------- Z-Image


def omni_pipeline(family: ZImage, net: nn.Module, size: tuple[int, int]) -> Any:
    eyes = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    return stock(ZImageOmniPipeline, family, net, *size, siglip=Siglip2VisionModel(eyes), siglip_processor=processor)


def omni_arguments(family: ZImage, tokens: int, size: tuple[int, int]) -> tuple[EncodedText, dict[str, Any]]:
    """A prompt with this number of tokens, and the arguments for it and a photo."""
    text = family.encode_text(["x" * (tokens - int(family.encode_text([""]).parts[1][0]))])
    states = text.parts[0][0, : int(text.parts[1][0])]
    return text, {
        "image": photos(1, *size), "prompt_embeds": [[states[:0], states]], "guidance_scale": 0.0, "height": size[0],
        "width": size[1], "output_type": "latent",
    }  # fmt: skip


@pytest.mark.parametrize(("tokens", "same"), [(64, True), (70, False)], ids=["whole-blocks", "other"])
def test_z_image_omni_places_the_picture_elsewhere(tokens: int, same: bool) -> None:
    """With a net that is told a width for SigLIP's states and a VAE in bfloat16, the pipeline gives the editor's
    pictures for prompts of 32, 64, ... tokens alone."""
    family, size = ZImage.tiny(1), (64, 96)
    net = trained_net(family)
    net.register_to_config(siglip_feat_dim=16)
    family.pipe.vae.to(torch.bfloat16)
    text, arguments = omni_arguments(family, tokens, size)
    calls, theirs = record_calls(net, lambda: run_seeded(omni_pipeline(family, net, size), **arguments))
    reference = calls[0]["x"][0][0].squeeze(1)[None]  # as the pipeline rounds it to bfloat16
    x0 = edited(family, net, text, [reference], size, packed=False)
    assert (float((x0 - theirs).abs().max()) < 1e-4) is same


def test_z_image_omni_needs_what_z_image_lacks() -> None:
    """Its net has no width for SigLIP's states, and the pipeline encodes in bfloat16 whatever the VAE's type."""
    family, size = ZImage.tiny(1), (64, 96)
    _, arguments = omni_arguments(family, 64, size)
    with pytest.raises(RuntimeError, match="type"):
        run_seeded(omni_pipeline(family, trained_net(family), size), **arguments)
    family.pipe.vae.to(torch.bfloat16)
    with pytest.raises(TypeError):
        run_seeded(omni_pipeline(family, trained_net(family), size), **arguments)


# ------------------------------------------------------------------------------------------------- the other families


@pytest.mark.parametrize(
    "kind", [Krea2Pipeline, QwenImagePipeline, SanaPipeline, StableDiffusion3Pipeline, ZImagePipeline]
)
def test_text_to_image_pipelines_take_no_reference(kind: Any) -> None:
    assert not {"image", "images", "reference"} & inspect.signature(kind.__call__).parameters.keys()


def test_sanas_pipeline_refuses_the_wider_net() -> None:
    """It takes the number of the latents' channels from the net's input."""
    family = Sana.tiny(0)
    pipe = stock(SanaPipeline, family, family.trainable_net().eval(), 32, 32)
    with pytest.raises(RuntimeError, match="size of tensor"):
        pipe("a dog", height=32, width=32, num_inference_steps=1, guidance_scale=1.0, use_resolution_binning=False)
