"""Edited pictures on disk, made by npedit or by another editor, and a table of their scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from npedit.data._photos import BadImage, decoding, open_image, read_photo
from npedit.errors import explain_write_errors
from npedit.generator import NOISE_VERSION
from npedit.judges.cache import answer_cache_key, hash_json
from npedit.judges.local import hash_folder
from npedit.recipe.config import EMBEDDED
from npedit.runs.editor_facts import EditorFacts
from npedit.runs.editor_weights import read_recipe
from npedit.runs.resolve import resolve_editor
from npedit.scoring.metrics import ImageOpener
from npedit.scoring.results import MissingScore, lower_is_better
from npedit.scoring.tables import TextTable, format_interval

EDITED = "edited"  # the folder of edited pictures in a folder of results
CHUNK = 16
CACHE_KEY_FIELD = "npedit:key"  # field of a PNG's text: a hash of what the picture depends on
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
Edit = Callable[[Sequence[Image.Image], Sequence[str], int], list[Image.Image]]  # pictures, instructions, seed
ProgressCallback = Callable[[int, int], None]  # done, of


@dataclass(frozen=True)
class EditJob:
    """One picture to be edited. `file` is the name in the folder of edited pictures."""

    file: str
    reference: Path
    instruction: str
    seed: int


def edit_missing_pictures(
    jobs: Sequence[EditJob],
    edit: Edit,
    folder: Path,
    on_progress: ProgressCallback,
    longest: int = 0,
    editor: Mapping[str, Any] | None = None,
) -> None:
    """Edit every picture that is missing, or that was made from another photo, instruction or `editor` (facts: weights,
    steps). Each picture is written completely or not at all, so that a stopped run can resume.

    References whose longer side exceeds `longest` pixels are scaled down to that size first; 0 means no limit.

    A job whose reference cannot be opened is skipped, and an old picture of the job is deleted. The item's scores are
    missing for that reason.
    """
    hash_photo = cache(_hash_photo)
    keys = {}
    for job in jobs:
        facts = {**(editor or {}), "seed": job.seed, "longest": longest}
        keys[job.file] = _hash_inputs(hash_photo(job.reference), job.instruction, facts)
    missing = [job for job in jobs if not has_cache_key(folder / job.file, keys[job.file])]
    done = len(jobs) - len(missing)
    while missing:
        chunk = [job for job in missing[:CHUNK] if job.seed == missing[0].seed]
        missing = missing[len(chunk) :]
        _edit_chunk(chunk, edit, folder, longest, keys)
        done += len(chunk)
        on_progress(done, len(jobs))


def _edit_chunk(chunk: Sequence[EditJob], edit: Edit, folder: Path, longest: int, keys: Mapping[str, str]) -> None:
    """Edit the pictures of jobs with one seed, and write each under its cache key."""
    jobs, references = [], []
    for job in chunk:
        try:
            reference = read_photo(job.reference)
        except BadImage:
            (folder / job.file).unlink(missing_ok=True)
            continue
        if longest:
            reference.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        jobs.append(job)
        references.append(reference)
    if not jobs:
        return
    for job, picture in zip(jobs, edit(references, [job.instruction for job in jobs], jobs[0].seed), strict=True):
        save_png(picture, folder / job.file, keys[job.file])


def edit_cache_key(source: Image.Image, instruction: str, editor: Mapping[str, Any]) -> str:
    """A hash of everything that an edited picture depends on: the source's pixels, the instruction, the editor's facts
    (weights, seed, steps), and how a seed becomes noise."""
    return _hash_inputs(answer_cache_key([source]), instruction, editor)


def hash_editor(model: str | Path) -> str:
    """A hash of the names and contents of an editor's files, and of its base model's where that is a local folder.
    `model` is what `resolve_editor` takes.

    Raises:
        UserError: there is no editor, or what it says about itself is damaged.
    """
    source = resolve_editor(model)
    recipe = read_recipe(source) if source.is_checkpoint else None
    facts = EditorFacts.from_recipe(recipe) if recipe else EditorFacts.read(source.folder)
    digest, base = hash_folder(source.folder), Path(facts.base)
    return hash_json([digest, hash_folder(base)]) if facts.base != EMBEDDED and base.is_dir() else digest


def _hash_inputs(source_digest: str, instruction: str, editor: Mapping[str, Any]) -> str:
    editing = {"instruction": instruction, "editor": dict(editor), "noise": NOISE_VERSION}
    return hash_json({"source": source_digest, **editing})


def _hash_photo(path: Path) -> str:
    """A hash of a photo's pixels; "" if the photo cannot be read."""
    try:
        return answer_cache_key([read_photo(path)])
    except BadImage:
        return ""


def has_cache_key(path: Path, key: str) -> bool:
    """Whether `path` is a readable picture that was saved with this key."""
    try:
        with decoding(), open_image(path) as picture:
            return picture.info.get(CACHE_KEY_FIELD) == key
    except BadImage:
        return False


def find_picture_any_format(path: Path) -> Path:
    """`path` if the file exists. Otherwise the one file in the same folder with the same name and another extension
    (.jpg, .webp, ...); `path` if there is none or more than one."""
    if path.is_file() or not path.parent.is_dir():
        return path
    names = (path.with_name(path.stem + ending) for kind in IMAGE_EXTENSIONS for ending in (kind, kind.upper()))
    found = [name for name in names if name.is_file()]
    return found[0] if len(found) == 1 else path


def save_png(picture: Image.Image, path: Path, key: str = "") -> None:
    """Write a PNG completely or not at all. `key` is stored in the metadata, see `has_cache_key`."""
    facts = PngInfo()
    if key:
        facts.add_text(CACHE_KEY_FIELD, key)
    aside = path.with_name(f".{path.name}.tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(aside, "PNG", pnginfo=facts)
        os.replace(aside, path)


def make_opener(path: Path, what: str) -> ImageOpener:
    """A function that opens the picture once. The function raises `MissingScore` if the picture cannot be opened.
    `what` names the picture in the message."""

    @cache
    def open_once() -> Image.Image:
        try:
            return read_photo(path)
        except BadImage as error:
            raise MissingScore(f"no {what} {path.name}: {error}") from None

    return open_once


def results_table(summary: Mapping[str, Mapping[str, Any]], title: str) -> TextTable:
    """A table of the headlines: value with 95 % interval, n, coverage, which direction is better."""
    head = ("metric", "value", "95 % interval", "n", "coverage", "better")
    caption = "mean of the tasks' means; -: too many scores are missing, or the score is undefined for all items"
    table = TextTable(title, head, left=("metric", "better"), caption=caption)
    for name, entry in summary.items():
        if name.endswith("/micro"):
            continue
        value = "-" if entry["value"] is None else f"{entry['value']:.4f}"
        better = "" if "/" in name else "lower" if lower_is_better(name) else "higher"
        interval = format_interval(entry.get("ci95"))
        table.add_row(name, value, interval, entry["n"], f"{entry['coverage']:.1%}", better)
    return table
