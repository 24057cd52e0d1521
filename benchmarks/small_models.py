"""A small Z-Image and a small InternVL: the real classes with random weights, for benchmarks without downloads.

The numbers of tokens are those of real models, so that the shares of an update are alike: the critic sees a picture as
256 tokens, as InternVL3 does at 448 pixels, and its attention groups keys and values. The widths are small, so that an
update takes seconds on a CPU. Widths of one's own make the models smaller still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from npedit.critics.internvl import InternVL
from npedit.data import Batch
from npedit.families.z_image import TEXT_LENGTH, ZImage
from npedit.recipe.config import LoraChoice, MemorySettings
from npedit.steps.base import Parts


@dataclass(frozen=True)
class Sizes:
    """Width and number of layers of each model, and the critic's side in pixels of a picture and of a patch."""

    denoiser: tuple[int, int] = (384, 6)
    text_encoder: tuple[int, int] = (192, 4)
    decoder: int = 32
    critic: tuple[int, int] = (320, 6)
    vision: tuple[int, int] = (128, 4)
    seen: tuple[int, int] = (224, 7)


TINY = Sizes((48, 1), (24, 1), 8, (56, 1), (16, 1), (32, 8))  # for tests


def build_z_image(sizes: Sizes = Sizes()) -> ZImage:
    """A Z-Image with a VAE of stride 8. Its tokenizer reads bytes, so a prompt has more tokens than a real one's."""
    tiny = ZImage.tiny(0)
    torch.manual_seed(0)
    (width, layers), (text_width, text_layers) = sizes.denoiser, sizes.text_encoder
    encoder = Qwen3Config(
        vocab_size=len(tiny.pipe.tokenizer), hidden_size=text_width, intermediate_size=3 * text_width,
        num_hidden_layers=text_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=text_width // 4,
        max_position_embeddings=TEXT_LENGTH, pad_token_id=tiny.pipe.tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(sizes.decoder // 2,) * 2 + (sizes.decoder,) * 2, layers_per_block=1, latent_channels=16,
        norm_num_groups=4, sample_size=256, shift_factor=0.1, scaling_factor=1.3, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    third = width // 4 // 8 * 2  # of a head's rotary numbers, which are even for each axis
    net = ZImageTransformer2DModel(
        in_channels=16, dim=width, n_layers=layers, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=text_width, axes_dims=[width // 4 - 2 * third, third, third], axes_lens=[1024, 512, 512],
    )  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, text_encoder=Qwen3Model(encoder),
        tokenizer=tiny.pipe.tokenizer, transformer=net,
    )  # fmt: skip
    return ZImage(pipe, torch.device("cpu"))


def build_internvl(sizes: Sizes = Sizes()) -> InternVL:
    """An InternVL whose language model has one head for keys and values to seven for queries, as InternVL3-8B has."""
    tiny = InternVL.tiny(0)
    torch.manual_seed(0)
    (width, layers), (seen_width, seen_layers), (side, patch) = sizes.critic, sizes.vision, sizes.seen
    tower = InternVLVisionConfig(
        hidden_size=seen_width, intermediate_size=4 * seen_width, num_hidden_layers=seen_layers, num_attention_heads=4,
        image_size=side, patch_size=patch,
    )  # fmt: skip
    language = Qwen2Config(
        vocab_size=len(tiny.tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=7, num_key_value_heads=1, head_dim=8 * max(1, width // 56), bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tokens = (side // patch // 2) ** 2
    config = InternVLConfig(
        vision_config=tower, text_config=language, image_token_id=tiny.model.config.image_token_id,
        image_seq_length=tokens, tie_word_embeddings=False,
    )  # fmt: skip
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=tiny.processor.image_mean,
        image_std=tiny.processor.image_std,
    )
    model = InternVLForConditionalGeneration(config)
    return InternVL(model, tiny.tokenizer, processor, tiny.template, tiny.device)


def build_parts(sizes: Sizes = Sizes(), memory: MemorySettings = MemorySettings()) -> Parts:
    """LoRA training of the small Z-Image, asked about by the small InternVL."""
    chosen = LoraChoice(rank=16, alpha=16)
    family, critic = build_z_image(sizes), build_internvl(sizes)
    return Parts(family, critic, "plain", family.device, chosen, memory)


def batch_of_one(number: int, side: int) -> Batch:
    """One item: a picture of noise, and texts as long as a real data set's."""
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(number))
    instruction, caption = ("paint the wooden fence dark red",), ("a garden with a dark red wooden fence",)
    source: Sequence[str] = ("a garden with a wooden fence",)
    return Batch((f"item-{number}",), picture, instruction, ("recolour",), ("fence",), tuple(source), caption)
