"""The one convention for time and prediction. Families translate to and from it; nothing else does.

`t` lies in [0, 1] and `t = 1` is noise:

    x_t = (1 - t) x0 + t eps,      v = eps - x0,      hence      x0 = x_t - t v.

Images are float in [0, 1], latents are (b, c, h, w) normalised as the base model wants them. Times are (b,) float32.
Source: NP-Edit (arXiv 2510.14978), section 3; rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(
    x0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """x_t = (1 - t) x0 + t eps."""
    s = _per_sample(t, x0)
    return (1 - s) * x0 + s * eps


def velocity(x0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """v = eps - x0. It is the same at every time."""
    return eps - x0


def predict_x0(
    x: Float[Tensor, "b c h w"], v: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """x0 = x_t - t v."""
    return x - _per_sample(t, x) * v


def shift_times(t: Tensor, shift: float) -> Tensor:
    """The noise shift of SD3 (arXiv 2403.03206, equation 23): t' = s t / (1 + (s - 1) t). Times 0 and 1 stay
    as they are."""
    return shift * t / (1 + (shift - 1) * t)


def few_step_times(steps: int, shift: float) -> Float[Tensor, "steps"]:
    """The times of a few-step editor: 1, (n-1)/n, ..., 1/n, with the noise shift of the base model.

    With four steps and Z-Image's shift of 6 these are 1, .9474, .8571, .6667.
    """
    if steps < 1:
        raise ValueError(f"expected at least one step; got {steps}")
    return shift_times(torch.arange(steps, 0, -1, dtype=torch.float32) / steps, shift)
