"""Send what a run logs to TensorBoard, Weights & Biases or Trackio too, through their own libraries (`trainer.log`).

`metrics.jsonl` stays the record of a run. A run that resumes from a checkpoint repeats the updates after it. These
updates do not appear twice: TensorBoard hides its older events, and the other services get only the updates that were
not yet in `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from npedit.errors import UserError
from npedit.nets import distributed
from npedit.recipe.config import Recipe
from npedit.runs.checkpoint import METRICS, read_rows, write_text
from npedit.training.samples import samples_folder

TRACKING_FILE = "tracking.json"  # the name under which the services know this run
PROJECT = "npedit"


class Tracker(Protocol):
    """One service."""

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Send the values and pictures of update `step`."""

    def close(self) -> None:
        """Wait until all is sent."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, recipe: Recipe, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()  # a run that is killed resumes after its last checkpoint, and sends nothing before it again

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class Wandb:
    """Weights & Biases. Its x axis is `update`, since its own step may not repeat."""

    def __init__(self, recipe: Recipe, run: Path, first_step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            name=run.resolve().name,
            id=_tracking_id(run),
            resume="allow",
            dir=str(run),
            config=recipe.as_dict(),
        )
        self.run.define_metric("*", step_metric="update")

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """See `Tracker`."""
        self.run.log({"update": step, **values, **{name: self.wandb.Image(p) for name, p in pictures.items()}})

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


class Trackio:
    """Trackio, on this machine or in a Space, as its own environment variables say."""

    def __init__(self, recipe: Recipe, run: Path, first_step: int) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project=PROJECT, name=_tracking_id(run), resume="allow", config=recipe.as_dict())

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """See `Tracker`."""
        self.trackio.log({**values, **{name: self.trackio.Image(p) for name, p in pictures.items()}}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.trackio.finish()


KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class Trackers:
    """The services of a recipe. Each is opened at the first row, whose update says where the run resumes."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.recipe, self.run = recipe, run
        self.names = recipe.trainer.log if distributed.is_main_process() else ()
        self.opened: dict[str, Tracker] = {}
        rows = read_rows(run / METRICS) if (run / TRACKING_FILE).is_file() else []
        self.last_sent_step = max((int(row["step"]) for row in rows), default=-1)

    def log(self, row: Mapping[str, Any], is_late: bool = False) -> None:
        """Send a row of metrics, with the samples of its update if there are any. A late row adds to a row of the same
        update that was sent before."""
        step = int(row["step"])
        for name in self.names:
            if name not in self.opened:
                self.opened[name] = KINDS[name](self.recipe, self.run, step if not is_late else step + 1)
            if name == "tensorboard" or is_late or step > self.last_sent_step:
                self.opened[name].log(step, _numeric_metrics(row), self._samples(step))

    def _samples(self, step: int) -> dict[str, Image.Image]:
        """Reference and edited image of each sample, side by side at full size."""
        folder = samples_folder(self.run, step)
        if not (folder / "items.json").is_file():
            return {}
        items = json.loads((folder / "items.json").read_text())
        return {f"samples/{i}": _side_by_side(folder, item) for i, item in enumerate(items)}

    def close(self) -> None:
        """Wait until all is sent."""
        for tracker in self.opened.values():
            tracker.close()


@contextmanager
def open_trackers(recipe: Recipe, run: Path) -> Iterator[Trackers]:
    """The services of a recipe, closed at the end of the block.

    Raises:
        UserError: the library of one is not installed.
    """
    for name in recipe.trainer.log:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trainer.log: expected the package {name}, which is not installed here; install it with "
                f"pip install 'npedit[{name}]', or leave {name} out"
            )
    trackers = Trackers(recipe, run)
    try:
        yield trackers
    finally:
        trackers.close()


def _tracking_id(run: Path) -> str:
    """The name under which the services know this run; the same after a resume and in a moved folder."""
    path = run / TRACKING_FILE
    if not path.is_file():
        write_text(path, json.dumps({"id": f"{run.resolve().name}-{uuid.uuid4().hex[:8]}"}) + "\n")
    return str(json.loads(path.read_text())["id"])


def _numeric_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    skipped = ("step", "time")
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k not in skipped}


def _side_by_side(folder: Path, item: Mapping[str, str]) -> Image.Image:
    with Image.open(folder / item["reference"]) as before, Image.open(folder / item["file"]) as after:
        sheet = Image.new("RGB", (before.width + after.width, max(before.height, after.height)), "white")
        sheet.paste(before, (0, 0))
        sheet.paste(after, (before.width, 0))
    return sheet
