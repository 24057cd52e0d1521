"""A benchmark of your photos and instructions, in the format of the training data (`data/imagefolder.py`).

Two optional columns, named as in the library `datasets`: `mask_file_name`, a mask that is white where the edit belongs,
and `edited_file_name`, the target image. Captions are used where they are given. There is no judge: the scores measure
how similar the edited picture is to the reference, and with a target or captions how similar to the wanted result. The
task is the edit type.

For each metric against the wanted result, `copy/NAME` is the score of the unchanged reference. Many such metrics give
an editor that changes nothing a high score.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from npedit.benchmarks._outputs import EditJob, ProgressCallback, find_picture_any_format, make_opener
from npedit.data._formats import read_metadata
from npedit.data._held_out import read_held_out_ids
from npedit.data._metadata import find_metadata, parse_row, resolve_photo_path
from npedit.data._photos import BadImage
from npedit.errors import UserError, did_you_mean
from npedit.runs.checkpoint import is_run, read_config, read_held_out
from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from npedit.scoring.lpips import Lpips
from npedit.scoring.metrics import (
    TARGET,
    feature_metrics,
    metrics_outside_mask,
    perceptual_metrics,
    pixel_metrics,
    text_metrics,
)  # fmt: skip
from npedit.scoring.results import Metrics, Row, UndefinedMetric
from npedit.scoring.statistics import mean_over_tasks
from npedit.scoring.tables import TextTable

MASK, WANTED = "mask_file_name", "edited_file_name"
LONGEST_NAME = 200  # maximum number of characters in a file name
NO_TASK = "all"  # task of rows without an edit type


@dataclass(frozen=True)
class Item:
    """One line of the metadata. A mask or target that is not given is None; a caption that is not given is ""."""

    id: str
    task: str
    instruction: str
    reference: Path
    mask: Path | None
    target: Path | None
    source_caption: str
    target_caption: str

    @property
    def file(self) -> str:
        """The file name of the edited picture."""
        return f"{quote(self.id, safe=' ')}.png"


def read_items(folder: str) -> tuple[list[Item], str]:
    """The items of a data folder, and a hash of its metadata.

    Raises:
        UserError: with file and line, for rows that training would refuse too, and for an id that is not unique or is
            too long.
    """
    root, files = find_metadata(folder)
    items: list[Item] = []
    ids: set[str] = set()
    for metadata in files:
        for line, value in read_metadata(metadata):
            item = _read_item(value, line, metadata, root)
            if item.id in ids or len(item.file) > LONGEST_NAME:
                raise UserError(f"{metadata}:{line}: expected short ids, each once; got {item.id!r}; change it")
            ids.add(item.id)
            items.append(item)
    if not items:
        raise UserError(f"expected at least one row; got an empty {files[0]}; write one line of JSON an image")
    return items, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def select_held_out(items: Sequence[Item], folder: str, held_out: str) -> list[Item]:
    """The held-out items of a data folder. `held_out` is a text file of ids, as for `data.held_out`, or the folder of a
    run that was trained on this data folder and held out rows.

    Raises:
        UserError: neither, ids that no item has, or a run without held-out rows or on other data.
    """
    root = find_metadata(folder)[0]
    if is_run(held_out):
        return [items[number] for number in _held_out_numbers(Path(held_out), root, len(items))]
    ids = read_held_out_ids(held_out, root, "--held-out")
    by_id = {item.id: item for item in items}
    if unknown := [i for i in ids if i not in by_id]:
        raise UserError(
            f"--held-out: expected ids of rows; got {unknown[0]!r} ({len(unknown)} of {len(ids)} ids are unknown). "
            f"Correct the file.{did_you_mean(unknown[0], list(by_id))}"
        )
    return [by_id[i] for i in ids]


def _held_out_numbers(run: Path, root: Path, count: int) -> list[int]:
    """The numbers of the rows that a run on the data folder `root`, which has `count` rows, held out."""
    data, numbers = read_config(run).get("data") or {}, read_held_out(run) or []
    path = data.get("path")
    if not path or not Path(path).expanduser().exists() or find_metadata(path)[0].resolve() != root.resolve():
        raise UserError(
            f"--held-out: expected a run on {root}; {run} is on {path}; name its data folder, or a file of ids"
        )
    if not numbers or data.get("share", 1) != 1 or max(numbers) >= count:
        raise UserError(
            f"--held-out: expected a run with held-out rows, with all rows of {root} (data.share of 1); {run} is none; "
            "name a file with one row id a line"
        )
    return numbers


def _read_item(value: dict[str, Any], line: int, metadata: Path, root: Path) -> Item:
    row = parse_row(value, line, metadata, {}, root)
    try:
        reference = row.photo_path()
        mask, target = (_resolve_optional_path(metadata.parent, value.get(column), column) for column in (MASK, WANTED))
    except (BadImage, TypeError) as error:
        raise UserError(f"{row.location}: {error}; correct the name") from None
    task = row.edit_type if value.get("edit_type") else NO_TASK
    return Item(row.id, task, row.instruction, reference, mask, target, row.source_caption, row.target_caption)


def _resolve_optional_path(folder: Path, name: object, column: str) -> Path | None:
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise TypeError(f"expected a file's name in {column!r}; got {name!r}")
    return resolve_photo_path(folder, name)


def edit_jobs(items: Sequence[Item], seed: int) -> list[EditJob]:
    """The pictures to make, all from the noise of one seed."""
    return [EditJob(item.file, item.reference, item.instruction, seed) for item in items]


def score_pictures(
    items: Sequence[Item],
    edited: Path,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    on_progress: ProgressCallback,
    lpips: Lpips | None = None,
) -> list[Row]:
    """The scores of the pictures in the folder `edited`. Metrics that need masks, targets or captions are left out if
    no item has any, and LPIPS if `lpips` is None."""
    columns = _AvailableColumns(
        any(item.mask for item in items),
        any(item.target for item in items),
        any(item.target_caption for item in items),
    )
    rows = []
    for item in items:
        rows.append(Row.from_metrics(item.id, item.task, _metrics_of_item(item, edited, dino, clip, lpips, columns)))
        on_progress(len(rows), len(items))
    return rows


@dataclass(frozen=True)
class _AvailableColumns:
    masks: bool
    targets: bool
    captions: bool


def _metrics_of_item(
    item: Item,
    folder: Path,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    lpips: Lpips | None,
    columns: _AvailableColumns,
) -> Metrics:
    reference, edited = (
        make_opener(item.reference, "reference"),
        make_opener(find_picture_any_format(folder / item.file), "edited picture"),
    )
    found = dict(pixel_metrics(reference, edited)) | dict(feature_metrics(reference, edited, dino, clip))
    if lpips:
        found |= perceptual_metrics(reference, edited, lpips)
    if columns.masks:
        found |= metrics_outside_mask(reference, edited, _open_optional(item.mask, "mask"), dino, clip, lpips)
    wanted: dict[str, Callable[[], float]] = {}
    copy: dict[str, Callable[[], float]] = {}
    if columns.targets:
        target = _open_optional(item.target, "target")
        for out, picture in ((wanted, edited), (copy, reference)):
            out |= pixel_metrics(target, picture, TARGET)
            out |= feature_metrics(target, picture, dino, clip, TARGET)
            out |= perceptual_metrics(target, picture, lpips, TARGET) if lpips else {}
    if columns.captions:
        words = (item.source_caption, item.target_caption, clip)
        wanted |= text_metrics(reference, edited, *words)
        copy |= {k: v for k, v in text_metrics(reference, reference, *words).items() if k.startswith("clip_t")}
    return found | wanted | {f"copy/{name}": compute for name, compute in copy.items()}


def _open_optional(path: Path | None, what: str) -> Callable[[], Image.Image]:
    def raise_undefined() -> Image.Image:
        raise UndefinedMetric(f"no {what} is given")

    return make_opener(path, what) if path else raise_undefined


def task_table(rows: Sequence[Row]) -> TextTable:
    """A table with one line for each task: the means of the main metrics. If some items have no score, the number of
    scored items follows in brackets."""
    main_metrics = ("l1", "psnr", "ssim", "lpips", "dino", "clip_i", "changed_area", "copied")
    names = [
        n for n in dict.fromkeys(k for row in rows for k in row.scores) if n.startswith(main_metrics) and "/" not in n
    ]
    names = [n for n in names if not n.endswith(("_outside", TARGET))]
    table = TextTable("By task", ("task", "n", *names), left=("task",))
    for task, n in sorted(Counter(row.task for row in rows).items()):
        cells = []
        for name in names:
            values = [v for row in rows if row.task == task and (v := row.scores.get(name)) is not None]
            words = f"{mean_over_tasks(values, [task] * len(values)):.3f}" if values else "-"
            cells.append(words if len(values) in (0, n) else f"{words} ({len(values)})")
        table.add_row(task, n, *cells)
    return table
