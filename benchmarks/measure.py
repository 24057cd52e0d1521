"""What all benchmarks share: timing that waits for the device, peak memory by part of a step, tables and their page."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from npedit.nets.device import device_name, is_accelerator, pick_device, profiler_activities, synchronize
from npedit.steps import np_edit
from npedit.steps.base import Timers

MIB = 2**20
MARK = "part of a step: "


def wait_for_device() -> None:
    """Wait until the device has finished its queued work."""
    synchronize(pick_device())


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]], repeats: int, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call. The calls take turns, so a slow moment of the machine affects all of them. Each call is
    given the number of its turn; the first `warm` turns are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            wait_for_device()
            start = time.perf_counter()
            call(turn)
            wait_for_device()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: Iterable[float]) -> float:
    """The median of these values."""
    return statistics.median(values)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors. Memory that several of them share is counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _ProfiledTimers(Timers):
    """Timers of a step that also mark its parts in a profile."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wait_for_device()
        with super().__call__(part), record_function(MARK + part):
            yield
            wait_for_device()


@contextmanager
def profiled_parts() -> Iterator[None]:
    """Inside, NP-Edit's step waits for the device at the end of each part and marks the part for `peaks`."""
    before, np_edit.Timers = np_edit.Timers, _ProfiledTimers
    try:
        yield
    finally:
        np_edit.Timers = before


def peak_bytes_by_part(call: Callable[[], object]) -> dict[str, int]:
    """Part of a step -> the most bytes that torch's profiler sees in it, less those from before the call. Where parts
    are nested, a moment counts for the innermost one."""
    device = pick_device()
    with profiled_parts(), profile(activities=profiler_activities(device), profile_memory=True) as seen:
        call()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    spans = [(e.start_ns(), e.end_ns(), e.name().removeprefix(MARK)) for e in events if e.name().startswith(MARK)]
    held, most = 0, {}
    for event in (e for e in events if e.name() == "[memory]" and e.device_type().name.lower() == device.type):
        held += event.nbytes()
        inside = [span for span in spans if span[0] <= event.start_ns() <= span[1]]
        if inside:
            part = max(inside)[2]  # the one that began last
            most[part] = max(most.get(part, 0), held)
    return most


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. Cells are printed as they are, so numbers must be formatted."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def describe_machine() -> str:
    """The device, its threads and torch's version."""
    if is_accelerator(pick_device()):
        return f"{device_name(pick_device())}, torch {torch.__version__}"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = model.group(1) if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def fill_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its two markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, text in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)"
        if not re.search(pattern, page, re.DOTALL):
            raise ValueError(f"expected the markers of {name} in the page; got none")
        page = re.sub(pattern, lambda m, text=text: m[1] + text + m[2], page, flags=re.DOTALL)
    return page
