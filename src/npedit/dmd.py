"""Distribution matching: keep the editor's output where the text-to-image model would put it.

    grad KL = E[ (fake_x0 - real_x0) / w  dG/dtheta ],    x0_hat = x_t - t v_hat,    w = mean |x0 - real_x0| per SAMPLE

Real is the frozen base model with classifier-free guidance, conditioned on the target caption. Fake is a copy of it,
trained online on the editor's output. Written from the papers: DMD (arXiv 2311.18828, equations 7 and 8) and NP-Edit
(section 3). With v = eps - x0 the signs are as above: where the teacher would raise x0, the gradient is negative, and
gradient descent raises x0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b c h w"]


def classifier_free_guidance(conditional: Latents, unconditional: Latents, scale: Float[Tensor, "b"]) -> Latents:
    """Classifier-free guidance with one scale per sample; scale 1 is the conditional prediction alone."""
    return unconditional + scale.to(conditional).view(-1, 1, 1, 1) * (conditional - unconditional)


def guidance_part(conditional: Latents, unconditional: Latents, scale: Float[Tensor, "b"]) -> Latents:
    """What classifier-free guidance adds to the conditional prediction: (scale - 1) (conditional - unconditional). It
    is zero at scale 1. `conditional + guidance_part(...)` equals `classifier_free_guidance(...)`.

    In Decoupled DMD (arXiv 2511.22677, equation 8) this part is computed at a time of its own: the teacher's target is
    the conditional prediction at one time plus the guidance part at another.
    """
    return (scale.to(conditional).view(-1, 1, 1, 1) - 1) * (conditional - unconditional)


def dmd_gradient(x0: Latents, real: Latents, fake: Latents, per: Literal["sample", "pixel"] = "sample") -> Latents:
    """The gradient of the KL with respect to each sample's x0, in float32 and detached.

    The normaliser is one number per sample, the mean of |x0 - real| over channels and pixels (DMD, equation 8).
    NP-Edit's public code has one per pixel, the mean over channels alone; `per="pixel"` is here for comparison.
    """
    x0, real, fake = x0.detach().float(), real.detach().float(), fake.detach().float()
    width = (x0 - real).abs().mean((1, 2, 3) if per == "sample" else 1, keepdim=True).clamp_min(1e-6)
    return (fake - real) / width


def fake_score_loss(v: Latents, x0: Latents, eps: Latents) -> Float[Tensor, ""]:
    """The flow matching loss of the fake score on the editor's output. Gradients flow to v."""
    return torch.nn.functional.mse_loss(v.float(), (eps - x0).detach().float())
