"""Train the toy's VAE: an ordinary diffusers `AutoencoderKL`, factor 4, 8 latent channels."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from npedit.toy.edits import sample_edit
from npedit.toy.world import STYLES, Scene, render, sample_scene
from npedit.toy_models.fit import fit

THING_WEIGHT = 5.0
NOISE = 0.25  # on the latents, as a share of their standard deviation


def untrained_vae() -> AutoencoderKL:
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


def _sample_scenes(rng: random.Random, count: int) -> list[Scene]:
    return [sample_scene(rng) if i % 4 else sample_edit(rng).target for i in range(count)]


def reconstruction_psnr(vae: AutoencoderKL, count: int, seed: int) -> float:
    """Peak signal-to-noise ratio in dB, in the mean over `count` held-out scenes, through encoder mean and decoder."""
    images = render(_sample_scenes(random.Random(f"held-out/{seed}"), count)) * 2 - 1
    with torch.no_grad():
        reconstructed = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in images.split(64)]).clamp(
            -1, 1
        )
    error = ((images - reconstructed) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def _render_weighted(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1] and the weight of each pixel (b, 1, 32, 32).

    Things count more than ground, and each scene by the contrast of its style: a plain pixel loss hardly sees the
    outlines of small things, at night and in fog least, and then nothing trained on the latents sees them either.
    """
    bare = render([replace(s, cells=(None,) * 4) for s in scenes])
    images = render(scenes)
    weight = 1 + THING_WEIGHT * ((images - bare).abs().amax(1, keepdim=True) > 0.02)
    weight = weight / torch.tensor([STYLES[s.style][0] for s in scenes]).view(-1, 1, 1, 1).square()
    return images.contiguous(memory_format=torch.channels_last) * 2 - 1, weight / weight.mean()


def train_vae(folder: Path, steps: int, seed: int = 0) -> AutoencoderKL:
    """Train a VAE on scenes for `steps` batches of 64: weighted L1 + 2 MSE, a little KL, and noise on the latents.

    The noise is a share of the latents' own spread, so that what matters has a large amplitude: the velocity loss of
    the text-to-image model sees the strong directions first. The last third of the steps has less, for the outlines.
    """
    torch.manual_seed(seed)
    vae = untrained_vae().to(memory_format=torch.channels_last)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images, weight = _render_weighted(_sample_scenes(rng, 64))
        mean = vae.encode(images).latent_dist.mean
        noise = NOISE * min(1.0, 3 * (1 - step / steps)) * mean.detach().std()
        reconstructed = vae.decode(mean + noise * torch.randn(mean.shape, generator=generator)).sample
        # the mean alone is held near the unit Gaussian: the posterior's width is never used
        variance, error = mean.square().mean(), reconstructed - images
        total = (weight * (error.abs() + 2 * error.square())).mean() + 1e-3 * variance
        mse = error.detach().square().mean() / 4
        return total, {"psnr": float(-10 * mse.log10()), "spread": float(variance.detach())}

    fit("vae", vae, loss, folder, steps, lr=3e-3, seed=seed, ema=0.995)
    pictures = render(_sample_scenes(random.Random("scale"), 1024)) * 2 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae
