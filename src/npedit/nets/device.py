"""The device that models compute on. It is chosen here, and questions about it are answered here and nowhere else.

`torch.accelerator` names the machine's accelerator: CUDA (ROCm too, which PyTorch calls "cuda"), Apple's MPS or Intel's
XPU. npedit is tested on CPUs, and with a GPU that is only pretended
(`tests/support/pretend_gpu.py`). All accelerators are untried.

The environment variable NPEDIT_DEVICE overrides the choice: "cpu", "cuda", "cuda:1", "mps", "xpu".
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from npedit.errors import UserError

VARIABLE = "NPEDIT_DEVICE"
CPU = torch.device("cpu")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


def pick_device(requested: str | torch.device | None = None) -> torch.device:
    """The device to compute on: the requested one, else the one in NPEDIT_DEVICE, else the accelerator, else the CPU.

    A device without an index, such as "cuda", means the current one of this process.

    Raises:
        UserError: the name is not that of a device, or this machine has no such device.
    """
    name, source = (str(requested), "device") if requested else (os.environ.get(VARIABLE, "").strip(), VARIABLE)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not name:
        return torch.device(found.type) if found else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    here = {"cpu": 1} | ({found.type: torch.accelerator.device_count()} if found else {})
    if device is None or (device.index or 0) >= here.get(device.type, 0):
        seen = ", ".join(f"{kind} ({count})" for kind, count in here.items())
        raise UserError(
            f"{source}: expected a device of this machine, which has {seen}; got {name!r}; choose one of these, or "
            f"leave {source} unset"
        )
    return device


def offload_device() -> torch.device:
    """The device that keeps frozen models while no step uses them."""
    return CPU


def is_accelerator(device: torch.device) -> bool:
    """Whether the device is a GPU or another accelerator, and not the CPU."""
    return device.type not in ("cpu", "meta")


def is_cuda(device: torch.device) -> bool:
    """Whether the device is a CUDA (or ROCm) GPU, which some packages need."""
    return device.type == "cuda"


def accelerator_count() -> int:
    """How many accelerators this machine's processes may use: 0 on a CPU, 1 if NPEDIT_DEVICE names one by index."""
    device = pick_device()
    if not is_accelerator(device):
        return 0
    return torch.accelerator.device_count() if device.index is None else 1


def device_name(device: torch.device) -> str:
    """The model name of a GPU ("NVIDIA H200"), or the device's type where PyTorch has no name for it."""
    name = getattr(torch.get_device_module(device), "get_device_name", None) if is_accelerator(device) else None
    return name(device) if name else device.type


def default_dtype(device: torch.device) -> torch.dtype:
    """The type for models that nobody chose a type for: bfloat16 on an accelerator, float32 on a CPU."""
    return torch.bfloat16 if is_accelerator(device) else torch.float32


def supports_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device computes with this type, and not only by emulation."""
    try:
        x = torch.ones(1, 1, 8, 8, device=device).to(dtype)
        result = x[0, 0] @ x[0, 0] + torch.nn.functional.conv2d(x, x, padding=4)[0, 0, :8, :8]
        works = bool(result.isfinite().all())
    except (RuntimeError, TypeError):  # TypeError: MPS has no float64
        return False
    if works and is_cuda(device) and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return works


def allow_tf32(device: torch.device) -> None:
    """Let CUDA multiply float32 matrices with TensorFloat-32 from now on: 10 bits of precision, several times the
    speed. Other devices are left as they are."""
    if is_cuda(device):
        torch.set_float32_matmul_precision("high")


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GiB since the start or the last `try_reset_peak_memory`: of the accelerator, or of this process
    where PyTorch does not measure it."""
    measure = getattr(torch.get_device_module(device), "max_memory_allocated", None) if is_accelerator(device) else None
    if measure:
        return measure(device) / 2**30
    if STATUS.is_file():
        return next(int(line.split()[1]) for line in STATUS.open() if line.startswith("VmHWM")) / 2**20  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


def try_reset_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory_gb` measure from now on. Returns whether this machine can do so."""
    if is_accelerator(device):
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset:
            reset(device)
        return reset is not None
    try:
        CLEAR_REFS.write_text("5")  # Linux: sets the process's peak resident memory to the present one
    except OSError:
        return False
    return True


def set_process_device(device: torch.device, index: int) -> None:
    """Make one accelerator of this machine the current one of this process. MPS has one only, so nothing is set."""
    choose = getattr(torch.get_device_module(device), "set_device", None)
    if choose:
        choose(index)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued on it."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def process_group_backend(device: torch.device) -> str:
    """The backends of torch.distributed for this device: gloo for CPU tensors, and NCCL, for instance, for a GPU's."""
    if not is_accelerator(device):
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """What torch's profiler should record on this device."""
    extra = getattr(ProfilerActivity, device.type.upper(), None) if is_accelerator(device) else None
    return [ProfilerActivity.CPU] + ([extra] if extra is not None else [])
