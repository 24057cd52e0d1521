"""Many processes, one training: who is who, what they tell each other, and how a net is spread over them.

torchrun, or `npedit train` by itself (`launch.py`), starts the processes; each finds its number in the environment.
With one process everything here does nothing.

- A recipe's batch_size is the WHOLE batch. Each process takes its rows of the data and of the noise, and both are drawn
  as one process would draw them. So the number of processes changes speed and memory, and the result by rounding only.
- Whatever decides something (a stop, a save, a skipped update, a clipped or balanced gradient) is agreed on first.
- A net that is not sharded is whole in every process, and its gradients are averaged once, after the last backward
  pass. torch's DDP wrapper would overlap the two, but expects one call of `forward` per backward pass, where the unroll
  makes two, and hides the net's config, which families read.
- A sharded net is torch's FSDP2 (`fully_shard`): the net keeps its attributes; its weights, gradients, averages and
  optimizer state are each process's own slices, and FSDP averages gradients during the backward pass.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from npedit.errors import UserError
from npedit.nets.device import accelerator_count, is_accelerator, pick_device, process_group_backend, set_process_device

TIMEOUT = timedelta(minutes=60)  # the others wait while the first writes the finished editor
REQUIRED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ------------------------------------------------------------------------------------------------- start and end


def is_multi_process() -> bool:
    """Whether this process is one of several that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_started_by_torchrun() -> bool:
    """Whether torchrun started this process, so that its own command line is not what the user typed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes for the length of a `with` block.

    If one fails, what fails in the others because of it is not raised: they end quietly with exit code 1, so that the
    true error is the only one to be read.

    Raises:
        UserError: the environment lacks something, or this machine has fewer GPUs than processes.
    """
    if not is_multi_process() or dist.is_initialized():
        yield
        return
    store = _join_process_group()
    try:
        yield
        all_gather(None)  # none leaves while another still works
    except SystemExit:  # all were told to stop
        dist.destroy_process_group()
        raise
    except Exception:
        if _has_another_failed(store):
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def _join_process_group() -> dist.Store:
    missing = [key for key in REQUIRED_VARIABLES if key not in os.environ]
    if missing:
        raise UserError(
            f"expected {', '.join(REQUIRED_VARIABLES)} in the environment, because WORLD_SIZE is set; "
            f"{', '.join(missing)} missing; "
            "start with torchrun, or unset WORLD_SIZE"
        )
    device = pick_device()
    if is_accelerator(device):
        local, seen = int(os.environ["LOCAL_RANK"]), accelerator_count()
        if local >= seen:
            raise UserError(
                f"expected at most one process per GPU; got process {local + 1} of this machine, which shows {seen}; "
                f"start {seen} processes per machine"
            )
        set_process_device(device, local if device.index is None else device.index)
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(process_group_backend(device), store=groups, rank=number, world_size=count, timeout=TIMEOUT)
    return store


def _has_another_failed(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) > 1
    except RuntimeError:  # the process that keeps the store has ended
        return True


# ---------------------------------------------------------------------------------------- what they tell each other


def all_gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their numbers. Also a barrier."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """The first process's value."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def merge_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What all processes logged, as one row: the mean of a figure over those that have it; of mem/* the largest."""
    out: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        out[key] = max(values) if key.startswith("mem/") else sum(values) / len(values)
    return out


def global_batch_size(size: int) -> int:
    """Rows of the whole batch, where this process has `size`."""
    return size * world_size()


def local_slice(rows: Tensor) -> Tensor:
    """This process's rows of a tensor that was drawn for the whole batch."""
    return rows.chunk(world_size())[rank()]


def global_norm(gradient: Tensor) -> Tensor:
    """The norm of a loss's gradient at the whole batch; each process holds that of the mean over its own rows."""
    if world_size() == 1:
        return gradient.norm()
    squares = gradient.double().square().sum().cpu()
    dist.all_reduce(squares)
    return (squares.sqrt() / world_size()).float()


@torch.no_grad()
def average_gradients(params: Iterable[Tensor]) -> None:
    """Replace gradients by their means over the processes. FSDP has done so for its own; one that no process has stays
    None."""
    plain = [p for p in params if not isinstance(p, DTensor)]
    if world_size() == 1 or not plain:
        return
    there = torch.tensor([int(p.grad is not None) for p in plain])
    dist.all_reduce(there, dist.ReduceOp.MAX)
    used = [p for p, flag in zip(plain, there.tolist()) if flag]
    for param in used:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    for work in [dist.all_reduce(p.grad, async_op=True) for p in used]:
        work.wait()
    for param in used:
        param.grad /= world_size()


def to_float(value: Tensor) -> float:
    """A scalar tensor as a number; the parts of a sharded one are put together."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


# ------------------------------------------------------------------------------------------------------- sharding


@dataclass(frozen=True)
class ShardingPlan:
    """How nets are spread: `mesh` is None where each process holds them whole; a sharded net's calls compute in
    `dtype`."""

    mesh: DeviceMesh | None = None
    blocks: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


_sharding_plan = ShardingPlan()
_empty_copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # sharded net -> its like, without weights


def set_sharding_plan(
    shard: Literal["none", "full", "hybrid"], blocks: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Settle how `spread` treats nets: whole, sliced over all processes, or sliced over those of one machine with a
    copy on each machine. `blocks` are the names of the lists of modules that are fetched one by one.

    Raises:
        UserError: hybrid, and machines have unequal numbers of processes.
    """
    global _sharding_plan
    mesh = None
    if world_size() > 1 and shard != "none":
        near = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if shard == "hybrid" else world_size()
        counts = all_gather(near)
        if len(set(counts)) > 1 or world_size() % near:
            raise UserError(
                f"trainer.shard: hybrid expected as many processes on each machine; got {counts}; start as many on "
                "each, or use full"
            )
        mesh = init_device_mesh(device.type, (world_size() // near, near), mesh_dim_names=("copies", "slices"))
        mesh = mesh["slices"] if near == world_size() else mesh
    _sharding_plan = ShardingPlan(mesh, blocks, dtype)


def distribute_model(net: nn.Module) -> nn.Module:
    """Make a net's trainable weights equal in all processes and shard it, if that is the plan. In place. A net that
    trains a part of its weights, such as an adapter, keeps that part whole; its base is for `spread_frozen`."""
    if world_size() == 1 or isinstance(net, FSDPModule):
        return net
    trained = [param for param in net.parameters() if param.requires_grad]
    for param in trained:
        dist.broadcast(param.data, 0)
    if _sharding_plan.mesh is not None and len(trained) == len(list(net.parameters())):
        places = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
        _empty_copies[net] = copy.deepcopy(net, places)
        _shard(net, set())
    return net


def shard_frozen(net: nn.Module) -> None:
    """Shard a frozen net, if that is the plan; adapters on it, which are trained, stay whole. In place; it can be
    neither copied nor given further adapters any more."""
    if _sharding_plan.mesh is not None and not isinstance(net, FSDPModule):
        _shard(net, {param for param in net.parameters() if param.requires_grad})


def _shard(net: nn.Module, left_out: set[nn.Parameter]) -> None:
    low = (
        {}
        if _sharding_plan.dtype == torch.float32
        else {"param_dtype": _sharding_plan.dtype, "reduce_dtype": torch.float32}
    )
    inside = MixedPrecisionPolicy(**low, cast_forward_inputs=False)  # rotary embeddings stay in float32
    for name in _sharding_plan.blocks:
        for block in net.get_submodule(name):
            fully_shard(block, mesh=_sharding_plan.mesh, mp_policy=inside, ignored_params=left_out)
    # Resharded after each call: else a call without gradient leaves weights behind that the next one takes for new.
    outside = MixedPrecisionPolicy(**low)
    fully_shard(net, mesh=_sharding_plan.mesh, mp_policy=outside, reshard_after_forward=True, ignored_params=left_out)


def gather_full_model(net: nn.Module) -> nn.Module | None:
    """The net as it can be saved, in the first process; None in the others. A sharded one is put together on the CPU.
    All processes must call it."""
    if net not in _empty_copies:
        return net if is_main_process() else None
    state = {}
    for name, value in net.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main_process():
            state[name] = value.cpu()
    if not is_main_process():
        return None
    made = copy.deepcopy(_empty_copies[net])
    made.load_state_dict(state, assign=True)
    return made
