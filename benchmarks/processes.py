"""The speed of two processes that share each batch, compared with one, by `npedit train` on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import median, table

QUIET = ('trainer.benchmark=""', "trainer.sample_every=0", "trainer.evaluate_every=0", "trainer.save_seconds=3600")


def seconds_per_update(recipe: str, updates: int, count: int, threads: int) -> float:
    """Seconds of one update: the median over a short run's NP-Edit updates without the first three."""
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["npedit", "train", recipe, "--out", str(run), *QUIET, "stages.0=null", f"stages.1.updates={updates}"]
        done = subprocess.run(
            start + words, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median(row["time/update"] for row in rows if "time/update" in row and row["step"] > 3)


def processes_table(recipe: str, pictures: int, updates: int) -> str:
    """The table of one process with one thread, one with two threads, and two with one thread each."""
    ways = {
        "one process, one thread": (1, 1),
        "one process, two threads": (1, 2),
        "two processes, a thread each": (2, 1),
    }
    taken = {name: seconds_per_update(recipe, updates, *way) for name, way in ways.items()}
    first = next(iter(taken.values()))
    rows = [(n, f"{1000 * s:.0f}", f"{pictures / s:.1f}", f"{first / s:.2f}") for n, s in taken.items()]
    return table(("", "ms an update", "pictures/s", "times as fast"), rows)
