"""One trainable model: float32 master weights, AdamW, accumulation, a check for finite gradients, clipping, the
learning rate schedule and EMA weights.

What a setting switches off takes no memory: no EMA weights where `ema` is 0, no first moment where `betas` begins with
0 (`adamw.py`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.nets.adamw import AdamWWithoutMomentum
from npedit.nets.master_weights import add_master_weights, master_weight, round_master_weights
from npedit.recipe.config import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerSettings(Settings):
    """How one model is trained."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.0, 0.9)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup_updates: int = Field(0, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    clip: float = Field(1.0, gt=0)  # the largest gradient norm
    ema: float = Field(0.99, ge=0, lt=1)
    max_skipped: int = Field(20, ge=0)  # updates in a row without finite gradients; with more the run stops
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit keeps the moments in 8 bits, with bitsandbytes

    @field_validator("optimizer")
    @classmethod
    def _check_installed(cls, name: str) -> str:
        if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("adamw8bit needs the package bitsandbytes: pip install 'npedit[8bit]', or use adamw")
        return name


class Learner:
    """Trains the parameters of `net` that require gradients. `net` is sharded in place if
    `distributed.set_sharding_plan` says so. It computes in the type that it comes in, and what is trained is float32
    (`master_weights.py`).

    A step calls `update`, which does the gradient accumulation. `net` holds the newest weights; inside
    `with learner.use_ema_weights():` it holds their exponential moving average (EMA), which is the newest weights
    again where `ema` is 0.
    """

    def __init__(self, net: nn.Module, settings: LearnerSettings, total_updates: int) -> None:
        self.net = distributed.distribute_model(net)
        self.settings = settings
        self.total_updates = total_updates
        self.updates = 0  # calls of `update`, skipped ones too
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._params = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        if not self._params:
            raise ValueError("expected a model with trainable parameters; got none that requires a gradient")
        add_master_weights(self._params.values())
        self._masters = {n: master_weight(p) for n, p in self._params.items()}
        self._ema = {n: p.detach().clone() for n, p in self._masters.items() if settings.ema}
        self._optimizer = _make_optimizer(settings, list(self._masters.values()))

    def learning_rate(self) -> float:
        """The learning rate of the next update: linear warm-up, then constant, or a cosine to 0 at `total_updates`."""
        s = self.settings
        rate = s.lr * min(1.0, (self.updates + 1) / max(1, s.warmup_updates))
        if s.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, self.updates / self.total_updates)))
        return rate

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> dict[str, float]:
        """One update with the mean of the scalar losses, over all processes. Each loss is computed and differentiated
        before the next one is computed.

        Returns:
            grad_norm before clipping, lr, and skipped: the number of updates skipped so far, because of gradients that
            were not finite.

        Raises:
            UserError: more than `max_skipped` updates in a row were skipped.
            ValueError: no loss was given, or no loss depends on the model.
        """
        if not losses:
            raise ValueError("expected at least one loss; got none")
        self._optimizer.zero_grad(set_to_none=True)
        finite = True
        for compute in losses:
            loss = compute() / len(losses)
            loss.backward()
            finite = finite and bool(torch.isfinite(loss.detach()))
        distributed.average_gradients(self._masters.values())
        if all(p.grad is None for p in self._masters.values()):
            raise ValueError("expected losses that depend on the model's parameters; got none")
        norm = distributed.to_float(nn.utils.clip_grad_norm_(self._masters.values(), self.settings.clip))
        rate = self.learning_rate()
        if all(distributed.all_gather(finite and math.isfinite(norm))):
            self._apply_gradients(rate)
            self.skipped_in_a_row = 0
        else:
            self._skip_update(norm)
        self.updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": rate, "skipped": float(self.skipped)}

    def _apply_gradients(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        round_master_weights(self._params.values())
        if not self._ema:
            return
        done = self.updates - self.skipped
        decay = min(self.settings.ema, (done + 1) / (done + 10))  # a lower decay at first, so the start weighs little
        torch._foreach_lerp_(list(self._ema.values()), [p.detach() for p in self._masters.values()], 1 - decay)

    def _skip_update(self, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.settings.max_skipped:
            raise UserError(
                f"expected finite losses and gradients; got {self.skipped_in_a_row} updates in a row without (last "
                f"gradient norm {norm}); look at the last loss/* and grad_norm/* in metrics.jsonl, then lower lr, "
                "raise warmup_updates, or use dtype float32 for family and critic. The last checkpoint is kept."
            )

    @contextmanager
    def use_ema_weights(self) -> Iterator[nn.Module]:
        """Inside the `with` block `net` has the EMA weights; afterwards it has the newest weights again."""
        self._swap_ema_weights()
        try:
            yield self.net
        finally:
            self._swap_ema_weights()

    @torch.no_grad()
    def load_ema_weights(self) -> None:
        """Overwrite the model's weights with the EMA weights. The next stage starts from them."""
        for name, average in self._ema.items():
            self._masters[name].copy_(average)
        round_master_weights(self._params.values())

    @torch.no_grad()
    def _swap_ema_weights(self) -> None:
        for name, average in self._ema.items():  # in place: FSDP keeps references to these tensors
            kept = self._masters[name].clone()
            self._masters[name].copy_(average)
            average.copy_(kept)
        round_master_weights(self._params.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that is needed to resume training: tensors by name, and counters."""
        tensors = {f"net.{n}": p.detach() for n, p in self._masters.items()}
        tensors |= {f"buffer.{n}": b for n, b in self.net.named_buffers()}
        tensors |= {f"ema.{n}": e for n, e in self._ema.items()}
        for name, param in self._masters.items():
            for key, value in self._optimizer.state.get(param, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)  # adamw8bit: the number of steps is an int
        return tensors, {"updates": self.updates, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def parameter_of(self, key: str) -> Tensor | None:
        """The parameter that the tensor `key` of `state` belongs to; None for a buffer."""
        kind, name = key.split(".", 1)
        return self._masters.get(name.split(".", 1)[1] if kind == "optimizer" else name)

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Load what `state` returned. Errors as in `load_tensors`."""
        self.load_tensors(tensors.items(), numbers)

    @torch.no_grad()
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Load what `state` returned, its tensors one by one: each is copied before the next one is asked for.

        Raises:
            ValueError: the tensors are those of another model; the message names a wrong one.
        """
        places: dict[str, Tensor] = {f"net.{n}": p for n, p in self._masters.items()}
        places |= {f"ema.{n}": e for n, e in self._ema.items()}
        places |= {f"buffer.{n}": b for n, b in self.net.named_buffers()}
        missing = dict.fromkeys(places)
        self._optimizer.state.clear()
        for name, tensor in tensors:
            if name.startswith("optimizer."):
                self._load_optimizer_tensor(name, tensor)
            elif name in places:
                _require_shape(name, places[name], tuple(tensor.shape))
                places[name].copy_(tensor)
                del missing[name]
        for name in missing:
            _require_shape(name, places[name], "nothing")
        round_master_weights(self._params.values())
        self.updates, self.skipped = int(numbers["updates"]), int(numbers["skipped"])
        self.skipped_in_a_row = int(numbers["skipped_in_a_row"])

    def _load_optimizer_tensor(self, name: str, value: Tensor) -> None:
        """Load one tensor of the optimizer. A first moment that `betas` has no use for, as in older checkpoints, is
        left out."""
        _, key, param_name = name.split(".", 2)
        param = self._masters.get(param_name)
        if param is None or (key == "exp_avg" and isinstance(self._optimizer, AdamWWithoutMomentum)):
            return
        kept: Tensor | int
        if key == "step":
            kept = value.clone() if value.is_floating_point() else int(value)
        else:
            kept = value.to(param.device, copy=True)
        self._optimizer.state[param][key] = kept


def _require_shape(name: str, place: Tensor, got: object) -> None:
    if got != tuple(place.shape):
        raise ValueError(f"expected {name} of shape {tuple(place.shape)} in the checkpoint; got {got}")


def _make_optimizer(settings: LearnerSettings, params: list[Tensor]) -> torch.optim.Optimizer:
    s = settings
    if s.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
    if s.betas[0] == 0:
        return AdamWWithoutMomentum(params, lr=s.lr, beta2=s.betas[1], weight_decay=s.weight_decay)
    return torch.optim.AdamW(params, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
