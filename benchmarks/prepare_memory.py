"""The memory that a run of `npedit prepare` needs for its answers, which stay in their file.

    python -m benchmarks.prepare_memory [--answers 100000] [--characters 700] [--photos 50000]

Generated answers of this length are written to a file and opened by a new process, as a resumed run does. Memory is
what the process holds for itself (RssAnon), above what it held before: the most while the file is read, and what is in
use afterwards, when free pages are given back. The last line is about the facts of photos and two rows for each, which
a run holds as long as it works.
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


def measure_photos(photos: int) -> int:
    """Memory of the facts of so many photos and of two rows for each, in bytes; in a process of its own."""
    numbers = {"bytes": 3_000_000, "modified": 1_795_957_578_744_502_219, "width": 4000, "height": 3000}
    hashes = {"phash": "9c13a9f393a46c59", "colours": "5a81c3" * 64}
    caption = "a red chair beside a wooden table in a bright room with two windows"
    words = {"instruction": "Replace the red chair with a blue sofa.", "object": "red chair", "edit_type": "replace"}
    questions = [{"question": "Is there a blue sofa beside the table?", "answer": "yes"}] * 2
    row = {
        **words,
        "asked_type": "replace",
        "source_caption": caption,
        "target_caption": caption,
        "questions": questions,
    }
    before, held = own_memory(), []
    for number in range(photos):
        photo = {"name": f"folder/{number}.jpg", "path": f"/photos/folder/{number}.jpg", "id": f"{number:016x}"}
        held.append(json.loads(json.dumps([{**photo, **numbers, **hashes}, *({**row, **photo} for _ in range(2))])))
    return own_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=700)
    parser.add_argument("--photos", type=int, default=50_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        write_answers(path, chosen.answers, chosen.characters)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            count, most, held = pool.apply(measure, (path,))
            facts = pool.apply(measure_photos, (chosen.photos,))
        size = path.stat().st_size
    words = f"{count:,} answers of {chosen.characters} characters: file {size / MB:.0f} MB, memory {held / MB:.0f} MB"
    out = Console(soft_wrap=True, highlight=False)
    out.print(f"{words}, while they are read {most / MB:.0f} MB")
    out.print(f"{chosen.photos:,} photos with two rows each: memory {facts / MB:.0f} MB")


if __name__ == "__main__":
    main()
