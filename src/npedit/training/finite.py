"""Weights with NaN or infinity are an error: no checkpoint and no editor is written with them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.runs import checkpoint
from npedit.steps.base import Step


def require_finite_weights(step: Step, run: Path, n: int) -> None:
    """Check that the trained weights and the EMA weights are finite after update n, in all processes.

    Raises:
        UserError: a weight is NaN or infinite; names the first such tensor and the last good checkpoint.
    """
    found = [
        f"{role}/{key}"
        for role, learner in step.learners.items()
        for key, value in learner.state()[0].items()
        if key.startswith(("net.", "ema.")) and not local_part(value).isfinite().all()
    ]
    bad = [name for names in distributed.all_gather(found) for name in names]
    if bad:
        latest = checkpoint.latest_complete_checkpoint(run)
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        good = f"the last good state is {latest}" if latest else "there is no earlier checkpoint"
        raise UserError(
            f"expected finite weights after update {n}; got NaN or infinity in {bad[0]}{more}; no checkpoint and no "
            f"editor is written from them, {good}; lower lr, raise warmup_updates, or use float32, in a new folder"
        )


def local_part(value: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
