"""The toy world written to disk as an ordinary imagefolder data set (`npedit toy data`)."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from npedit.errors import UserError
from npedit.toy.edits import sample_edit
from npedit.toy.language import questions_about
from npedit.toy.world import SIDE, render


def _save_picture(picture: Tensor, path: Path, side: int) -> None:
    """Save a scene (3, 32, 32), enlarged in blocks to `side` pixels."""
    pixels = (picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(path)


def write_dataset(
    folder: str | Path, count: int, seed: int, pairs: bool = False, bare: bool = False, side: int = SIDE
) -> Path:
    """Write `count` items: `images/` and `metadata.jsonl`, in the training phrasings. One seed, one data set.

    No edited image is drawn, unless `pairs`: then `edited/` and a column `edited_file_name` are added, for baselines
    that need them. With `bare` the same pictures are written without any words: the files alone, as a folder of photos
    that `npedit prepare` starts from. Pictures have `side` pixels a side. The folder appears only once it is complete.

    Raises:
        UserError: fewer than one item, a side that is no multiple of the scenes', a folder that is not empty, or one
            that cannot be written.
    """
    folder = Path(folder)
    if count < 1:
        raise UserError(f"expected at least 1 item to write; got {count}; give a larger count")
    if side < SIDE or side % SIDE:
        raise UserError(f"--side: expected a multiple of {SIDE}; got {side}; try {max(1, round(side / SIDE)) * SIDE}")
    if pairs and bare:
        raise UserError("expected --pairs or --bare; got both, and bare pictures have no edits; leave one out")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"expected a new or empty folder; got {folder}, which is not; choose another or empty it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside = folder if folder.is_dir() else folder.parent
        with tempfile.TemporaryDirectory(dir=inside, prefix=f".{folder.name}-") as aside:
            complete = Path(aside) / "data"
            if bare:
                _write_pictures(complete, count, seed, side)
            else:
                _write_items(complete, count, seed, pairs, side)
            if folder.is_dir():  # it may be the working folder of a shell, so it stays
                for path in sorted(complete.iterdir()):
                    os.replace(path, folder / path.name)
            else:
                os.replace(complete, folder)
    except OSError as error:
        raise UserError(f"expected a folder to write to; got {folder}: {error}; choose another place") from error
    return folder


def _write_pictures(folder: Path, count: int, seed: int, side: int) -> None:
    """Write the references of the items, as files of the folder itself."""
    folder.mkdir(parents=True)
    for i in range(count):
        edit = sample_edit(random.Random(f"{seed}/{i}"))
        _save_picture(render([edit.reference])[0], folder / f"{i:06d}.png", side)


def _write_items(folder: Path, count: int, seed: int, pairs: bool, side: int) -> None:
    for name in ("images", "edited") if pairs else ("images",):
        (folder / name).mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            edit = sample_edit(random.Random(f"{seed}/{i}"))
            name = f"{i:06d}.png"
            _save_picture(render([edit.reference])[0], folder / "images" / name, side)
            row: dict[str, Any] = {"file_name": f"images/{name}"}
            if pairs:
                _save_picture(render([edit.target])[0], folder / "edited" / name, side)
                row["edited_file_name"] = f"edited/{name}"
            row |= {
                "id": f"{seed}/{i}",
                "instruction": edit.instruction,
                "edit_type": edit.edit_type,
                "object": edit.object,
                "source_caption": edit.source_caption,
                "target_caption": edit.target_caption,
                "questions": questions_about(edit),
            }
            file.write(json.dumps(row) + "\n")
