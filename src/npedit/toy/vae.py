"""Teach the toy's VAE: an ordinary diffusers `AutoencoderKL`, factor 4, 8 latent channels."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from npedit.toy.edits import sample_edit
from npedit.toy.fit import fit
from npedit.toy.world import STYLES, render, sample_scene


def new_vae() -> AutoencoderKL:
    """An untrained VAE: images (b, 3, 32, 32) in [-1, 1], latents (b, 8, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _pictures(rng: random.Random, count: int) -> Tensor:
    scenes = [sample_scene(rng) if i % 4 else sample_edit(rng).target for i in range(count)]
    return render(scenes) * 2 - 1


def psnr(vae: AutoencoderKL, count: int, seed: int) -> float:
    """Peak signal-to-noise ratio in dB, in the mean over `count` held-out scenes, through encoder mean and decoder."""
    images = _pictures(random.Random(f"held-out/{seed}"), count)
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in images.split(64)]).clamp(-1, 1)
    error = ((images - again) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def _refine(vae: AutoencoderKL, folder: Path, steps: int, seed: int) -> None:
    """Teach the decoder alone what a plain pixel loss hardly sees: the outlines of small things, at night and in fog
    too.

    Pixels of things count eight times, and each scene by the contrast of its style. The latents stay as they are.
    """
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = [sample_scene(rng) if i % 4 else sample_edit(rng).target for i in range(64)]
        bare = render([replace(s, cells=(None,) * 4) for s in scenes])
        images = render(scenes)
        weight = 1 + 7 * ((images - bare).abs().amax(1, keepdim=True) > 0.02)
        weight = weight / torch.tensor([STYLES[s.style][0] for s in scenes]).view(-1, 1, 1, 1).square()
        images = images.contiguous(memory_format=torch.channels_last) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            latents = latents + 0.03 * torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents).sample - images
        return (weight * (error.abs() + 2 * error.square())).mean(), {"mse": float(error.detach().square().mean() / 4)}

    fit("vae_decoder", vae, loss, folder, steps, lr=2e-3, seed=seed, ema=0.99)
    vae.requires_grad_(False)


def teach_vae(folder: Path, steps: int, seed: int = 0) -> AutoencoderKL:
    """Train a VAE on scenes for `steps` batches of 64: L1 + 2 MSE + a little KL, with noise on the latents."""
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = _pictures(rng, 64).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        mean = posterior.mean
        latents = mean + 0.05 * torch.randn(mean.shape, generator=generator)
        again = vae.decode(latents).sample
        # the mean alone is held near the unit Gaussian: the posterior's width is never used
        spread = mean.square().mean()
        error = F.mse_loss(again, images)
        total = F.l1_loss(again, images) + 2 * error + 1e-3 * spread
        return total, {"psnr": float(-10 * (error.detach() / 4).log10()), "spread": float(spread.detach())}

    fit("vae", vae, loss, folder, steps, lr=3e-3, seed=seed, ema=0.995)
    _refine(vae, folder, steps // 2, seed)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in _pictures(random.Random("scale"), 1024).split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae
