"""Float32 master weights of trainable parameters that compute in another type, such as bfloat16.

bfloat16 has 8 bits of precision: an update that changes a weight by less than 1/256 is rounded away. So the optimizer,
the EMA and checkpoints work on a float32 master of each parameter, and the parameter is the rounded master. A new copy
of a bfloat16 base model computes the same as the base, bit for bit.

A float32 parameter is its own master. So is a slice of a model that FSDP2 shards (`distributed.py`): FSDP2 keeps slices
in float32 and rounds the gathered weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_masters = WeakTensorKeyDictionary()  # parameter -> its float32 master


def add_master_weights(params: Iterable[nn.Parameter]) -> None:
    """Give each trainable parameter that is not in float32 a master, unless it has one. From then on a backward pass
    leaves the parameter's gradient on its master, in float32."""
    for param in params:
        if param.requires_grad and param.dtype != torch.float32 and param not in _masters:
            _masters[param] = param.detach().float()
            param.register_post_accumulate_grad_hook(_move_gradient)


def master_weight(param: Tensor) -> Tensor:
    """The float32 master of a parameter, which is the parameter itself if it has no other."""
    return _masters.get(param, param)


@torch.no_grad()
def round_master_weights(params: Iterable[Tensor]) -> None:
    """Set each parameter to its rounded master, after the master has changed."""
    rounded = [p for p in params if p in _masters]
    if rounded:
        torch._foreach_copy_([p.data for p in rounded], [_masters[p] for p in rounded])


@torch.no_grad()
def set_weight(param: Tensor, value: Tensor) -> None:
    """Set a parameter and its master to a value."""
    master_weight(param).copy_(value)
    round_master_weights([param])


@torch.no_grad()
def _move_gradient(param: Tensor) -> None:
    """Add the gradient of a parameter to that of its master."""
    master, gradient = _masters[param], param.grad
    param.grad = None
    if gradient is None:
        return
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
