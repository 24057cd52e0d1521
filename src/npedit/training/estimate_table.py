"""An estimate as text: `npedit estimate` prints these lines."""

from __future__ import annotations

from typing import Any

from npedit.errors import UserError
from npedit.training.estimate import COLUMNS, GIB, Estimate

DISK_KEYS = ("models", "checkpoints", "final")  # of `Estimate.disk`, in its order


def estimate_table(found: Estimate) -> list[str]:
    """The estimate as lines of text, in GiB; columns that are empty are left out."""
    shown = [c for c in COLUMNS if any(p.bytes_by_part.get(c, 0) for p in found.phases)]
    width = max(len(p.name) for p in found.phases)
    lines = [f"{'GiB':{width}}" + "".join(f"{c:>{max(7, len(c) + 1)}}" for c in (*shown, "total"))]
    for phase in found.phases:
        figures = [*((c, phase.bytes_by_part.get(c, 0)) for c in shown), ("total", phase.total)]
        lines.append(f"{phase.name:{width}}" + "".join(f"{size / GIB:{max(7, len(c) + 1)}.2f}" for c, size in figures))
    lines.append(f"Peak: {found.peak.total / GIB:.1f} GiB, in {found.peak.name}.")
    if found.offloaded:
        lines.append(f"CPU memory: {found.offloaded / GIB:.1f} GiB in each process, for memory.offload.")
    return lines + [f"Disk: {what} {size / GIB:.1f} GiB" for what, size in found.disk.items()]


def fit_message(found: Estimate, gpu: str) -> str:
    """Whether the peak fits a GPU with a memory such as "24GB", read as GiB. A tenth is kept for what is not counted.

    Raises:
        UserError: the size cannot be read.
    """
    size = parse_gpu_size(gpu)
    peak = found.peak.total / GIB
    verdict = fit_verdict(peak, size)
    if verdict == "fits":
        return f"fits {size:g} GB: {size - peak:.1f} are left for what is not counted"
    if verdict == "tight":
        return f"tight in {size:g} GB: only {size - peak:.1f} are left for what is not counted"
    return f"does not fit {size:g} GB: {peak - size:.1f} too much"


def estimate_values(found: Estimate, gpu: str = "") -> dict[str, Any]:
    """The estimate for machines to read: bytes by phase and part, the peak, the disk, and whether it fits `gpu`.

    Raises:
        UserError: the size of the GPU cannot be read.
    """
    phases = [{"name": p.name, "bytes": p.bytes_by_part, "total_bytes": p.total} for p in found.phases]
    disk = dict(zip(DISK_KEYS, found.disk.values(), strict=True))
    values: dict[str, Any] = {
        "phases": phases,
        "peak": {"phase": found.peak.name, "bytes": found.peak.total},
        "disk_bytes": disk,
        "offloaded_bytes": found.offloaded,
    }
    if not gpu:
        return values | {"fit": None}
    size, peak = parse_gpu_size(gpu), found.peak.total / GIB
    return values | {"fit": {"gpu_gib": size, "verdict": fit_verdict(peak, size), "free_gib": size - peak}}


def fit_verdict(peak: float, size: float) -> str:
    """One of "fits", "tight" (above nine tenths of the memory) or "does not fit". `peak` and `size` in GiB."""
    return "fits" if peak <= 0.9 * size else "tight" if peak <= size else "does not fit"


def parse_gpu_size(gpu: str) -> float:
    """The GiB of a GPU's memory written such as "24GB".

    Raises:
        UserError: the size cannot be read.
    """
    number = gpu.upper().removesuffix("B").removesuffix("I").removesuffix("G")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise UserError(f"expected --gpu as in 24GB; got {gpu!r}; give the GPU's memory")
    return size
