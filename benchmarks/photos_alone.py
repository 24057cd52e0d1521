"""Data sets for the study "photos alone": the toy's pictures, and words that a writer with mistakes gave them.

    python -m benchmarks.photos_alone photos-alone [--photos 4000]
    npedit study recipes/study-photos-alone.yaml

All sets have the same pictures. `own` has the toy's own words. The words of the others come from a writer behind HTTP
(`npedit toy writer`) through `npedit prepare`: `written` from one without mistakes; `wrong-5`, `wrong-10`, `wrong-20`
from one that is wrong in 5, 10 and 20 % of its proposals, without the verifying pass; `checked-5` and so on with a
verifying pass that misjudges 2 % of the proposals. A finished set is not made again.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npedit.prepare.asking import Meter
from npedit.prepare.prepare import PrepareSettings, prepare
from npedit.prepare.prompts import load_prompts
from npedit.prepare.writer import WRITER, open_writer
from npedit.toy.dataset import write_dataset
from npedit.toy.edits import EDIT_TYPES
from npedit.toy.grade import grade_dataset
from npedit.toy.writer import ErrorRates
from npedit.toy.writer_server import MODEL, Writer, make_server

VERIFIER_MISTAKES = 0.02
WRONG = (5, 10, 20)  # percent of the proposals
SETS: dict[str, tuple[float, bool]] = {  # name -> (share of mistakes, whether proposals are verified)
    "written": (0.0, True),
    **{f"wrong-{p}": (p / 100, False) for p in WRONG},
    **{f"checked-{p}": (p / 100, True) for p in WRONG},
}


@contextmanager
def serve_writer(rates: ErrorRates, seed: int) -> Iterator[str]:
    """The address of a writer that runs in threads of this process."""
    server = make_server(Writer(rates, seed), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_set(photos: Path, folder: Path, mistakes: float, is_verified: bool, seed: int = 0) -> dict[str, Any]:
    """Write one data set for the pictures in `photos`, one row a picture; returns the facts of prepare.json, with the
    true share of wrong rows as `wrong_share`."""
    settings = PrepareSettings(
        {kind: 1 / len(EDIT_TYPES) for kind in EDIT_TYPES}, per_photo=1, seed=seed, duplicates="off", held_out=0.0
    )
    with serve_writer(ErrorRates(mistakes, 0.0, VERIFIER_MISTAKES if mistakes else 0.0), seed) as url:
        writer = open_writer(url, MODEL, WRITER, workers=4, jpeg_quality=0)
        facts = prepare(photos, folder, settings, load_prompts(), writer, writer if is_verified else None, Meter())
    rows, wrong, faults = grade_dataset(folder)
    return {**facts, "wrong_share": wrong / rows, "faults": dict(faults)}


def write_sets(folder: Path, photos: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write the pictures and all data sets that are not there yet; yields (name, facts) of each set, which
    `FOLDER/NAME.json` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    bare = folder / "photos"
    if not bare.exists():
        write_dataset(bare, photos, seed, bare=True)
    if not (folder / "own").exists():
        write_dataset(folder / "own", photos, seed)
    for name, (mistakes, is_verified) in SETS.items():
        kept = folder / f"{name}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(write_set(bare, folder / name, mistakes, is_verified, seed), indent=1))
        yield name, json.loads(kept.read_text())


def main() -> None:
    """See the module's head."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos_alone")
    parser.add_argument("folder", type=Path, help="where the sets go")
    parser.add_argument("--photos", type=int, default=4000, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    console = Console(soft_wrap=True)
    for name, facts in write_sets(chosen.folder, chosen.photos, chosen.seed):
        counts = facts["counts"]
        words = f"{name}: {counts['rows']} rows, {counts['rejected']} rejected, {facts['wrong_share']:.1%} wrong"
        console.print(words, markup=False, highlight=False)


if __name__ == "__main__":
    main()
