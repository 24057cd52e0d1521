"""An estimate as text: `npedit estimate` prints these lines."""

from __future__ import annotations

from npedit.errors import UserError
from npedit.training.estimate import COLUMNS, GIB, Estimate


def estimate_table(found: Estimate) -> list[str]:
    """The estimate as lines of text, in GiB; columns that are empty are left out."""
    shown = [c for c in COLUMNS if any(p.bytes_by_part.get(c, 0) for p in found.phases)]
    width = max(len(p.name) for p in found.phases)
    lines = [f"{'GiB':{width}}" + "".join(f"{c:>{max(7, len(c) + 1)}}" for c in (*shown, "total"))]
    for phase in found.phases:
        figures = [*((c, phase.bytes_by_part.get(c, 0)) for c in shown), ("total", phase.total)]
        lines.append(f"{phase.name:{width}}" + "".join(f"{size / GIB:{max(7, len(c) + 1)}.2f}" for c, size in figures))
    lines.append(f"Peak: {found.peak.total / GIB:.1f} GiB, in {found.peak.name}.")
    return lines + [f"Disk: {what} {size / GIB:.1f} GiB" for what, size in found.disk.items()]


def fit_message(found: Estimate, gpu: str) -> str:
    """Whether the peak fits a GPU with a memory such as "24GB", read as GiB. A tenth is kept for what is not counted.

    Raises:
        UserError: the size cannot be read.
    """
    number = gpu.upper().removesuffix("B").removesuffix("I").removesuffix("G")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if size <= 0:
        raise UserError(f"expected --gpu as in 24GB; got {gpu!r}; give the GPU's memory")
    peak = found.peak.total / GIB
    if peak <= 0.9 * size:
        return f"fits {size:g} GB: {size - peak:.1f} are left for what is not counted"
    if peak <= size:
        return f"tight in {size:g} GB: only {size - peak:.1f} are left for what is not counted"
    return f"does not fit {size:g} GB: {peak - size:.1f} too much"
