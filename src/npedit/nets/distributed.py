"""Training in several processes: ranks, communication between the processes, and sharding of models.

torchrun, or `npedit train` by itself (`launch.py`), starts the processes. Each reads its rank from the environment.
With one process all functions here do nothing.

- A recipe's batch_size is the global batch. Each process takes its rows of the data and of the noise, and both are
  sampled as a single process would sample them. So the number of processes changes speed and memory; the result
  changes by rounding only.
- All processes agree on every decision first: a stop, a save, a skipped update, a clipped or balanced gradient.
- A model that is not sharded has a full copy in every process. Its gradients are averaged once, after the last backward
  pass. torch's DDP wrapper would overlap the two. But it expects one call of `forward` per backward pass, and the
  few-step sampler makes two; and it hides the model's config, which families read.
- A sharded model uses torch's FSDP2 (`fully_shard`): the model keeps its attributes. Each process holds its slices of
  the weights, gradients, EMA weights and optimizer state, and FSDP averages gradients during the backward pass.
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
from npedit.nets.master_weights import master_weight, round_master_weights

TIMEOUT = timedelta(minutes=60)  # the other processes wait while the main one writes the editor
COMPUTE_DTYPE = "npedit_compute_dtype"  # an attribute of sharded models
REQUIRED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ------------------------------------------------------------------------------------------------- start and end


def is_multi_process() -> bool:
    """Whether this process is one of several that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_started_by_torchrun() -> bool:
    """Whether torchrun started this process, so its command line is not what the user typed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process has rank 0: it alone writes and prints."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Inside the `with` block this process communicates with the others.

    If one process fails, the others end with exit code 1 and without a message, so only the true error is shown.

    Raises:
        UserError: the environment lacks something, or this machine has fewer GPUs than processes.
    """
    if not is_multi_process() or dist.is_initialized():
        yield
        return
    store = _join_process_group()
    try:
        yield
        all_gather(None)  # no process leaves while another still works
    except SystemExit:  # all processes were asked to stop
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
    except RuntimeError:  # the process that holds the store has ended
        return True


# ---------------------------------------------------------------------------------------- what they tell each other


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. This is also a barrier."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """The value of the main process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def merge_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What all processes logged, as one row: a metric's mean over the processes that have it; the maximum of mem/*."""
    out: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        out[key] = max(values) if key.startswith("mem/") else sum(values) / len(values)
    return out


def global_batch_size(size: int) -> int:
    """The number of rows in the global batch, if this process has `size` rows."""
    return size * world_size()


def local_slice(rows: Tensor) -> Tensor:
    """This process's rows of a tensor that was sampled for the global batch."""
    return rows.chunk(world_size())[rank()]


def norm_over_global_batch(gradient: Tensor) -> Tensor:
    """The norm of a gradient over the global batch. Each process has the gradient of the mean over its own rows."""
    if world_size() == 1:
        return gradient.norm()
    squares = gradient.double().square().sum().cpu()
    dist.all_reduce(squares)
    return (squares.sqrt() / world_size()).float()


@torch.no_grad()
def average_gradients(params: Iterable[Tensor]) -> None:
    """Replace gradients with their means over the processes. FSDP does this itself for sharded parameters. A gradient
    that no process has stays None."""
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
        if param.grad is not None:
            param.grad.div_(world_size())


def to_float(value: Tensor) -> float:
    """The value of a scalar tensor, sharded or not."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


# ------------------------------------------------------------------------------------------------------- sharding


@dataclass(frozen=True)
class ShardingPlan:
    """How models are sharded: `mesh` is None if each process holds full copies. A sharded model computes in `dtype`."""

    mesh: DeviceMesh | None = None
    blocks: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


_sharding_plan = ShardingPlan()
_empty_copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # sharded model -> copy without weights


def set_sharding_plan(
    shard: Literal["none", "full", "hybrid"], blocks: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Choose how `distribute_model` shards models: not at all, over all processes, or over the processes of one machine
    with a copy on each machine. `blocks` are the names of the module lists whose weights are gathered one by one.

    Raises:
        UserError: hybrid is asked for, and the machines have unequal numbers of processes.
    """
    global _sharding_plan
    mesh = None
    if world_size() > 1 and shard != "none":
        near = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if shard == "hybrid" else world_size()
        counts = all_gather(near)
        if len(set(counts)) > 1 or world_size() % near:
            raise UserError(
                f"trainer.shard: hybrid expected equal numbers of processes on all machines; got {counts}; start "
                "equal numbers, or use full"
            )
        mesh = init_device_mesh(device.type, (world_size() // near, near), mesh_dim_names=("copies", "slices"))
        mesh = mesh["slices"] if near == world_size() else mesh
    _sharding_plan = ShardingPlan(mesh, blocks, dtype)


def distribute_model(net: nn.Module) -> nn.Module:
    """The model, in place, with equal trainable weights in all processes, and sharded if the plan says so. A model that
    trains a part of its weights, such as a LoRA adapter, is not sharded here; its base is, by `shard_frozen`."""
    if world_size() == 1 or isinstance(net, FSDPModule):
        return net
    trained = [param for param in net.parameters() if param.requires_grad]
    for param in trained:
        dist.broadcast(master_weight(param).data, 0)
    round_master_weights(trained)
    if _sharding_plan.mesh is not None and len(trained) == len(list(net.parameters())):
        _empty_copies[net] = _empty_copy(net)
        _shard(net, set())
        net.float()  # each process trains its slices in float32; FSDP gathers them in the plan's type
    return net


def _empty_copy(net: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device."""
    places = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, places)


def shard_frozen(net: nn.Module) -> None:
    """Shard a frozen model in place, if the plan says so. Trainable adapters on it are not sharded. Afterwards the
    model cannot be copied and cannot get further adapters."""
    if _sharding_plan.mesh is not None and not isinstance(net, FSDPModule):
        _shard(net, {param for param in net.parameters() if param.requires_grad})


def _shard(net: nn.Module, left_out: set[nn.Parameter]) -> None:
    low: dict[str, Any] = (
        {}
        if _sharding_plan.dtype == torch.float32
        else {"param_dtype": _sharding_plan.dtype, "reduce_dtype": torch.float32}
    )
    # FSDP casts no inputs: times and rotary embeddings stay in float32, and families cast the rest (`compute_dtype`).
    policy = MixedPrecisionPolicy(**low, cast_forward_inputs=False)
    for name in _sharding_plan.blocks:
        for block in net.get_submodule(name).children():
            fully_shard(block, mesh=_sharding_plan.mesh, mp_policy=policy, ignored_params=left_out)
    # Reshard after each call: else a call without gradient keeps gathered weights, and the next call uses stale ones.
    fully_shard(net, mesh=_sharding_plan.mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=left_out)
    net.__dict__[COMPUTE_DTYPE] = _sharding_plan.dtype


def compute_dtype(net: Any) -> torch.dtype:
    """The type that a model, a `LoraAdapter` or a sharded model computes in. A sharded one's own parameters are slices
    in float32, and FSDP gathers them in the plan's type."""
    return getattr(net, COMPUTE_DTYPE, None) or next(net.parameters()).dtype


def gather_full_model(net: nn.Module) -> nn.Module | None:
    """The model with full weights in float32, to be saved, in the main process; None in the others. A model that is
    sharded or computes in another type is copied to the CPU. All processes must call it."""
    is_whole = net not in _empty_copies and all(master_weight(p) is p for p in net.parameters())
    if is_whole or hasattr(net, "lora_layers"):
        return net if is_main_process() else None
    state = {}
    for name, value in net.state_dict(keep_vars=True).items():
        value = master_weight(value).detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main_process():
            state[name] = value.cpu()
    if not is_main_process():
        return None
    made = copy.deepcopy(_empty_copies[net]) if net in _empty_copies else _empty_copy(net)
    made.load_state_dict(state, assign=True)
    return made
