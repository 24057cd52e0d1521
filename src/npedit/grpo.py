"""The equations of Flow-GRPO (arXiv 2505.05470): the flow as an SDE, log-probabilities, advantages, clipping, KL.

With v = eps - x0 and t falling from 1 to 0 the ODE dx = v dt and, for every sigma_t, the SDE

    dx = [v + sigma_t^2 / (2 t) (x + (1 - t) v)] dt + sigma_t dw,      sigma_t = a sqrt(t / (1 - t))

give the same distribution of x at each t (equations 8 and 9). One Euler-Maruyama step of the SDE from t to s < t is a
Gaussian, the policy's action. Coefficients-preserving sampling (CPS, arXiv 2509.05952) is another Gaussian step, whose
noise has the right strength for steps of any length. The authors' later settings use it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b c h w"]
PerSample = Float[Tensor, "b"]


def sde_step(x: Latents, v: Latents, t: float, after: float, noise_level: float) -> tuple[Latents, float]:
    """The mean and standard deviation of the SDE's step from time t to `after`. `noise_level` is a in the paper.

    At t = 1, where sigma is not finite, 1 - t is replaced with 1 - after, as in the authors' code. The variance after
    this step is too large by a^4 / 4, whatever its length; later steps remove the error. Gradients flow to x and v.

    Raises:
        ValueError: the times do not decrease.
    """
    if not 0 <= after < t <= 1:
        raise ValueError(f"expected 0 <= after < t <= 1; got t = {t}, after = {after}")
    step = t - after
    variance = noise_level**2 * t / (1 - t if t < 1 else step)
    mean = x - step * (v + variance / (2 * t) * (x + (1 - t) * v))
    return mean, math.sqrt(variance * step)


def cps_step(x: Latents, v: Latents, t: float, after: float, noise_level: float) -> tuple[Latents, float]:
    """The mean and standard deviation of a CPS step from time t to `after`.

    Of the noise that x has at `after`, the part sin(noise_level pi / 2) is drawn anew; 1 draws all of it anew. The
    mean is (1 - after) x0 + sqrt(after^2 - std^2) eps. Gradients flow to x and v.

    Raises:
        ValueError: the times do not decrease, or the noise level is not in [0, 1].
    """
    if not 0 <= after < t <= 1 or not 0 <= noise_level <= 1:
        raise ValueError(f"expected 0 <= after < t <= 1 and a noise level in [0, 1]; got {t}, {after}, {noise_level}")
    std = after * math.sin(noise_level * math.pi / 2)
    clean, noise = x - t * v, x + (1 - t) * v
    return (1 - after) * clean + math.sqrt(max(0.0, after**2 - std**2)) * noise, std


def log_prob(x: Latents, mean: Latents, std: float) -> PerSample:
    """The log-density of x under N(mean, std^2), as the mean over channels and pixels. Gradients flow to
    `mean`."""
    density = -0.5 * ((x.detach() - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.mean((1, 2, 3))


def advantages(rewards: Float[Tensor, "group b"], whole_batch: bool = False) -> Float[Tensor, "group b"]:
    """(reward - mean) / std over each item's group (equation 4); zero where all rewards of a group are equal.

    `whole_batch` uses the standard deviation of all rewards, as most of the authors' settings do. Then a group with
    nearly equal rewards gets small advantages. Otherwise small differences in such a group count as much as a success.
    """
    std = rewards.std(unbiased=False) if whole_batch else rewards.std(0, unbiased=False)
    return (rewards - rewards.mean(0)) / (std + 1e-4)


def policy_loss(now: PerSample, before: PerSample, advantage: PerSample, clip: float) -> Float[Tensor, ""]:
    """The clipped objective (equation 5, its sign turned): -mean min(r A, clamp(r, 1 - clip, 1 + clip) A), where
    r = exp(now - before). Gradients flow to `now`, except where it is clipped."""
    ratio = (now - before.detach()).exp()
    held = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, held * advantage).mean()


def kl_divergence(mean: Latents, reference: Latents, std: float) -> Float[Tensor, ""]:
    """KL(N(mean, std^2) || N(reference, std^2)), as the mean over samples, channels and pixels. Gradients flow
    to `mean`."""
    return ((mean - reference.detach()) / std).square().mean() / 2
