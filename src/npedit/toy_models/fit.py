"""One resumable training loop, for the toy's parts, from random weights. The editor's loop is `trainer.py`."""

from __future__ import annotations

import io
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from npedit.errors import explain_write_errors
from npedit.training.progress_display import ProgressDisplay, plain_console

LossFn = Callable[[int, random.Random, torch.Generator], tuple[Tensor, dict[str, float]]]


def fit(
    name: str,
    module: nn.Module,
    loss: LossFn,
    folder: Path,
    steps: int,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    ema: float = 0.998,
    with_restart: bool = False,
    seed: int = 0,
    save_seconds: float = 60.0,
    log_every: int = 100,
) -> nn.Module:
    """Train `module` in place with AdamW, linear warm-up and cosine decay to zero; leave the EMA weights in it. With
    `with_restart` that takes two thirds of the steps, and the last third does it once more from half the rate.

    `loss(step, rng, generator)` returns a scalar and figures to show. Both sources of randomness are seeded from
    (seed, step), so a run that was stopped and started again repeats itself. State lies in `folder/NAME.state.pt`,
    written aside and renamed; a finished part is not trained again.
    """
    path = folder / f"{name}.state.pt"
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)
    ema_weights = [p.detach().clone() for p in params]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema_weights, start = state["average"], state["step"]

    def save(step: int) -> None:
        aside, buffer = path.with_suffix(".tmp"), io.BytesIO()
        torch.save(
            {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": ema_weights, "step": step},
            buffer,
        )
        with explain_write_errors(path):
            aside.write_bytes(buffer.getbuffer())
            os.replace(aside, path)

    saved, figures_text = time.monotonic(), ""
    with ProgressDisplay(plain_console(), name, steps, start) as display:
        module.train()
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, steps, with_restart)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            value, figures = loss(step, random.Random(f"{seed}/{name}/{step}"), generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(ema_weights, [p.detach() for p in params], 1 - decay)
            if step % log_every == 0 or step + 1 == steps:
                figures_text = "  ".join(f"{k} {v:.3f}" for k, v in {"loss": float(value.detach()), **figures}.items())
            display.update(step + 1, name, figures_text)
            if time.monotonic() - saved > save_seconds:
                save(step + 1)
                saved = time.monotonic()
        save(steps)
    with torch.no_grad():
        for p, a in zip(params, ema_weights):
            p.copy_(a)
    return module.eval()


def lr_factor(step: int, steps: int, with_restart: bool = False) -> float:
    """What `fit` multiplies the learning rate with at a step."""
    first = steps - steps // 3 if with_restart else steps
    peak, phase_start, length = (1.0, 0, first) if step < first else (0.5, first, steps - first)
    return (
        peak * min(1.0, (step - phase_start + 1) / 100) * 0.5 * (1 + math.cos(math.pi * (step - phase_start) / length))
    )
