"""What all benchmarks share: clocks that wait for the device, peak memory by part of a step, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.profiler import profile, record_function

from npedit.nets.device import pick_device, profiler_activities, synchronize
from npedit.steps import np_edit
from npedit.steps.base import Timers

MIB = 2**20
MARK = "part of a step: "


def wait() -> None:
    """Until the device has done all that it was asked to."""
    synchronize(pick_device())


def interleaved(calls: Mapping[str, Callable[[int], object]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns so that a slow moment of the machine meets all of them. Each is
    given the number of its turn; the first `warm` turns are not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call(turn)
            wait()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def middle(values: Iterable[float]) -> float:
    """Their median."""
    return statistics.median(values)


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, memory that several share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _Marked(Timers):
    """The clock of a step, whose parts show in a profile."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wait()
        with super().__call__(part), record_function(MARK + part):
            yield
            wait()


@contextmanager
def marked() -> Iterator[None]:
    """Inside, NP-Edit's step waits for the device at the end of each part and marks the part for `peaks`."""
    before, np_edit.Timers = np_edit.Timers, _Marked
    try:
        yield
    finally:
        np_edit.Timers = before


def peaks(call: Callable[[], object]) -> dict[str, int]:
    """Most bytes that a call of a step holds in each part of it, beside those from before the call, by torch's
    profiler. A moment counts for the innermost part."""
    device = pick_device()
    with marked(), profile(activities=profiler_activities(device), profile_memory=True) as seen:
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
    """Markdown; numbers as they are, so format them first."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
