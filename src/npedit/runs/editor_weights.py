"""Load the EMA weights of a checkpoint into a net, and check that weights are finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from npedit.errors import UserError
from npedit.nets import sharded_checkpoint
from npedit.nets.master_weights import set_weight
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs.checkpoint import read_config
from npedit.runs.resolve import CONFIG, EditorSource

EMA_PREFIX, NET_PREFIX, BUFFER_PREFIX = "student/ema.", "student/net.", "student/buffer."


def read_recipe(source: EditorSource) -> Recipe:
    """The recipe of the run that an editor comes from.

    Raises:
        UserError: the editor has no run, or its recipe is damaged.
    """
    if source.run is None:
        raise UserError(f"expected an editor in its run's folder; {source.folder} has no {CONFIG} beside it.")
    return make_recipe(read_config(source.run))


@torch.no_grad()
def load_ema_weights(checkpoint: Path, net: nn.Module) -> None:
    """Load the student's EMA weights of a checkpoint into `net`, a trainable model or adapter as training makes it. A
    checkpoint has no EMA weights where `ema` is 0; then the newest weights are the same.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    try:
        tensors = dict(_student_tensors(checkpoint))
    except (OSError, SafetensorError) as error:
        raise UserError(f"expected a complete checkpoint; got {checkpoint} ({error}). Use an earlier one.") from error
    prefix = EMA_PREFIX if any(name.startswith(EMA_PREFIX) for name in tensors) else NET_PREFIX
    places: dict[str, Tensor] = {prefix + name: p for name, p in net.named_parameters() if p.requires_grad}
    places |= {BUFFER_PREFIX + name: b for name, b in net.named_buffers()}
    for name, place in places.items():
        if name not in tensors:
            if name.startswith(BUFFER_PREFIX):  # one that is not saved
                continue
            raise UserError(f"expected {name} in {checkpoint}; there is none. It is a checkpoint of another model.")
        if tensors[name].shape != place.shape:
            got, wanted = tuple(tensors[name].shape), tuple(place.shape)
            raise UserError(f"expected {name} of shape {wanted} in {checkpoint}; got {got}: it is of another model.")
        set_weight(place, tensors[name])


def _student_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The student's weights and buffers by name, without the optimizer's state."""
    wanted = (EMA_PREFIX, NET_PREFIX, BUFFER_PREFIX)
    single = checkpoint / sharded_checkpoint.SINGLE_FILE
    if not single.is_file():
        yield from sharded_checkpoint.iterate_tensors(checkpoint, lambda name: None, wanted)
        return
    with safe_open(single, "pt") as file:
        names = [name for name in file.keys() if name.startswith(wanted)]  # noqa: SIM118 - not a dict
        if any(name.startswith(EMA_PREFIX) for name in names):
            names = [name for name in names if not name.startswith(NET_PREFIX)]
        yield from ((name, file.get_tensor(name)) for name in names)


def require_finite_weights(net: nn.Module, where: object) -> None:
    """Check that all weights are finite.

    Raises:
        UserError: one is NaN or infinite, as after a training that diverged.
    """
    for name, tensor in net.named_parameters():
        _require_finite(name, tensor, where)


def require_finite_files(folder: Path) -> None:
    """Check that all weights in the safetensors files below a folder are finite, one tensor at a time.

    Raises:
        UserError: one is NaN or infinite, or a file is damaged.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    _require_finite(name, file.get_tensor(name), path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"expected complete weights; got {path} ({error}). Use an earlier checkpoint.") from error


def _require_finite(name: str, tensor: Tensor, where: object) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"expected finite weights in {where}; got NaN or infinity in {name}: its training diverged. "
            "Use an earlier checkpoint (RUN/checkpoint-N), or train again with a lower lr."
        )
