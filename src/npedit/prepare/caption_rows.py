"""Captions for rows that have a photo and an instruction already: the row-wise function of `npedit caption`.

Of a row without a source caption, the model is asked what is in the photo (`passes.look`). Of a row without a target
caption, or a removal or a scene without an object, it is asked to complete the row; the result is checked and verified
as the edits that `npedit prepare` writes. What a row has is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.data._photos import BadImage
from npedit.prepare.answers import caption_schema, parse_caption
from npedit.prepare.asking import Unanswered
from npedit.prepare.passes import Passes, find_caption_fault, load_picture, look, verify
from npedit.prepare.writer import Request
from npedit.questions import OBJECT_OF

Row = dict[str, Any]
FILLED = ("object", "source_caption", "target_caption", "questions")  # the columns that may be filled


class Rejected(Exception):
    """A row that cannot be completed. `step` is the pass, and the message is the reason."""

    def __init__(self, step: str, reason: str):
        super().__init__(reason)
        self.step = step


def caption_photo(photo: Mapping[str, Any], rows: Sequence[Row], passes: Passes) -> dict[str, list[Row]]:
    """{"rows": [...], "rejected": [...]} of the rows of one photo, completed or with `pass` and `reason`. A row has at
    least `instruction`, `edit_type` and the columns `FILLED`, "" or [] where it has none.

    Raises:
        CostCeiling, JudgeUnavailable: no further request is possible.
    """
    made: dict[str, list[Row]] = {"rows": [], "rejected": []}
    try:
        image = load_picture(Path(photo["path"]), passes.side, passes.max_pixels)
    except BadImage as error:
        reason = f"the photo cannot be read: {error}"
        return made | {"rejected": [{**row, "pass": "look", "reason": reason} for row in rows]}
    for row in rows:
        try:
            made["rows"].append(complete_row(photo, image, row, passes))
        except Rejected as error:
            made["rejected"].append({**row, "pass": error.step, "reason": str(error)})
    return made


def is_complete(row: Mapping[str, Any]) -> bool:
    """Whether a row has all that training can need of it."""
    return bool(row["source_caption"]) and not is_target_missing(row)


def is_target_missing(row: Mapping[str, Any]) -> bool:
    """Whether a row has no target caption, or does not name the object that the questions of its edit type name."""
    return not row["target_caption"] or (row["edit_type"] in OBJECT_OF and not row["object"])


def complete_row(photo: Mapping[str, Any], image: Image.Image, row: Row, passes: Passes) -> Row:
    """The row with the columns `FILLED`.

    Raises:
        Rejected: the model gives no usable answer, the edit is not possible, or the completed row is wrong.
        CostCeiling, JudgeUnavailable: no further request is possible.
    """
    if not row["source_caption"]:
        try:
            row = {**row, "source_caption": look(photo, image, passes)["caption"]}
        except Unanswered as error:
            raise Rejected("look", str(error)) from None
    if not is_target_missing(row):
        return row
    row = _fill_missing(row, _ask(image, row, passes))
    if reason := find_caption_fault(row, row["edit_type"]):
        raise Rejected("caption", reason)
    if reason := verify(photo, image, {**row, "asked_type": row["edit_type"]}, passes):
        raise Rejected("verify", reason)
    return row


def _ask(image: Image.Image, row: Mapping[str, Any], passes: Passes) -> Row:
    """What the model makes of a row: the columns to fill."""
    prompt = passes.prompts.caption
    texts = {name: row[name] for name in ("edit_type", "instruction", "object", "source_caption")}
    request = Request(
        "caption", prompt.system, prompt.fill(**texts), caption_schema(), image, prompt.temperature,
        prompt.max_tokens, passes.seed,
    )  # fmt: skip
    try:
        found = passes.writer.ask(request, parse_caption)
    except Unanswered as error:
        raise Rejected("caption", str(error)) from None
    if not found.pop("edit_possible"):
        raise Rejected("caption", "edit not possible")
    return found


def _fill_missing(row: Row, found: Mapping[str, Any]) -> Row:
    """A row with what was found for the columns that it does not have. Questions come with a target caption."""
    return {**row, **{name: value for name, value in found.items() if not row[name]}}
