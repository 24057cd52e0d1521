"""The tensors of a checkpoint on disk. A single process writes one file; several processes write one file each. Any
number of processes can read either.

This uses torch.distributed.checkpoint with safetensors files: the header of each file says where in the full tensors
its slices lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from npedit.nets import distributed

SINGLE_FILE = "state.safetensors"  # all tensors, written by a single process
PIECE_BYTES = 2**30  # that each of several processes reads at a time


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into an existing folder. All processes must call it: each writes its slices of the sharded tensors,
    and a share of the tensors that all processes hold.

    Raises:
        OSError: such as a full disk. It is raised in every process, whichever had it.
    """
    if distributed.world_size() == 1:
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        safetensors.torch.save_file(whole, folder / SINGLE_FILE)
        return
    parts = {k: v.detach().contiguous() for k, v in tensors.items()}
    try:
        dcp.save(parts, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error


def iterate_tensors(
    folder: Path, like: Callable[[str], Tensor | None], prefixes: str | tuple[str, ...] = ""
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a folder whose names begin with one of the prefixes, in full and on the CPU. If `like(name)` is a
    sharded tensor of the same shape, the result is this process's slice, on its device.

    Several processes read about `PIECE_BYTES` each at a time. To need no more memory, drop each tensor before you ask
    for the next. All processes must iterate together, and to the end.

    Raises:
        OSError, SafetensorError: a file is damaged or missing.
    """
    if distributed.world_size() == 1 and (folder / SINGLE_FILE).is_file():
        with safe_open(folder / SINGLE_FILE, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in sorted(file.keys()) if name.startswith(prefixes))
        return
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    facts = {name: cast(TensorStorageMetadata, found[name]) for name in sorted(found) if name.startswith(prefixes)}
    for names in _group_names({name: _size_in_bytes(facts[name]) for name in facts}):
        piece = {name: _empty_tensor(facts[name], like(name)) for name in names}
        _load_tensors(folder, piece)
        for name in names:
            yield name, piece.pop(name)


def _group_names(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in their order, in groups of at most `PIECE_BYTES`; a larger tensor is a group of its own."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > PIECE_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _size_in_bytes(facts: TensorStorageMetadata) -> int:
    return facts.size.numel() * facts.properties.dtype.itemsize


def _empty_tensor(facts: TensorStorageMetadata, model: Tensor | None) -> Tensor:
    if isinstance(model, DTensor) and model.shape == facts.size:
        return torch.empty_like(model)
    return torch.empty(facts.size, dtype=facts.properties.dtype)


def _load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors with what the folder holds under their names."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected: there is one process
            dcp.load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error


def _first_failure(error: dcp.CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]
