"""Find the editor that a string names. `edit`, `evaluate`, `export` and a recipe's `start:` all use `resolve_editor`.

    embedded           the editor that ships in the package
    RUN                RUN/final; where there is none yet, the latest complete checkpoint
    RUN/final          or any other folder with npedit.json, such as one that `npedit export` wrote
    RUN/checkpoint-N   a checkpoint, of a finished, stopped or running training

A checkpoint is used with its EMA weights, as `final/` is. A new kind of source (a Hub id, a diffusers LoRA) needs one
more branch in `resolve_editor` and in the code that opens an `EditorSource`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from npedit.errors import UserError
from npedit.recipe import config
from npedit.runs.editor_facts import FACTS_FILE

CONFIG, COMPLETE = "config.resolved.yaml", "COMPLETE"  # of a run; of a checkpoint in it
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class EditorSource:
    """A folder that an editor can be opened from.

    `folder` is a checkpoint, or holds npedit.json. `run` is the run's folder, None for an editor without one.
    """

    folder: Path
    run: Path | None
    is_checkpoint: bool = False

    @property
    def update(self) -> int | None:
        """The update after which a checkpoint was written; None for another editor."""
        return int(self.folder.name.removeprefix("checkpoint-")) if self.is_checkpoint else None

    def __str__(self) -> str:
        if self.is_checkpoint:
            return f"{self.folder} (EMA weights after update {self.update})"
        return str(self.folder)


def resolve_editor(name: str | Path) -> EditorSource:
    """The editor that `name` names; see the head of this file.

    Raises:
        UserError: there is none. The message says what was found, and which checkpoints there are.
    """
    if str(name) == "embedded":
        return EditorSource(config.embedded_weights("editor"), None)
    folder = Path(name)
    if match := CHECKPOINT_NAME.fullmatch(folder.name):
        return _resolve_checkpoint(folder, int(match[1]))
    if not os.path.isdir(folder):  # unlike Path.is_dir, it does not fail on a name that is too long
        raise UserError(
            f"expected a run or an editor's folder; {folder} is not a folder. Give a run, or 'embedded'. Of an "
            "editor on the Hub give the folder of: hf download USER/NAME --local-dir FOLDER"
        )
    for candidate, run in ((folder, folder.parent), (folder / "final", folder)):
        if (candidate / FACTS_FILE).is_file():
            return EditorSource(candidate, run if (run / CONFIG).is_file() else None)
    if not (folder / CONFIG).is_file():
        raise UserError(f"expected a run or an editor's folder; {folder} has no {FACTS_FILE} and no final/.")
    latest = latest_complete_checkpoint(folder)
    if latest is None:
        raise UserError(
            f"the run {folder} has no editor yet: neither final/ nor a complete checkpoint. "
            "Continue the training with 'npedit train'."
        )
    return EditorSource(latest, folder, is_checkpoint=True)


def _resolve_checkpoint(folder: Path, number: int) -> EditorSource:
    run = folder.parent
    there = {int(path.name[11:]): path for path in complete_checkpoints(run)}
    if number not in there:
        known = ", ".join(f"checkpoint-{n}" for n in there) or "none"
        raise UserError(f"expected a complete checkpoint; {folder} is none. Complete ones in {run}: {known}.")
    if not (run / CONFIG).is_file():
        raise UserError(f"expected {CONFIG} beside {folder}; there is none. Keep a checkpoint in its run's folder.")
    return EditorSource(there[number], run, is_checkpoint=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name[11:].isdecimal() and (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def latest_complete_checkpoint(run: Path) -> Path | None:
    """The checkpoint to resume from; None if there is none yet."""
    found = complete_checkpoints(run)
    return found[-1] if found else None
