"""A large set of photos: time and memory of a start, and how fast batches are read.

    python -m benchmarks.data_loading [--rows 3000000] [--folder FOLDER] [--step-seconds 1.0]
    python -m benchmarks.data_loading --run RUN

It generates an imagefolder of so many rows in FOLDER (kept if it is there already; by default in a temporary folder).
The photos are 64 JPEG files of random pictures under many names (hard links), so that a large set needs little space.
Each start is a process of its own. Seconds are those of the clock and, in brackets, of the processor: where other
programs run, the second number tells more. Memory is what the process holds for itself (RssAnon): pages of mapped files
are left out, as all processes share them in the page cache.

With --run it generates nothing: it reads the metrics of a run and says which share of an update its loop waited for
batches (with the prefetch that the run had), by stage.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

BASES, PER_FOLDER, MOST_LINKS = 64, 1000, 60_000
SIZES = ((512, 512), (384, 640), (640, 384), (500, 700))  # (H, W) of the photos
TYPES = ("add", "replace", "recolour", "background", "style")
BATCH, BATCHES = 8, 24
Measured = tuple[float, float, float]  # seconds, seconds of the processor, MiB
EVERY = 0.02  # seconds between two looks at the memory


def write_set(folder: Path, rows: int) -> None:
    """Write the generated set, unless the folder has it."""
    done = folder / "rows.txt"
    if done.is_file() and done.read_text() == str(rows):
        return
    (folder / "photos").mkdir(parents=True)
    draw = np.random.default_rng(0)
    bases: list[Path] = []
    with (folder / "photos" / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % (BASES * MOST_LINKS) == 0:
                bases = [_write_base(folder / f"base-{number}-{k}.jpg", draw, k) for k in range(BASES)]
            name = f"{number // PER_FOLDER:05d}/{number:08d}.jpg"
            photo = folder / "photos" / name
            if number % PER_FOLDER == 0:
                photo.parent.mkdir()
            os.link(bases[number % BASES], photo)
            file.write(json.dumps(_row(name, number)) + "\n")
    done.write_text(str(rows))


def _write_base(path: Path, draw: np.random.Generator, number: int) -> Path:
    height, width = SIZES[number % len(SIZES)]
    small = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def _row(name: str, number: int) -> dict[str, str]:
    return {
        "file_name": name,
        "instruction": f"make the object number {number} in this photo look like the other one",
        "edit_type": TYPES[number % len(TYPES)],
        "object": f"object {number}",
        "source_caption": f"a photo of the object number {number} on a table, in front of a window",
        "target_caption": f"a photo of the object number {number} on a table, changed, in front of a window",
        "id": f"{number:08d}",
    }


def own_memory() -> int:
    """The memory in bytes that this process holds for itself, pages of files left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class _Meter:
    """Seconds of the clock and of the processor, and the most memory above that at the beginning, of each part."""

    def __init__(self) -> None:
        self.found: dict[str, Measured] = {}
        self._before = own_memory()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        most, stop = [own_memory()], threading.Event()

        def watch() -> None:
            while not stop.wait(EVERY):
                most[0] = max(most[0], own_memory())

        thread = threading.Thread(target=watch)
        thread.start()
        start, used = time.perf_counter(), time.process_time()
        yield
        seconds, busy = time.perf_counter() - start, time.process_time() - used
        stop.set()
        thread.join()
        self.found[name] = seconds, busy, (max(most[0], own_memory()) - self._before) / 2**20


def start(folder: str, cache: str, answer) -> None:
    """One start of a run as far as the data go; puts what is measured of each part into the queue `answer`."""
    os.environ["NPEDIT_CACHE"] = cache
    from npedit.data.imagefolder import Settings, Source

    meter = _Meter()
    with meter("source"):
        source = Source(Settings(path=folder, prefetch=0), 0)
    with meter("first batch"):
        source.batch(0, BATCH)
    with meter("fingerprint"):
        source.fingerprint()
    with meter("inventory"):
        source.inventory()
    with meter("texts"):
        for _ in source.texts():
            pass
    with meter("held-out rows"):
        source.settings = source.settings.model_copy(update={"held_out": 64})
        source._choose_held_out()
    with meter("first batches of every size"):
        for index in range(1, BATCHES):
            source.batch(index, BATCH)
    for prefetch in (0, 2):
        del source
        gc.collect()
        source = Source(Settings(path=folder, prefetch=prefetch), 0)
        for index in range(BATCHES):
            source.batch(index, BATCH)
        with meter(f"{BATCHES} batches of {BATCH}, prefetch {prefetch}"):
            for index in range(BATCHES, 2 * BATCHES):
                source.batch(index, BATCH)
    ctypes.CDLL(None).malloc_trim(0)  # Linux: give back what pictures have left in the allocator
    with meter("in use at the end"):
        pass
    answer.put(meter.found)


def measure_start(folder: Path, cache: Path) -> dict[str, Measured]:
    """`start` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=start, args=(str(folder), str(cache), answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def loading_table(folder: Path, rows: int, step_seconds: float = 0.0) -> str:
    """The table in Markdown. With `step_seconds`, the time of an update, the share of it that reading takes."""
    write_set(folder, rows)
    cache = folder / "cache"
    first, second = (measure_start(folder / "photos", cache) for _ in range(2))
    lines = [f"| {rows:,} rows | first start | later starts |", "| --- | --- | --- |"]
    for name in second:
        cells = [
            f"{found[name][0]:.2f} s ({found[name][1]:.2f}), {found[name][2]:.0f} MiB" for found in (first, second)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    waited = second[f"{BATCHES} batches of {BATCH}, prefetch 0"][0] / BATCHES
    lines.append(f"\nOne batch of {BATCH} photos takes {waited * 1000:.0f} ms without prefetch")
    if step_seconds:
        lines[-1] += f", {waited / step_seconds:.1%} of an update of {step_seconds:g} s, which prefetch hides"
    return "\n".join(lines) + "."


def waiting_table(run: Path) -> str:
    """A Markdown table of a run's stages: seconds of an update, seconds of waiting for batches, the share of it. The
    first update of each stage is left out: it starts the threads that read ahead.

    Raises:
        UserError: there are fewer than two updates in each stage.
    """
    from npedit.errors import UserError
    from npedit.runs.checkpoint import METRICS, read_rows

    by_stage: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(run / METRICS):
        if "time/data" in row and "time/update" in row:
            name = f"{row.get('stage')}, {row.get('stage_name')}"
            by_stage.setdefault(name, []).append((row["time/data"], row["time/update"]))
    lines = ["| stage | updates | median update | mean wait for batches | share |", "| --- | --- | --- | --- | --- |"]
    for name, pairs in by_stage.items():
        waits, updates = np.array(pairs[1:]).reshape(-1, 2).T
        if len(waits):
            share = waits.sum() / updates.sum()
            cells = (name, len(waits), f"{np.median(updates):.3f} s", f"{waits.mean() * 1000:.1f} ms", f"{share:.2%}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if len(lines) == 2:
        raise UserError(f"expected a run with two updates or more; got {run}; train longer")
    return "\n".join(lines)


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loading")
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--folder", default="", help="where the generated set is, or will be")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="seconds of an update, to compare with")
    parser.add_argument("--run", default="", help="a run's folder: which share of its updates waited for batches")
    chosen = parser.parse_args()
    if chosen.run:
        Console(soft_wrap=True).print(waiting_table(Path(chosen.run)), markup=False, highlight=False)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary) / f"rows-{chosen.rows}"
        table = loading_table(folder, chosen.rows, chosen.step_seconds)
    Console(soft_wrap=True).print(table, markup=False, highlight=False)


if __name__ == "__main__":
    main()
