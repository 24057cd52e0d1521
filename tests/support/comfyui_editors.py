"""Tiny editors with the sizes that ComfyUI takes for granted: head width, position code, scale and channels of latents.

ComfyUI also takes the width of Z-Image and Qwen-Image for granted, which is thousands. Those two are narrower here.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from npedit.editor import Editor
from npedit.export.comfyui import LATENT_SCALES
from npedit.families.base import Family
from npedit.nets.lora import LoraAdapter
from npedit.recipe.config import find_class
from tests.support.parts import nudge

SIZE = (64, 96)  # of the pictures, height and width
RANK, ALPHA = 2, 6.0
# The latents' mean and standard deviation of Qwen-Image's VAE, per channel, as its published config has them.
MEANS = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEANS += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
DEVIATIONS = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
DEVIATIONS += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916]


def open_family(name: str, guidance: bool = True) -> Family:
    """A family with random weights, the same at every call; FLUX embeds a guidance scale or not."""
    kind = find_class("families", name)
    pipe = kind.tiny(0).pipe
    torch.manual_seed(0)
    net = BUILDERS[name](guidance) if name == "flux" else BUILDERS[name]()
    pipe.register_modules(vae=_vae(name), transformer=_randomised(net))
    pipe.vae_scale_factor = 8
    family: Family = kind(pipe, torch.device("cpu"))
    return family


def open_editor(name: str, lora: bool, guidance: bool = True) -> Editor:
    """A four-step editor with random weights."""
    family = open_family(name, guidance)
    if not lora:
        return Editor(family, family.base, 4, [SIZE])
    net = LoraAdapter.create(family.lora_base(), "student", RANK, ALPHA, 0)
    nudge(net, by=0.05)
    return Editor(family, net, 4, [SIZE])


def facts(name: str, base: str = "black-forest-labs/FLUX.1-dev") -> dict[str, Any]:
    """The facts of npedit.json that an export reads."""
    return {"family": name, "base": base, "recipe": "a recipe", "times": [1.0, 0.5]}


def _randomised(net: nn.Module) -> nn.Module:
    """The net, with values instead of the zeros of new norms, pad tokens and modulation tables."""
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=stream), alpha=0.03)
    return net


def _vae(name: str) -> nn.Module:
    if name in ("qwen_image", "krea2"):
        return AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=MEANS, latents_std=DEVIATIONS,
        )  # fmt: skip
    scale, shift = LATENT_SCALES[name]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=64,
        shift_factor=shift, scaling_factor=scale, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _flux(guidance: bool) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=guidance,
    )  # fmt: skip


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=16, pos_embed_max_size=24,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=16, dim=1152, n_layers=1, n_refiner_layers=1, n_heads=9, n_kv_heads=9, cap_feat_dim=24,
    )  # fmt: skip


def _qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32, out_channels=16
    )


def _krea2() -> nn.Module:
    return Krea2Transformer2DModel(
        num_layers=2, attention_head_dim=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=768,
        text_hidden_dim=40, num_text_layers=2, text_intermediate_size=128,
    )  # fmt: skip


BUILDERS: dict[str, Any] = {
    "flux": _flux, "sd3": _sd3, "z_image": _z_image, "qwen_image": _qwen_image, "krea2": _krea2
}  # fmt: skip
