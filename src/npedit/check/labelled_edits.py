"""Edits whose right answers are given: by the user in a folder, or by the toy world's oracle.

A folder of labelled edits has the pictures and `metadata.jsonl` (or .csv or .parquet), one JSON object a line:

    {"file_name": "1.jpg", "edited_file_name": "1-edited.jpg", "instruction": "...", "edit_type": "recolour",
     "object": "car", "applied": true, "preserved": false}

`applied` says whether the edit was carried out, `preserved` whether all else is unchanged. One of them may be missing.
`questions` may be given as in training data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npedit.check.known_edits import KnownEdit
from npedit.data import Example
from npedit.data._formats import read_metadata
from npedit.data._metadata import METADATA, METADATA_FILES, parse_questions, resolve_photo_path
from npedit.data._photos import BadImage, crop_to_fill, read_photo
from npedit.errors import UserError
from npedit.questions import OBJECT_OF, normalise_edit_type
from npedit.toy.edits import EDIT_TYPES, Edit
from npedit.toy.language import questions_about
from npedit.toy.scene_edits import SceneEdit, sample_item
from npedit.toy.world import Scene, render
from npedit.toy_models.critic import questions_about_edit
from npedit.toy_models.mistakes import sample_outcome, sample_scene_outcome
from npedit.toy_models.scene_critic import true_answers

PROBE = "labelled"
LABELS = {"true": True, "false": False}  # in a csv file


def read_labelled_edits(folder: Path, size: tuple[int, int]) -> list[KnownEdit]:
    """The edits of a folder, both pictures cropped and scaled to `size` = (H, W).

    Raises:
        UserError: names the file and the line of what is missing or wrong.
    """
    metadata = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if metadata is None:
        raise UserError(
            f"--labelled: expected a folder with {METADATA}; got {folder}; see docs/check.md for its columns"
        )
    found = [_labelled_edit(row, f"{metadata}:{line}", folder, size) for line, row in read_metadata(metadata)]
    if not found:
        raise UserError(f"--labelled: expected at least one edit; got an empty {metadata}; add lines")
    return found


def _labelled_edit(row: dict, where: str, folder: Path, size: tuple[int, int]) -> KnownEdit:
    for key in ("file_name", "edited_file_name", "instruction"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: expected text in {key!r}; got {row.get(key)!r}; fill it in")
    labels = [_read_label(row.get(key)) for key in ("applied", "preserved")]
    if any(not isinstance(label, bool | None) for label in labels) or labels == [None, None]:
        raise UserError(
            f"{where}: expected true or false in 'applied' or 'preserved'; got {labels[0]!r} and {labels[1]!r}; "
            "write at least one of them"
        )
    try:
        kind = normalise_edit_type(str(row.get("edit_type") or ""))
        before, after = (_load(folder, row[key], size) for key in ("file_name", "edited_file_name"))
    except (ValueError, BadImage) as error:
        raise UserError(f"{where}: {error}") from None
    thing = str(row.get("object") or "")
    if kind in OBJECT_OF and not thing:
        raise UserError(f"{where}: expected an 'object' for edit type {kind!r}; got none; name {OBJECT_OF[kind]}")
    rubric = parse_questions(row, "questions", where)
    example = Example(str(row.get("id", where)), before, row["instruction"], kind, thing, "", "", questions=rubric)
    applied, preserved = labels
    return KnownEdit(PROBE, example, after, applied, preserved, returned=False if applied else None)


def _read_label(value: Any) -> Any:
    """True or false in words, as a csv file has them, as a boolean; any other value as it is."""
    return LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _load(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    pixels = np.array(crop_to_fill(read_photo(resolve_photo_path(folder, name)), size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def toy_labelled_edits(count: int, seed: int, edit_types: Sequence[str] = EDIT_TYPES) -> list[KnownEdit]:
    """`count` right and wrong edits of toy scenes, in the training phrasings, with the oracle's answers."""
    rng = random.Random(f"check/{seed}")
    edits = [sample_item(rng, edit_types[i % len(edit_types)]) for i in range(count)]
    outcomes = [sample_scene_outcome(e, rng) if isinstance(e, SceneEdit) else sample_outcome(e, rng) for e in edits]
    pictures = render([e.reference for e in edits] + outcomes)
    return [
        _toy_known_edit(f"toy/{i}", edit, outcome, pictures[i], pictures[count + i])
        for i, (edit, outcome) in enumerate(zip(edits, outcomes, strict=True))
    ]


def _toy_known_edit(name: str, edit: Edit, outcome: Scene, reference: Tensor, edited: Tensor) -> KnownEdit:
    texts = (edit.instruction, edit.edit_type, edit.object, edit.source_caption, edit.target_caption)
    if isinstance(edit, SceneEdit):
        example = Example(name, reference, *texts)
        answers = true_answers(edit, outcome)
        return KnownEdit(PROBE, example, edited, answers["scene"], answers["subject"], answers["returned"])
    truth = [bool(answer) for _, _, answer in questions_about_edit(edit, outcome)]
    applied = truth[0] != (edit.edit_type == "remove")  # of a removal it is asked whether the object is there
    example = Example(name, reference, *texts, questions=json.dumps(questions_about(edit)))
    return KnownEdit(PROBE, example, edited, applied, truth[1])
