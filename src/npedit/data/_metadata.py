"""The metadata of a data folder: find the files, and check their rows. `_formats.py` reads the files."""

from __future__ import annotations

import json
import os
import posixpath
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from npedit.data._photos import BadImage
from npedit.errors import UserError, did_you_mean
from npedit.questions import IDENTITY_EDIT, OBJECT_OF, normalise_edit_type

METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv", "metadata.parquet")
HELD_OUT_FOLDERS = frozenset(("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"))
TextField = Literal["file_name", "instruction", "edit_type", "object", "source_caption", "target_caption", "id"]
FieldName = Literal[
    "file_name", "instruction", "edit_type", "object", "source_caption", "target_caption", "id",
    "reference_file_names", "questions", "group", "mask_file_name",
]  # fmt: skip
FIELDS: tuple[TextField, ...] = get_args(TextField)
_FILE = r"(_?(image|img|picture|photo|file|path|url)(_?(file_?names?|path|url))?|_?file_?names?)?s?"
EDITED_COLUMN = re.compile(rf"(edited|edit|target|output|result|after|modified|generated|ground_truth|gt){_FILE}", re.I)
REFERENCE_COLUMN = re.compile(rf"(source|src|input|reference|ref|original|before|image|img|photo|picture){_FILE}", re.I)
SOURCE_COLUMN = re.compile(r"(cond|control|original|source|input)\w*", re.I)
TEXT_COLUMN = re.compile(
    r"\w*(caption|prompt|text|description|instruction|question|answer|id|width|height|size)s?", re.I
)
NOT_IMAGE_COLUMNS = {"edit", "edits"}  # in some data sets the names of instruction columns
PICTURE_FIELDS: tuple[FieldName, ...] = ("file_name", "reference_file_names", "mask_file_name")


@dataclass(frozen=True)
class Row:
    """One row of the metadata. Captions and object are "" if the row has none. `references` are the names of further
    pictures, and `questions` is JSON, a list of {"question": text, "answer": "yes" or "no"}, or "". `group` is the same
    for photos of one subject, and `mask` is the name of the picture that is white where the edit may change the photo;
    both are "" if the row has none. `offset` and `length` say where the photo is in a tar file; elsewhere they are -1
    and 0."""

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
    references: tuple[str, ...] = ()
    questions: str = ""
    offset: int = -1
    length: int = 0
    group: str = ""
    mask: str = ""

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
    """(the folder of the training data, every metadata file in it and below it). The folder is the one at `path`, or
    its sub-folder `train` where only that holds metadata. File names in a metadata file are relative to the folder that
    it lies in, as in `datasets`.

    Raises:
        UserError: there is no metadata file; or there are several formats, which `datasets` refuses too; or metadata in
            a zip archive, or of held-out data.
    """
    folder = Path(path).expanduser()
    wanted = f"expected a folder with images and {METADATA}; got {path!r}"
    if not path or not folder.exists():
        raise UserError(f"{wanted}, which does not exist; give the folder of your photos (in a recipe: data.path)")
    if not folder.is_dir():
        raise UserError(f"{wanted}, which is a file; give the folder that holds it (in a recipe: data.path)")
    if not any(folder.iterdir()):
        raise UserError(f"{wanted}, which is empty; put your photos and a {METADATA} there")
    if not _has_metadata(folder) and _has_metadata(folder / "train"):
        folder = folder / "train"
    found = sorted(_metadata_below(folder), key=lambda file: (len(file.parts), file))
    if not found:
        raise UserError(f"{wanted}, where there is no {', '.join(METADATA_FILES)}; write one, a row for each image")
    first_of = {file.suffix: file for file in reversed(found)}
    if len(first_of) > 1:
        raise UserError(
            f"expected metadata in files of one format; got {' and '.join(str(file) for file in first_of.values())}; "
            f"write all rows in one format, or move the other files out of {folder}"
        )
    return folder, found


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA_FILES)


def _metadata_below(folder: Path) -> Iterator[Path]:
    """The metadata files in a folder and its sub-folders, hidden ones left out. Errors as in `find_metadata`."""
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith((".", "__"))]
        for name in [name for name in files if name in METADATA_FILES or name.lower().endswith(".zip")]:
            file = Path(place, name)
            if name not in METADATA_FILES and _contains_metadata(file):
                raise UserError(
                    f"expected metadata in files of their own; got {file}, which would not be read; unpack it, or move "
                    f"it out of {folder}"
                )
            elif name in METADATA_FILES:
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
            return any(PurePosixPath(name).name in METADATA_FILES for name in file.namelist())
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


def is_edited_column(name: str) -> bool:
    """Whether a column holds edited images, by its name."""
    return bool(EDITED_COLUMN.fullmatch(_without_number(name))) and name not in NOT_IMAGE_COLUMNS


def source_columns(names: Iterable[str]) -> list[str]:
    """The columns that may hold source pictures, by their names and sorted. Beside another one, `image` may well hold
    the edited images."""
    words = {name: _without_number(name) for name in names}
    return sorted(
        name
        for name, word in words.items()
        if REFERENCE_COLUMN.fullmatch(word) or (SOURCE_COLUMN.fullmatch(word) and not TEXT_COLUMN.fullmatch(word))
    )


def _without_number(name: str) -> str:
    """The name of a column without a number at its end: "control_image" for "control_image_0"."""
    return name.rstrip("0123456789").rstrip("_")


def check_columns(columns: Mapping[FieldName, str], present: set[str], metadata: Path) -> set[str]:
    """The columns that hold edited images. A column mapping that is wrong or missing raises a UserError."""
    for field, column in columns.items():
        if column not in present:
            raise UserError(
                f"data.columns.{field}: expected a column of {metadata}; got {column!r}."
                f"{did_you_mean(column, present)} Its columns are: {', '.join(sorted(present))}"
            )
    edited = {c for c in present if is_edited_column(c)}
    for field in PICTURE_FIELDS:
        if columns.get(field) in edited:
            raise UserError(
                f"data.columns.{field}: expected a column of reference images or masks; got {columns[field]!r}, which "
                "by its name holds edited images, and those are never opened; name another column, or rename this one"
            )
    sources = source_columns(present - edited)
    if columns.get("file_name", "file_name") not in present and sources and edited:
        raise UserError(
            f"{metadata}: expected a column file_name; got {', '.join(sources)} and {', '.join(sorted(edited))}, of "
            f"which only you know the originals; set data.columns, for example {{file_name: {sources[0]}}}"
        )
    return edited


def parse_row(
    values: Mapping[str, Any], line: int, metadata: Path, columns: Mapping[FieldName, str], folder: Path | None = None
) -> Row:
    """A row from its values by column. `columns` maps our field names to the data set's column names; `folder` is the
    data folder, if `metadata` is in a sub-folder of it.

    Raises:
        UserError: names file and line: a field is missing or no text, the edit type is unknown, or a removal or a scene
            has no object.
    """
    location = f"{metadata}:{line}"
    texts: dict[str, Any] = {field: _text(values, field, columns.get(field, field), location) for field in FIELDS}
    try:
        texts["edit_type"] = normalise_edit_type(texts["edit_type"])
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error
    if texts["edit_type"] in OBJECT_OF and not texts["object"]:
        raise UserError(
            f"{location}: expected an 'object' for edit type {texts['edit_type']!r}; got none; fill 'object' with the "
            f"name of {OBJECT_OF[texts['edit_type']]}, which the critic is asked for"
        )
    if texts["edit_type"] == IDENTITY_EDIT:
        texts["target_caption"] = texts["target_caption"] or texts["source_caption"]
    subfolder = _subfolder(metadata, folder)
    texts["id"] = texts["id"] or (f"{line:06d}" if subfolder == "." else f"{subfolder}/{line:06d}")
    references = _references(values, columns.get("reference_file_names", "reference_file_names"), location)
    questions = parse_questions(values, columns.get("questions", "questions"), location)
    group, mask = (_text(values, n, columns.get(n, n), location) for n in ("group", "mask_file_name"))
    more: dict[str, Any] = {"references": references, "questions": questions, "group": group, "mask": mask}
    return Row(**texts, line=line, metadata=metadata, subfolder=subfolder, **more)


@lru_cache(maxsize=1024)
def _subfolder(metadata: Path, folder: Path | None) -> str:
    return metadata.parent.relative_to(folder or metadata.parent).as_posix()


def _text(values: Mapping[str, Any], field: FieldName, column: str, location: str) -> str:
    """One text of a row, without space around it; "" if the row has none. Errors as in `parse_row`."""
    text = values.get(column)
    if isinstance(text, int) and field in ("id", "group"):
        text = str(text)
    if not isinstance(text, str | None):
        raise UserError(f"{location}: expected text in {column!r}; got {text!r}; write it as a string")
    if field in ("file_name", "instruction") and not (text or "").strip():
        if text is not None:
            raise UserError(f"{location}: expected text in {column!r}; got an empty one. Fill it in.")
        raise UserError(
            f"{location}: expected a field {column!r}; got {', '.join(values) or 'an empty object'}."
            f"{did_you_mean(column, values)} Add it, or say in data.columns which column holds it"
        )
    text = (text or "").strip()
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{location}: expected text in {column!r}; got half a character (a lone surrogate); correct it")
    return text


def _references(values: Mapping[str, Any], column: str, location: str) -> tuple[str, ...]:
    """The names of further references. Errors as in `parse_row`."""
    names = _decoded(values.get(column))
    if not names:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{location}: expected a list of file names in {column!r}; got {names!r}; correct it")
    return tuple(name.strip() for name in names)


def parse_questions(values: Mapping[str, Any], column: str, location: str) -> str:
    """The questions of a row as JSON, as in `Example.questions`; "" if it has none. Errors as in `parse_row`."""
    found = _decoded(values.get(column))
    if not found:
        return ""
    made = []
    for entry in found if isinstance(found, list) else [found]:
        entry = entry if isinstance(entry, dict) else {}
        question, answer = entry.get("question"), str(entry.get("answer")).strip().lower()
        images = entry.get("images") or "edited"
        is_known = answer in ("yes", "no") and images in ("edited", "both")
        if not isinstance(question, str) or not question.strip() or not is_known:
            raise UserError(
                f'{location}: expected a list of {{"question": text, "answer": "yes" or "no"}}, where "images" may '
                f'be "edited" or "both", in {column!r}; got {found!r}; correct it'
            )
        made.append({"question": question.strip(), "answer": answer} | ({"images": images} if images == "both" else {}))
    return json.dumps(made, ensure_ascii=False)


def _decoded(value: Any) -> Any:
    """A list that is written as JSON text, as it is in a csv file; other values as they are."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def relative_name(file_name: str) -> str:
    """The name of a file in a data folder with "/" between its parts, as `datasets` reads it: "./" and backslashes are
    understood.

    Raises:
        BadImage: the name points outside the folder.
    """
    if not file_name.startswith(("/", ".")) and not any(part in file_name for part in ("\\", "..", ":", "/.")):
        return file_name
    name = posixpath.normpath(file_name.replace("\\", "/"))
    if name.startswith(("/", "../")) or name == ".." or re.match(r"[a-zA-Z]:|\w+://", file_name):
        raise BadImage("the name leads out of the data folder")
    return name


def resolve_photo_path(folder: Path, file_name: str) -> Path:
    """The path of a file in a data folder. Only the name is checked: symbolic links are followed.

    Raises:
        BadImage: the name points outside the folder.
    """
    return folder / relative_name(file_name)
