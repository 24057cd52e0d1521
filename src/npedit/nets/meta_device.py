"""Count the memory that real code would need, without using it: tensors on torch's meta device have no data.

Inside `MemoryCounter` every storage that an operation creates is counted while it lives: by its label, and by the part
of the step that runs now (`Timers` sets `current_part`). So the real training code runs on models of any size, and the
peak of its memory is measured.

- Integer and boolean tensors are small and control the code (lengths, masks, positions). They stay on the CPU, with
  data. Only floating-point tensors are meta tensors.
- The value of a meta scalar that the code reads, such as a loss, is 1.
- Attention counts as a fused kernel: it keeps its inputs, its output and one number per row.

Not counted: temporary memory inside one kernel, fragmentation in the allocator, and the libraries of the device.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META, CPU = torch.device("meta"), torch.device("cpu")
ACTIVATIONS = "activations"  # the label of everything without another label
current_part: ContextVar[str] = ContextVar("current_part", default="")  # the part of a step that runs now

aten = torch.ops.aten
FACTORIES = {torch.tensor, torch.as_tensor, torch.arange, torch.zeros, torch.ones, torch.full}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten.embedding.default, aten.embedding_dense_backward.default}  # fmt: skip


class MemoryCounter:
    """Counts the storages of meta tensors, and floating-point operations; a context manager.

    `live` is the bytes that exist now, by label. `peaks` has the same at the peak of each part of a step. `share` gives
    the fraction of a label's bytes that this device holds. `working` is the label of new storages. `flops` is the
    operations of products, convolutions and attention, by part of a step; `flops_at_optimizer_steps` is for the code
    that counts optimizer steps: what `flops` was at the end of each.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.share: dict[str, float] = {}
        self.working = ACTIVATIONS
        self.flops: Counter[str] = Counter()
        self.flops_at_optimizer_steps: defaultdict[str, list[int]] = defaultdict(list)
        self._known: dict[int, tuple[str, int]] = {}  # storage -> its label, the bytes counted
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        library = self._stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        self._stack.enter_context(_IntegersOnCpu())
        self._stack.enter_context(_CountOperations(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def label(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Give the storages of these meta tensors a label, whether they were counted before or not."""
        for tensor in tensors:
            if tensor.is_meta:
                self._count_storage(tensor.untyped_storage(), what)

    def add_bytes(self, what: str, size: int) -> None:
        """Add bytes to a label; a negative number subtracts, for instance when models move to another device."""
        self.live[what] += size
        self._update_peaks()

    def count_tensor(self, tensor: Tensor) -> None:
        """Count the result of an operation."""
        if tensor.is_meta:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._count_storage(storage, self.working)

    def _count_storage(self, storage: Any, what: str) -> None:
        key, size = storage._cdata, round(storage.nbytes() * self.share.get(what, 1))
        if key in self._known:
            before, counted = self._known[key]
            self.live[before] -= counted
        else:
            weakref.finalize(storage, self._forget_storage, key)
        self._known[key] = what, size
        self.live[what] += size
        self._update_peaks()

    def _forget_storage(self, key: int) -> None:
        what, size = self._known.pop(key)
        self.live[what] -= size

    def _update_peaks(self) -> None:
        part = current_part.get()
        if self.live.total() > self.peaks.get(part, Counter()).total():
            self.peaks[part] = self.live.copy()


class _IntegersOnCpu(TorchFunctionMode):
    """Above autograd: integer tensors are created on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = func(*args, **kwargs)
        if func in FACTORIES and made.is_meta and not made.is_floating_point():
            return func(*args, **{**kwargs, "device": CPU})
        return made


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as one fused kernel, whose memory depends on the shapes alone."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]


class _CountOperations(TorchDispatchMode):
    """Below autograd: counts results, and gives values where code reads a meta tensor."""

    def __init__(self, counted: MemoryCounter) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_iterate_tensors(args), *_iterate_tensors(kwargs.values())]
        is_meta = any(t.is_meta for t in given)
        if func is aten._local_scalar_dense.default and is_meta:
            return bool(1) if given[0].dtype == torch.bool else 1.0 if given[0].is_floating_point() else 1
        if func is aten._to_copy.default:
            return self._copy_to(given[0], func, args, kwargs)
        if is_meta and func not in INDEXING and not all(t.is_meta or t.dim() == 0 for t in given):
            args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
        out = func(*args, **kwargs)
        for tensor in _iterate_tensors(out if isinstance(out, tuple | list) else (out,)):
            self.counted.count_tensor(tensor)
        self.counted.flops[current_part.get()] += count_flops(func, args, kwargs, out)
        return out

    def _copy_to(self, tensor: Tensor, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A copy on another device or of another type. Integers never become meta tensors, and the reverse."""
        place = kwargs.get("device") or tensor.device
        kind = kwargs.get("dtype") or tensor.dtype
        if torch.device(place) == META and not kind.is_floating_point and tensor.device == CPU:
            place = CPU
        elif tensor.is_meta and torch.device(place) == CPU:
            return torch.ones(tensor.shape, dtype=kind)
        out = func(*args, **{**kwargs, "device": place})
        self.counted.count_tensor(out)
        return out


def count_flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one call of a PyTorch operator, 0 for operators other than products, convolutions
    and attention. A multiplication and an addition are two operations, as in `torch.utils.flop_counter`."""
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def _iterate_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among these values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _iterate_tensors(value)


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta or tensor.dim() == 0 else torch.empty_like(tensor, device=META)


def read_model_config(path: Path) -> dict[str, Any]:
    """The content of a model's published JSON config, without the note of its source.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} in {path.parent}; there is none")
    found = json.loads(path.read_text(encoding="utf-8"))
    found.pop("_source", None)
    return found
