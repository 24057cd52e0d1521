"""AdamW (arXiv 1711.05101) for beta1 = 0, without the first moment, which would equal the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from npedit.nets.device import is_accelerator


class AdamWWithoutMomentum(Optimizer):
    """The updates of `torch.optim.AdamW` with betas (0, beta2), bit for bit, at half the memory. The state of a
    parameter is `step` and `exp_avg_sq`, as there.

    As there, `foreach` says whether all parameters are updated together; None means together on an accelerator.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        beta2: float,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        foreach: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta2": beta2, "weight_decay": weight_decay, "eps": eps, "foreach": foreach}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient. There is no `closure`."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros_like(param)}
                self.state[param]["step"] += 1
            for together in [params] if params and _is_together(group["foreach"], params) else [[p] for p in params]:
                self._update_together(together, group)

    def _update_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        corrections = [(1 - group["beta2"] ** float(self.state[p]["step"])) ** 0.5 for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
        widths = torch._foreach_sqrt(squares)
        torch._foreach_div_(widths, corrections)
        torch._foreach_add_(widths, group["eps"])
        torch._foreach_addcdiv_(params, gradients, widths, -group["lr"])


def _is_together(foreach: bool | None, params: list[Tensor]) -> bool:
    if foreach is not None:
        return foreach
    return is_accelerator(params[0].device) and not any(isinstance(p, DTensor) for p in params)
