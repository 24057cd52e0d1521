"""A GPU that is pretended, so that tests on a CPU find code that would fail on a real one.

Inside `pretend_gpu()` PyTorch seems to have one accelerator, "cuda:0". Its tensors are ordinary CPU tensors that are
remembered as those of the GPU: `.device` says so, and all that is computed from them is on the GPU too. What CUDA
refuses raises `WrongDevice` here:

- one operation on tensors of both devices (a CPU number without dimensions may meet GPU tensors, and CPU indices may
  pick from them)
- a random generator of the CPU that shall fill a tensor of the GPU
- a tensor of the GPU that is read as a NumPy array

Speed, memory, kernels and number types are those of the CPU. Code in other threads is not watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLAIN_DEVICE = Tensor.device.__get__
FACTORIES = (
    *("tensor", "as_tensor", "asarray", "zeros", "ones", "full", "empty", "empty_strided", "rand", "randn", "randint"),
    *("arange", "linspace", "logspace", "eye", "randperm", "normal", "scalar_tensor", "tril_indices", "triu_indices"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
)
NEW = ("new_tensor", "new_zeros", "new_ones", "new_full", "new_empty")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class WrongDevice(AssertionError):
    """Code that a real GPU would refuse."""


class PretendGpu(TorchDispatchMode):
    """Remembers which storages are on the GPU, and watches every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu: set[int] = set()  # storages
        self.made_inside: set[int] = set()  # storages that PyTorch itself made, not yet used with others: on any device
        self.operations = 0  # on tensors of the GPU

    def device(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return GPU if _storage(tensor) in self.on_gpu else PLAIN_DEVICE(tensor)

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Say where a tensor is; returns it."""
        self.made_inside.discard(key := _storage(tensor))
        if device != GPU:
            self.on_gpu.discard(key)
        elif key and key not in self.on_gpu:
            self._remember(tensor, self.on_gpu)
        return tensor

    def keep(self, tensor: Tensor) -> Tensor:
        """Settle that a tensor stays where it is; returns it."""
        return self.put(tensor, self.device(tensor))

    def _remember(self, tensor: Tensor, where: set[int]) -> None:
        where.add(key := _storage(tensor))
        weakref.finalize(tensor.untyped_storage(), where.discard, key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        known = [t for t in given if _storage(t) not in self.made_inside]
        devices = self._devices(func, known)
        if len(devices) > 1 and func not in COPIES:
            shapes = ", ".join(f"{tuple(t.shape)} on {self.device(t)}" for t in known)
            raise WrongDevice(f"{func} of {shapes}")
        place = self.device(known[0]) if func in COPIES and known else GPU if GPU in devices else CPU
        if place == GPU and isinstance(kwargs.get("generator"), torch.Generator):
            raise WrongDevice(f"{func} on the GPU with a generator of the CPU")
        out = func(*args, **kwargs)
        self.operations += place == GPU
        made = _tensors(out)
        for tensor in made if known else []:
            self.put(tensor, place)
        for tensor in given if GPU in devices else []:
            if _storage(tensor) in self.made_inside:
                self.put(tensor, GPU)
        for tensor in [] if known else made:
            if _storage(tensor):
                self._remember(tensor, self.made_inside)
        return out

    def _devices(self, func: Any, given: list[Tensor]) -> set[torch.device]:
        """The devices of the tensors that must be on one device."""
        watched = [*given[:1], *(t for t in given[1:] if self.device(t) == GPU)] if func in INDEXING else given
        return {self.device(t) for t in watched if t.dim() or self.device(t) == GPU}


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors of function transforms
        return 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _place(device: Any) -> torch.device:
    """The device; that of "cuda" is the first one."""
    return GPU if torch.device(device).type == "cuda" else torch.device(device)


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """Inside the block this process seems to have one GPU."""
    _device_constructors()  # `with torch.device(...)` remembers the plain functions
    gpu = PretendGpu()
    patches = [mock.patch.object(torch, name, _factory(gpu, getattr(torch, name))) for name in FACTORIES]
    patches += [mock.patch.object(Tensor, name, _factory(gpu, getattr(Tensor, name))) for name in NEW]
    patches += [mock.patch.object(Tensor, name, made, create=True) for name, made in _methods(gpu).items()]
    patches += [mock.patch.object(torch.accelerator, name, made) for name, made in ACCELERATOR.items()]
    patches += [mock.patch.object(torch.cuda, name, made) for name, made in CUDA.items()]
    for patch in patches:
        patch.start()
    try:
        with gpu:
            yield gpu
    finally:
        for patch in reversed(patches):
            patch.stop()


ACCELERATOR: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    # PyTorch's optimizers ask with `check_available`, to look at CUDA's streams, which are not there
    "current_accelerator": lambda check_available=False: None if check_available else torch.device("cuda"),
    "device_count": lambda: 1,
    "synchronize": lambda device=None: None,
}
CUDA: dict[str, Callable[..., Any]] = {
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_device_name": lambda device=None: "a pretended GPU",
    "is_bf16_supported": lambda including_emulation=True: True,
    "set_device": lambda device: None,
}


def _factory(gpu: PretendGpu, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, on the device that it is asked for."""

    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False) and device is not None and _place(device) == GPU:
            raise WrongDevice("page-locked memory on the GPU")
        if device is None:
            return gpu.keep(make(*args, **kwargs))
        if _place(device) not in (CPU, GPU):
            return make(*args, **kwargs)
        if _place(device) == GPU and kwargs.get("generator") is not None:
            raise WrongDevice(f"{make.__name__} on the GPU with a generator of the CPU")
        plain = make(*args, **kwargs | {"device": CPU})
        if gpu.device(plain) == _place(device):
            return gpu.keep(plain)
        return gpu.put(plain.detach().clone(), _place(device)).requires_grad_(plain.requires_grad)

    return made


def _methods(gpu: PretendGpu) -> dict[str, Any]:
    """The methods and attributes of tensors that concern devices."""
    plain_to, plain_numpy, plain_array = Tensor.to, Tensor.numpy, Tensor.__array__

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and _place(device) not in (CPU, GPU):
            return plain_to(self, *args, **kwargs)
        moves = device is not None and _place(device) != gpu.device(self)
        kept = {} if memory_format is None else {"memory_format": memory_format}
        out = plain_to(self, dtype=dtype or self.dtype, copy=copy or moves, **kept)
        return gpu.put(out, _place(device)) if moves else out

    def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_gpu(self)
        return plain_numpy(self, *args, **kwargs)

    def array(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_gpu(self)
        return plain_array(self, *args, **kwargs)

    def refuse_gpu(tensor: Tensor) -> None:
        if gpu.device(tensor) == GPU:
            raise WrongDevice(f"a tensor {tuple(tensor.shape)} of the GPU read as a NumPy array")

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        if gpu.device(self) == GPU:
            raise WrongDevice("page-locked memory for a tensor of the GPU")
        return self.clone()

    return {
        "device": property(gpu.device),
        "is_cuda": property(lambda self: gpu.device(self) == GPU),
        "is_cpu": property(lambda self: gpu.device(self) == CPU),
        "to": to,
        "cpu": lambda self: to(self, CPU),
        "cuda": lambda self: to(self, GPU),
        "numpy": numpy,
        "__array__": array,
        "pin_memory": pin_memory,
    }
