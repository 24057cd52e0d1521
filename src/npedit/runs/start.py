"""Find what a recipe's `start:` names: an editor of npedit, or a LoRA or a transformer of diffusers.

    FILE.safetensors          a LoRA file
    FOLDER                    an editor (see `resolve.py`); else a folder with a LoRA file, or with a transformer: its
                              own folder, or a pipeline's
    USER/NAME                 the same on the Hugging Face Hub
    USER/NAME/FILE.safetensors    a LoRA file there

A Hub id counts where there is no such path on this computer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from npedit.errors import UserError
from npedit.hub_access import CLIENT_ERROR, hub_error_text, is_local_only
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe.config import EMBEDDED
from npedit.runs.editor_facts import FACTS_FILE
from npedit.runs.files import read_json_object
from npedit.runs.resolve import CHECKPOINT_NAME, CONFIG, EditorSource, resolve_editor

HUB_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<file>.+\.safetensors))?")
MODEL_CONFIG = "config.json"
FORMS = "a run, an editor's folder, or a LoRA (.safetensors) or transformer of diffusers: file, folder or Hub id"


@dataclass(frozen=True)
class DiffusersStart:
    """A LoRA file (`path` is the file), or a transformer (`path` is the folder with its config.json)."""

    path: Path
    is_lora: bool

    def __str__(self) -> str:
        return f"the {'LoRA' if self.is_lora else 'transformer'} {self.path}"


def is_foreign(name: str) -> bool:
    """Whether `start: name` names something that npedit did not train, as far as paths on this computer tell: nobody
    knows then whether it was trained with edited images."""
    path = Path(name)
    if name == EMBEDDED or CHECKPOINT_NAME.fullmatch(path.name):
        return False
    if os.path.isdir(path):
        return not any((path / mark).exists() for mark in (FACTS_FILE, f"final/{FACTS_FILE}", CONFIG))
    return os.path.isfile(path) or HUB_NAME.fullmatch(name) is not None


def resolve_start(name: str) -> EditorSource | DiffusersStart:
    """What `start: name` names; see the head of this file. Files of the Hub are downloaded.

    Raises:
        UserError: there is nothing that training can start from.
    """
    if not is_foreign(name):
        return resolve_editor(name)
    path = Path(name)
    if not path.exists():
        return _download(name)
    found = _find_in(path)
    if found is None:
        raise UserError(f"start: expected {FORMS}; got {name}, which holds none; correct the recipe")
    return found


def _find_in(path: Path) -> DiffusersStart | None:
    """The LoRA file or the transformer at a path on this computer."""
    if path.is_file():
        return DiffusersStart(path, True) if path.suffix == ".safetensors" else None
    if (path / LORA_FILE).is_file():
        return DiffusersStart(path / LORA_FILE, True)
    for folder in (path / "transformer", path):
        if (folder / MODEL_CONFIG).is_file():
            return DiffusersStart(folder, False)
    files = list(path.glob("*.safetensors"))
    return DiffusersStart(files[0], True) if len(files) == 1 else None


def _download(name: str) -> DiffusersStart:
    match = HUB_NAME.fullmatch(name)
    assert match is not None  # `is_foreign` has looked
    try:
        found = _download_from(match["id"], match["file"])
    except (CLIENT_ERROR, OSError, ValueError) as error:
        raise UserError(
            f"start: expected {FORMS}; there is no {name} on this computer, and as a Hub id it does not load: "
            f"{hub_error_text(error)}; correct the recipe"
        ) from None
    if found is None:
        raise UserError(
            f"start: expected {LORA_FILE} or a transformer in {name} on the Hub; got neither; name the file: "
            f"{name}/FILE.safetensors"
        )
    return found


def _download_from(repository: str, file: str | None) -> DiffusersStart | None:
    """The named file of a repository, else its LoRA file of the usual name, else its transformer."""
    local = is_local_only(repository)
    try:
        return DiffusersStart(Path(hf_hub_download(repository, file or LORA_FILE, local_files_only=local)), True)
    except EntryNotFoundError:
        if file:
            raise
    patterns = ["transformer/*", MODEL_CONFIG, "diffusion_pytorch_*"]
    return _find_in(Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local)))


def transformer_class(start: DiffusersStart) -> str:
    """The class that a transformer's config.json names, "" if it names none.

    Raises:
        ValueError: the file is damaged.
    """
    return str(read_json_object(start.path / MODEL_CONFIG).get("_class_name", ""))
