"""The memory that a run of `npedit prepare` needs for its answers, which it all holds.

    python -m benchmarks.prepare_memory [--answers 100000] [--characters 700]

Generated answers of this length are written to a file and opened by a new process, as a resumed run does. Memory is
what the process holds for itself (RssAnon), above what it held before: the most while the file is read, and what is in
use afterwards, when free pages are given back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import random
import string
import tempfile
import threading
from pathlib import Path

from rich.console import Console

from benchmarks.data_loading import EVERY, own_memory
from npedit.judges.cache import AnswerCache, hash_json

MB = 1e6


def write_answers(path: Path, answers: int, characters: int) -> None:
    """Write answers as `prepare` keeps them (`prepare/asking.py`); each text is another one."""
    draw = random.Random(0)
    usage = {"prompt_tokens": 1300, "completion_tokens": 180}
    fixed = {"pass": "write", "outcome": "ok", "detail": "", "model": "model", "address": "http://localhost:8000/v1"}
    with path.open("w", encoding="utf-8") as file:
        for number in range(answers):
            text = "".join(draw.choices(string.ascii_lowercase + " ", k=characters))
            file.write(json.dumps({"key": hash_json(number), "text": text, "usage": usage, **fixed}) + "\n")


def measure(path: Path) -> tuple[int, int, int]:
    """(answers, highest memory while they are read, memory afterwards), in bytes; in a process of its own."""
    before = most = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(EVERY):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with AnswerCache(path) as cache:
        done.set()
        watcher.join()
        ctypes.CDLL(None).malloc_trim(0)  # Linux
        return len(cache), most - before, own_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=700)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        write_answers(path, chosen.answers, chosen.characters)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            count, most, held = pool.apply(measure, (path,))
        size = path.stat().st_size
    words = f"{count:,} answers of {chosen.characters} characters: file {size / MB:.0f} MB, memory {held / MB:.0f} MB"
    Console(soft_wrap=True).print(f"{words}, while they are read {most / MB:.0f} MB", highlight=False)


if __name__ == "__main__":
    main()
