"""Functions that several families use: check a pipeline's folder, read the shift of its schedule, pack latents 2 x 2,
remove padding, and encode and decode with the VAE of FLUX, SD3 and Z-Image, and with that of Qwen-Image and Krea 2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from torch import Tensor


def check_pipeline_folder(
    weights: str | Path, family: str, pipeline: str, parts: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, None]:
    """Look at a local diffusers folder before it is opened; a Hub id is left to diffusers. Returns those of the
    `optional` parts that its index declares absent, each as None, the value that `from_pretrained` expects for it.

    Raises:
        FileNotFoundError: the index or a part is missing; the message names it.
        ValueError: it holds another pipeline than `pipeline`.
    """
    folder = Path(weights)
    if not folder.is_dir():
        return {}
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"expected a diffusers folder with model_index.json; {weights} has none")
    index = json.loads((folder / "model_index.json").read_text())
    found = index.get("_class_name")
    if found != pipeline:
        raise ValueError(f"expected a {pipeline} in {weights}; got {found}. Choose that family instead of {family}.")
    absent = {part: None for part in optional if index.get(part) == [None, None]}
    missing = [part for part in (*parts, *optional) if part not in absent and not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"expected a complete diffusers folder in {weights}; it lacks {', '.join(missing)}")
    return absent


def schedule_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The noise shift (`flow.shift_times`) of a flow-matching scheduler for a picture with this number of tokens: the
    fixed shift, or exp(mu) with dynamic shifting, where mu is linear in the number of tokens. With `time_shift_type`
    "linear" the shift is mu itself."""
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
    return mu if config["time_shift_type"] == "linear" else math.exp(mu)


def pack_latents(x: Tensor) -> Tensor:
    """Latents (b, c, h, w) -> tokens (b, h/2 * w/2, 4c), row by row."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_latents`: tokens (b, rows * columns, 4c) -> (b, c, 2 rows, 2 columns)."""
    b, _, d = tokens.shape
    x = tokens.view(b, rows, columns, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, d // 4, 2 * rows, 2 * columns)


def trim_padding(sequence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the places of (b, length, ...) where no item of mask (b, length) has a word. The mask is None when nothing
    is left to hide, so that attention may use its fast kernel."""
    kept = mask.any(0)
    sequence, mask = sequence[:, kept], mask[:, kept]
    return sequence, None if bool(mask.all()) else mask


@torch.no_grad()
def encode_with_kl_vae(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (b, 3, H, W) in [0, 1] -> latents (b, c, h, w), the posterior's mean, shifted and scaled. Float32 whatever
    the VAE's type, so that neither x_t nor DMD's gradient is rounded."""
    mean = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mean.float()
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def decode_with_kl_vae(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (b, c, h, w) -> images (b, 3, H, W), not clamped."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype)).sample + 1) / 2


@torch.no_grad()
def encode_with_qwen_vae(vae: AutoencoderKLQwenImage, images: Tensor) -> Tensor:
    """Images (b, 3, H, W) in [0, 1] as one-frame films -> latents (b, c, h, w), the posterior's mean, normalised per
    channel. Float32 whatever the VAE's type."""
    mean = vae.encode((images * 2 - 1).to(vae.dtype).unsqueeze(2)).latent_dist.mean[:, :, 0].float()
    middle, deviation = _latent_statistics(vae, mean)
    return (mean - middle) / deviation


def decode_with_qwen_vae(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Latents (b, c, h, w) -> images (b, 3, H, W), not clamped. `vae.decode` clamps, and a clamp stops the gradient, so
    this function calls the layers before the clamp. One frame needs none of the decoder's memory of earlier frames."""
    middle, deviation = _latent_statistics(vae, latents)
    frame = (latents * deviation + middle).to(vae.dtype).unsqueeze(2)
    return (vae.decoder(vae.post_quant_conv(frame))[:, :, 0] + 1) / 2


def _latent_statistics(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    """The latents' mean and standard deviation in the data (1, c, 1, 1)."""
    mean, deviation = (torch.tensor(s) for s in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(like).view(1, -1, 1, 1), deviation.to(like).view(1, -1, 1, 1)
