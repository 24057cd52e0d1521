"""Distribution matching: keep the editor's output where the text-to-image model would put it.

    grad KL = E[ (fake_x0 - real_x0) / w  dG/dtheta ],    x0_hat = x_t - t v_hat,    w = mean |x0 - real_x0| per SAMPLE

Real is the frozen base model with the wanted result's caption and guidance; fake is a copy trained online on the
editor's own output. Written from the papers: DMD (arXiv 2311.18828, equations 7 and 8) and NP-Edit (section 3). With
v = eps - x0 the signs are as above: where the teacher would move x0 up, the gap is negative, and descent moves it up.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b c h w"]


def classifier_free_guidance(conditional: Latents, unconditional: Latents, scale: Float[Tensor, "b"]) -> Latents:
    """Classifier-free guidance with one scale per sample; scale 1 is the conditional alone."""
    return unconditional + scale.to(conditional).view(-1, 1, 1, 1) * (conditional - unconditional)


def dmd_gradient(x0: Latents, real: Latents, fake: Latents, per: Literal["sample", "pixel"] = "sample") -> Latents:
    """The gradient of the KL with respect to each sample's x0, in float32, without gradient of its own.

    The normaliser is one number per sample, the mean of |x0 - real| over channels and places (DMD, equation 8). One per
    pixel, the mean over channels alone, is what NP-Edit's public code has; it is here to be compared.
    """
    x0, real, fake = x0.detach().float(), real.detach().float(), fake.detach().float()
    width = (x0 - real).abs().mean((1, 2, 3) if per == "sample" else 1, keepdim=True).clamp_min(1e-6)
    return (fake - real) / width


def fake_score_loss(v: Latents, x0: Latents, eps: Latents) -> Float[Tensor, ""]:
    """Flow matching of the fake score on the editor's output. Gradient flows to v."""
    return torch.nn.functional.mse_loss(v.float(), (eps - x0).detach().float())
