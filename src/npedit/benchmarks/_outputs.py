"""What benchmarks of pictures share: edited pictures on disk, made here or by others, and a table of their scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from npedit.data._photos import BadImage, read_photo
from npedit.errors import explain_write_errors
from npedit.scoring.metrics import ImageOpener
from npedit.scoring.results import MissingScore, lower_is_better

EDITED = "edited"  # the folder of edited pictures in a folder of results
CHUNK = 16
Edit = Callable[[Sequence[Image.Image], Sequence[str], int], list[Image.Image]]  # pictures, instructions, seed
Told = Callable[[int, int], None]  # done, of


@dataclass(frozen=True)
class Job:
    """One picture to make: `file` is its name in the folder of edited pictures."""

    file: str
    reference: Path
    instruction: str
    seed: int


def make(jobs: Sequence[Job], edit: Edit, folder: Path, told: Told, longest: int = 0) -> None:
    """Edit what is not there yet and write each picture whole or not at all, so that a stopped run goes on.

    References whose longer side exceeds `longest` pixels are scaled down to it first; 0 leaves them.

    A job whose reference cannot be opened is passed over: its scores will be missing for that reason.
    """
    left = [job for job in jobs if not (folder / job.file).is_file()]
    done = len(jobs) - len(left)
    while left:
        part = [job for job in left[:CHUNK] if job.seed == left[0].seed]
        left = left[len(part) :]
        opened = []
        for job in part:
            try:
                picture = read_photo(job.reference)
            except BadImage:
                continue
            if longest:
                picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            opened.append((job, picture))
        if opened:
            pictures = edit([p for _, p in opened], [job.instruction for job, _ in opened], opened[0][0].seed)
            for (job, _), picture in zip(opened, pictures, strict=True):
                save(picture, folder / job.file)
        done += len(part)
        told(done, len(jobs))


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it."""
    aside = path.with_name(f".{path.name}.tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(aside, "PNG")
        os.replace(aside, path)


def opener(path: Path, what: str) -> ImageOpener:
    """A function that opens a picture, once; it raises `MissingScore` if that cannot be done."""

    @cache
    def opened() -> Image.Image:
        try:
            return read_photo(path)
        except BadImage as error:
            raise MissingScore(f"no {what} {path.name}: {error}") from None

    return opened


def table(summary: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """The headlines: value with 95 % interval, n, coverage, direction."""
    shown = Table(title=title)
    shown.add_column("measure", overflow="fold")
    for name in ("value", "95 % interval", "n", "coverage"):
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("better", overflow="fold")
    for name, entry in summary.items():
        if name.endswith("/micro"):
            continue
        value = "-" if entry["value"] is None else f"{entry['value']:.4f}"
        ci = entry.get("ci95")
        words = f"[{ci[0]:.4f}, {ci[1]:.4f}]" if ci else "-"
        better = "" if "/" in name else "lower" if lower_is_better(name) else "higher"
        shown.add_row(name, value, words.replace("[", r"\["), str(entry["n"]), f"{entry['coverage']:.1%}", better)
    shown.caption = "means over tasks of each task's mean; - where too many are missing or it is undefined for all"
    return shown
