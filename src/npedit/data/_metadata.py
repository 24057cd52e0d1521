"""The metadata of a data folder: find the files, read and check their rows."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from npedit.data._photos import BadImage
from npedit.errors import UserError, did_you_mean
from npedit.questions import IDENTITY_EDIT, normalise_edit_type

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
OTHER_METADATA = ("metadata.csv", "metadata.parquet")
HELD_OUT_FOLDERS = frozenset(("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"))
FieldName = Literal["file_name", "instruction", "edit_type", "object", "source_caption", "target_caption", "id"]
FIELDS: tuple[FieldName, ...] = get_args(FieldName)
_FILE = r"(_?(image|img|picture|photo|file|path|url)(_?(file_?names?|path|url))?|_?file_?names?)?s?"
EDITED_COLUMN = re.compile(rf"(edited|edit|target|output|result|after|modified|generated|ground_truth|gt){_FILE}", re.I)
REFERENCE_COLUMN = re.compile(rf"(source|src|input|reference|ref|original|before|image|img|photo|picture){_FILE}", re.I)
NOT_IMAGE_COLUMNS = {"edit", "edits"}  # in some data sets the names of instruction columns


@dataclass(frozen=True)
class Row:
    """One line of the metadata. Captions and object are "" if the line has none."""

    file_name: str
    instruction: str
    edit_type: str
    object: str
    source_caption: str
    target_caption: str
    id: str
    line: int
    metadata: Path
    subfolder: str  # the folder of `metadata` relative to the data folder, "." if both are the same

    @property
    def location(self) -> str:
        """The file and line of the row, for messages."""
        return f"{self.metadata}:{self.line}"

    @property
    def photo(self) -> str:
        """The photo's name, relative to the data folder."""
        return self.file_name if self.subfolder == "." else f"{self.subfolder}/{self.file_name}"

    def photo_path(self) -> Path:
        """The path of the photo. Errors as in `resolve_photo_path`."""
        return resolve_photo_path(self.metadata.parent, self.file_name)


def find_metadata(path: str) -> tuple[Path, list[Path]]:
    """(the folder of the training data, every metadata.jsonl in it and below it). The folder is the one at `path`, or
    its sub-folder `train` where only that holds a metadata.jsonl. File names in a metadata.jsonl are relative to the
    folder that it lies in, as in `datasets`.

    Raises:
        UserError: there is no metadata.jsonl; or there is metadata that `datasets` would read and this package does not
            (metadata.csv or metadata.parquet, metadata in a zip archive); or metadata of held-out data.
    """
    folder = Path(path).expanduser()
    wanted = f"expected a folder with images and metadata.jsonl; got {path!r}"
    if not path or not folder.exists():
        raise UserError(f"{wanted}, which does not exist; set data.path to your photos")
    if not folder.is_dir():
        raise UserError(f"{wanted}, which is a file; set data.path to the folder that holds it")
    if not any(folder.iterdir()):
        raise UserError(f"{wanted}, which is empty; put your photos and a metadata.jsonl there")
    if not (folder / METADATA).is_file() and (folder / "train" / METADATA).is_file():
        folder = folder / "train"
    found = sorted(_metadata_below(folder), key=lambda file: (len(file.parts), file))
    if not found:
        raise UserError(f"{wanted}, where there is no metadata.jsonl; write one, a line of JSON an image")
    return folder, found


def _metadata_below(folder: Path) -> Iterator[Path]:
    """The metadata.jsonl in a folder and its sub-folders, hidden ones left out. Errors as in `find_metadata`."""
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith((".", "__"))]
        for name in files:
            file = Path(place, name)
            if name in OTHER_METADATA or (name.lower().endswith(".zip") and _contains_metadata(file)):
                raise UserError(
                    f"expected metadata in {METADATA} files alone; got {file}, which would not be read; "
                    f"write its rows into a {METADATA}, or move it out of {folder}"
                )
            if name == METADATA:
                held_out = HELD_OUT_FOLDERS.intersection(part.lower() for part in file.parent.relative_to(folder).parts)
                if held_out:
                    raise UserError(
                        f"expected one set of data below {folder}; got {file}, which by its folder's name is held-out "
                        f"data ({', '.join(held_out)}); move it out, or put the training data into {folder / 'train'}"
                    )
                yield file


def _contains_metadata(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as file:
            return any(PurePosixPath(name).name in (METADATA, *OTHER_METADATA) for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # `datasets` could not read it either


def read_json_lines(metadata: Path) -> Iterator[tuple[int, dict]]:
    """(line number, JSON object) of each line that is not blank."""
    try:
        with metadata.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                value = json.loads(raw.decode("utf-8-sig"))
                if not isinstance(value, dict):
                    raise UserError(f"{metadata}:{line}: expected a JSON object; got {raw[:40]!r}; write one a line")
                yield line, value
    except (ValueError, RecursionError) as error:
        got = f"{raw[:40]!r} ({error})"
        raise UserError(f"{metadata}:{line}: expected JSON in UTF-8; got {got}; correct or delete the line") from error
    except OSError as error:
        raise UserError(f"expected a readable {metadata}; got {error}; check its permissions") from error


def _check_columns(columns: Mapping[FieldName, str], present: set[str], metadata: Path) -> set[str]:
    """The columns that hold edited images. A column mapping that is wrong or missing raises a UserError."""
    for field, column in columns.items():
        if column not in present:
            raise UserError(
                f"data.columns.{field}: expected a column of {metadata}; got {column!r}."
                f"{did_you_mean(column, present)} Its columns are: {', '.join(sorted(present))}"
            )
    edited = {c for c in present if EDITED_COLUMN.fullmatch(c) and c not in NOT_IMAGE_COLUMNS}
    photo = columns.get("file_name", "file_name")
    if photo in edited:
        raise UserError(
            f"data.columns.file_name: expected a column of reference images; got {photo!r}, which by its name holds "
            "edited images, and those are never opened; name the column of the originals, or rename this one"
        )
    sources = sorted(c for c in present if REFERENCE_COLUMN.fullmatch(c))
    if photo not in present and sources and edited:
        raise UserError(
            f"{metadata}: expected a column file_name; got {', '.join(sources)} and {', '.join(sorted(edited))}, of "
            f"which only you know the originals; set data.columns, for example {{file_name: {sources[0]}}}"
        )
    return edited


def parse_row(
    json_object: dict, line: int, metadata: Path, columns: Mapping[FieldName, str], folder: Path | None = None
) -> Row:
    """A line's JSON object as a row. `columns` maps our field names to the data set's column names; `folder` is the
    data folder, if `metadata` is in a sub-folder of it.

    Raises:
        UserError: names file and line: a field is missing, the edit type is unknown, or a removal has no object.
    """
    values = {}
    for field in FIELDS:
        column = columns.get(field, field)
        text = json_object.get(column)
        if isinstance(text, int) and field == "id":
            text = str(text)
        if not isinstance(text, str | None):
            raise UserError(f"{metadata}:{line}: expected text in {column!r}; got {text!r}; write it as a string")
        if field in ("file_name", "instruction") and not (text or "").strip():
            if text is not None:
                raise UserError(f"{metadata}:{line}: expected text in {column!r}; got an empty one. Fill it in.")
            raise UserError(
                f"{metadata}:{line}: expected a field {column!r}; got {', '.join(json_object) or 'an empty object'}."
                f"{did_you_mean(column, json_object)} Add it, or say in data.columns which column holds it"
            )
        values[field] = (text or "").strip()
    try:
        values["edit_type"] = normalise_edit_type(values["edit_type"])
    except ValueError as error:
        raise UserError(f"{metadata}:{line}: {error}") from error
    if values["edit_type"] == "remove" and not values["object"]:
        raise UserError(
            f"{metadata}:{line}: expected an 'object' for edit type 'remove'; got none; "
            "add the name of what is removed, which the critic is asked for"
        )
    if values["edit_type"] == IDENTITY_EDIT:
        values["target_caption"] = values["target_caption"] or values["source_caption"]
    subfolder = metadata.parent.relative_to(folder or metadata.parent)
    values["id"] = values["id"] or (subfolder / f"{line:06d}").as_posix()
    return Row(**values, line=line, metadata=metadata, subfolder=subfolder.as_posix())


def read_rows(folder: Path, files: Sequence[Path], columns: Mapping[FieldName, str]) -> list[Row]:
    """All rows of these metadata files in `folder`. `columns` maps our field names to the data set's column names.

    Raises:
        UserError: names file and line: a line is not JSON, a field is missing, the edit type is unknown, a removal has
            no object; or columns need a mapping; or there are no rows.
    """
    rows = []
    for metadata in files:
        values = list(read_json_lines(metadata))
        edited = (
            _check_columns(columns, {column for _, value in values for column in value}, metadata) if values else ()
        )
        if edited:
            log.warning("%s: ignored, never opened: the edited images in %s", metadata, ", ".join(sorted(edited)))
        rows += [parse_row(value, line, metadata, columns, folder) for line, value in values]
    if not rows:
        raise UserError(f"expected at least one row; got an empty {files[0]}; write one line of JSON an image")
    return rows


def resolve_photo_path(folder: Path, file_name: str) -> Path:
    """The path of a file in a data folder. Only the name is checked: symbolic links are followed.

    Raises:
        BadImage: the name points outside the folder.
    """
    name = PurePosixPath(file_name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or re.match(r"[a-zA-Z]:", file_name):
        raise BadImage("the name leads out of the data folder")
    return folder / file_name
