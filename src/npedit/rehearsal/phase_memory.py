"""Peak memory of each part of an update: of the accelerator, or of this process on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from npedit.nets.device import peak_memory_gb, try_reset_peak_memory


class PhaseMemory:
    """Measures peak memory of named parts, which may be nested: a part's peak leaves out the parts inside it, as those
    of `npedit estimate` do. `peaks` is GiB by part, less what the process held when this object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.prefix = ""
        self.peaks: dict[str, float] = {}
        self._open: list[str] = []
        self.can_measure = try_reset_peak_memory(device)
        self.baseline = peak_memory_gb(device)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Record the peak inside the `with` block under `prefix` + `part`."""
        self._record()
        self._open.append(self.prefix + part)
        try:
            yield
        finally:
            self._record()
            self._open.pop()

    def _record(self) -> None:
        """Give the peak since the last call to the innermost part that is open."""
        if self._open:
            peak = peak_memory_gb(self.device) - self.baseline
            self.peaks[self._open[-1]] = max(self.peaks.get(self._open[-1], 0.0), peak)
        try_reset_peak_memory(self.device)
