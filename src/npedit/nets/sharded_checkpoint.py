"""The tensors of a checkpoint on disk. A single process writes one file; several processes write one file each. Any
number of processes can read either.

This uses torch.distributed.checkpoint with safetensors files: the header of each file says where in the full tensors
its slices lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from npedit.nets import distributed

SINGLE_FILE = "state.safetensors"  # all tensors, written by a single process


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


def read_tensors(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors in a folder, in full and on the CPU. If `like(name)` is a sharded tensor of the same shape, the
    result is this process's slice, on its device. All processes must call it.

    Raises:
        OSError, SafetensorError: a file is damaged or missing.
    """
    if distributed.world_size() == 1 and (folder / SINGLE_FILE).is_file():
        return safetensors.torch.load_file(folder / SINGLE_FILE)
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        model, tensor_facts = like(name), cast(TensorStorageMetadata, facts)  # the files hold nothing but tensors
        if isinstance(model, DTensor) and model.shape == tensor_facts.size:
            tensors[name] = torch.empty_like(model)
        else:
            tensors[name] = torch.empty(tensor_facts.size, dtype=tensor_facts.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected: there is one process
            dcp.load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error
    return tensors


def _first_failure(error: dcp.CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]
