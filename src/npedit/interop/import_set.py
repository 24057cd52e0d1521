"""`npedit import`: references, instructions and captions of a public data set, as a data set of this package.

No edited image is opened: its column is not read from a parquet file, its member of a tar file is skipped, its file is
not touched. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from npedit import __version__
from npedit.data._metadata import EDITED_COLUMN, is_edited_column, source_columns
from npedit.errors import UserError, did_you_mean
from npedit.interop.edit_words import read_edit_type, read_removed_object
from npedit.interop.set_forms import FORMS, Entry, SetForm
from npedit.interop.set_records import Lists, Located, find_lists, list_columns, read_records
from npedit.interop.set_writer import BadPhoto, SetWriter, open_writer
from npedit.questions import OBJECT_OF, OTHER

FIELDS = ("photo", "instruction", "edit_type", "object", "source_caption", "target_caption", "id")
CAPTIONS = ("source_caption", "target_caption")
PHOTO_NAMES = (
    "file_name", "input_image", "source_image", "original_image", "image_path", "input_image_path", "control_path",
    "edit_image", "cond_image", "src_img", "source_img", "image",
)  # fmt: skip
OPEN_NAMES = ("image", "image_path", "file_name", "edit_image")  # references in some sets, edited images in others
INSTRUCTION_NAMES = ("instruction", "edit_prompt", "edit_instruction", "prompt", "caption", "text")


@dataclass
class ImportReport:
    """What was imported. `missing` counts rows without a caption; `skipped` counts the reasons why an edit is not a
    row; `notes` are sentences for the user."""

    rows: int = 0
    photos: int = 0
    bad_photos: int = 0
    types: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    without_object: Counter[str] = field(default_factory=Counter)  # how edits that need an object had none were handled
    notes: list[str] = field(default_factory=list)


def import_set(
    name: str,
    source: Path,
    out: Path,
    photos: Path | None = None,
    columns: Mapping[str, str] | None = None,
    first: int = 0,
    held_out: int = 0,
    licence: str = "",
    on_row: Callable[[int], None] = lambda rows: None,
) -> ImportReport:
    """Write the data set `out` from the list or folder `source`, which has the form `name` (a key of `FORMS`).

    `photos` is the folder of the photos, if they are not where the list says. `columns` maps fields (`FIELDS`) to
    columns. `first` imports so many rows only (0: all). `held_out` rows are listed in held_out.txt; rows of one photo
    are all held out, or none.

    Raises:
        UserError: unknown form or column; a list that cannot be read; no rows; `out` is not empty, or another
            process imports into it.
    """
    if name not in FORMS:
        raise UserError(f"expected a format among {', '.join(FORMS)}; got {name!r}.{did_you_mean(name, FORMS)}")
    if photos is not None and not photos.is_dir():
        raise UserError(f"--photos: expected a folder; got {photos}, which is none; check the path")
    if FORMS[name].needs_photos and photos is None:
        raise UserError(
            f"{name}: expected --photos; got none; give the folder of the references. The pictures beside the caption "
            "files may be edited images"
        )
    lists = find_lists(source, FORMS[name].files, FORMS[name].all_files)
    report = ImportReport(notes=[*FORMS[name].notes, *_notes_of_lists(lists)])
    form = _choose_columns(FORMS[name], lists.wanted[0], columns or {}, report)
    with open_writer(out, [photos] if photos else []) as writer:
        importer = _Importer(form, writer, report, licence or form.licence)
        for record in chain.from_iterable(read_records(path, form.columns) for path in lists.wanted):
            importer.add(record)
            on_row(report.rows)
            if first and report.rows >= first:
                break
        importer.finish(name, source, held_out)
    return report


def _notes_of_lists(lists: Lists) -> Iterator[str]:
    """Which lists are left out."""
    words = (("Held-out splits are left out", lists.held_out), ("Lists of another kind are left out", lists.others))
    for what, paths in words:
        if paths:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            yield f"{what}: {', '.join(path.name for path in paths[:3])}{more}."


# ---------------------------------------------------------------------------------------------------------- columns


def _choose_columns(form: SetForm, path: Path, wanted: Mapping[str, str], report: ImportReport) -> SetForm:
    """The form with the columns that the user named, or that are plain by their names."""
    for name in wanted:
        if name not in FIELDS:
            raise UserError(
                f"--column: expected a field among {', '.join(FIELDS)}; got {name!r}.{did_you_mean(name, FIELDS)}"
            )
    photo = wanted.get("photo", "")
    if photo in form.edited or (photo not in OPEN_NAMES and EDITED_COLUMN.fullmatch(photo.split(".")[0])):
        raise UserError(
            f"--column photo: expected a column of references; got {photo!r}, which by its name holds edited "
            "images, and those are never opened; name the column of the originals, or rename this one"
        )
    if path.suffix.lower() in (".tar", ".txt"):
        return form.with_columns(wanted)
    present = list_columns(path)
    for name, column in wanted.items():
        if column not in present:
            raise UserError(
                f"--column {name}: expected a column of {path}; got {column!r}.{did_you_mean(column, present)} "
                f"Its columns are: {', '.join(present)}"
            )
    is_known = bool(form.photo)
    form = form.with_columns(wanted)
    if not form.photo:
        form = form.with_columns({"photo": _plain_photo_column(present, path)})
        report.notes.append(f"Photos: column {form.photo[0]!r}, by its name.")
    if not is_known and not set(form.instruction) & set(present):
        form = form.with_columns({"instruction": _plain_instruction_column(present, path)})
        report.notes.append(f"Instructions: column {form.instruction[0]!r}, by its name.")
    if not set(present) & {*form.photo, *form.also} and not any(c.startswith(form.photo) for c in present):
        raise UserError(
            f"expected a column {' or '.join(form.photo)} in {path}; got {', '.join(present)}."
            f"{did_you_mean(form.photo[0], present)} Choose another format, or give --column photo=NAME"
        )
    edited = [c for c in present if c not in form.photo and (c in form.edited or is_edited_column(c))]
    if edited:
        report.notes.append(f"Edited images are ignored and never opened: {', '.join(edited)}.")
    return form


def _plain_photo_column(present: Sequence[str], path: Path) -> str:
    """The only column that can be the reference by its name; one of `OPEN_NAMES` only if there is no other picture."""
    found = [c for c in present if c in PHOTO_NAMES]
    others = [c for c in present if c not in found and (source_columns([c]) or is_edited_column(c))]
    if len(found) == 1 and (not others or found[0] not in OPEN_NAMES):
        return found[0]
    got, open_name = [*found, *others] or present, found[0] if len(found) == 1 else "image"
    raise UserError(
        f"expected to know which column of {path} holds the references; got {', '.join(got)}, and in some formats "
        f"{open_name!r} is the edited image; give --column photo=NAME"
    )


def _plain_instruction_column(present: Sequence[str], path: Path) -> str:
    found = [c for c in present if c in INSTRUCTION_NAMES]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"expected to know which column of {path} holds the instructions; got {', '.join(found or present)}; give "
        "--column instruction=NAME"
    )


# ------------------------------------------------------------------------------------------------------------- rows


class _Importer:
    """Turns records into rows of the set."""

    def __init__(self, form: SetForm, writer: SetWriter, report: ImportReport, licence: str):
        self.form, self.writer, self.report, self.licence = form, writer, report, licence
        self._ids_of_photo: dict[str, list[str]] = defaultdict(list)

    def add(self, record: Located) -> None:
        """Add the edits of a record. What cannot be used is counted, with the reason."""
        for number, entry in enumerate(self._split(record)):
            place = record.place if number == 0 else f"{record.place}/{number}"
            if reason := entry.skip or _find_fault(entry, place):
                self._reject(place, entry, reason)
                continue
            try:
                names = [
                    self.writer.save_photo(photo, record.folder, self.form.photo_folders)
                    for photo in (entry.photo, *entry.more_photos)
                ]
            except BadPhoto as error:
                self.report.bad_photos += 1
                self.writer.bad_photos.append({"id": entry.id or place, "file": place, "reason": str(error)})
                continue
            self._add_row(entry, names, entry.id or place)

    def _split(self, record: Located) -> list[Entry]:
        try:
            return list(self.form.split(self.form, record.values))
        except (TypeError, AttributeError, ValueError):  # null or a number where the format has a list, for example
            return [Entry(skip="a record whose values are not those of the format")]

    def _reject(self, place: str, entry: Entry, reason: str) -> None:
        self.report.skipped[reason] += 1
        row = {"id": entry.id or place, "instruction": entry.instruction, "reason": reason, "pass": "import"}
        self.writer.rejected.append(row)

    def _add_row(self, entry: Entry, names: Sequence[str], row_id: str) -> None:
        instruction = " ".join(str(entry.instruction).split())
        edit_type, thing = read_edit_type(entry.edit_type), entry.object.strip()
        if edit_type in OBJECT_OF and not thing:
            thing = read_removed_object(instruction) if edit_type == "remove" else ""
            edit_type = edit_type if thing else OTHER
            self.report.without_object["from the instruction" if thing else OTHER] += 1
        row: dict[str, Any] = {
            "file_name": names[0],
            "id": row_id,
            "instruction": instruction,
            "edit_type": edit_type,
            "object": thing,
            "source_caption": entry.source_caption.strip(),
            "target_caption": entry.target_caption.strip(),
            "group": names[0],
            "source": self.form.title,
        }
        row |= {"reference_file_names": list(names[1:])} if len(names) > 1 else {}
        row |= {"licence": self.licence} if self.licence else {}
        self.report.types[edit_type] += 1
        self.report.missing.update(name for name in CAPTIONS if not row[name])
        self._ids_of_photo[names[0]].append(self.writer.add_row(row))
        self.report.rows += 1

    def finish(self, name: str, source: Path, held_out: int) -> None:
        """Write the other files of the set.

        Raises:
            UserError: there are no rows, or too few for `held_out`.
        """
        report = self.report
        report.photos = len(self._ids_of_photo)
        if not report.rows:
            bad = [entry["reason"] for entry in self.writer.bad_photos[:1]]
            reasons = [*bad, *report.skipped] or ["the lists are empty"]
            raise UserError(
                f"expected rows in {source}; got none: {'; '.join(reasons[:3])}; check --photos and --column"
            )
        facts = {
            "kind": "import",
            "format": name,
            "npedit": __version__,
            "source": self.form.title,
            "licence": self.licence,
            "rows": report.rows,
            "photos": report.photos,
            "bad_photos": report.bad_photos,
            "edit_types": dict(report.types),
            "rows_without": dict(report.missing),
            "skipped": dict(report.skipped),
            "without_object": dict(report.without_object),
            "columns": {name: list(getattr(self.form, name)) for name in FIELDS},
            "never_read": list(self.form.edited),
        }
        self.writer.finish(facts, _data_card(self.form, self.licence, report), self._draw_held_out(held_out))

    def _draw_held_out(self, count: int) -> list[str]:
        """The ids of `count` rows or a few more: whole groups of rows that share a photo, in an order by hash."""
        if count >= self.report.rows:
            raise UserError(f"--held-out: expected fewer than all {self.report.rows} rows; got {count}; hold out fewer")
        chosen: list[str] = []
        for photo in sorted(self._ids_of_photo, key=lambda p: hashlib.sha256(p.encode()).digest()):
            if len(chosen) >= count:
                break
            chosen += self._ids_of_photo[photo]
        return chosen


def _find_fault(entry: Entry, place: str) -> str:
    """Why an edit cannot be a row; "" if it can."""
    if not isinstance(entry.instruction, str) or not entry.instruction.strip():
        return "no instruction"
    texts = (entry.instruction, entry.object, entry.source_caption, entry.target_caption, entry.id or place)
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        return "a text with half a character (a lone surrogate)"
    return ""


def report_lines(report: ImportReport) -> list[str]:
    """The report as sentences."""
    lines = [f"Rows: {report.rows}. Photos: {report.photos}."]
    lines += [f"Edit types: {', '.join(f'{kind} {count}' for kind, count in report.types.most_common())}."]
    for caption, need in (("target_caption", "dmd_weight above 0"), ("source_caption", "the warm-up (reference_copy)")):
        if count := report.missing[caption]:
            lines.append(
                f"{caption} is empty in {count} of {report.rows} rows; training with {need} needs it; npedit "
                "caption writes it."
            )
    if count := report.without_object["from the instruction"]:
        lines.append(f"Removals whose object is taken from the instruction: {count}.")
    if count := report.without_object[OTHER]:
        lines.append(f"Removals and scenes that name no object plainly, now of the edit type {OTHER!r}: {count}.")
    if report.bad_photos:
        lines.append(f"Rows without a photo that can be used: {report.bad_photos}; bad_photos.jsonl gives the reasons.")
    lines += [f"Edits that are left out: {count} ({reason})." for reason, count in report.skipped.most_common()]
    return [*lines, *report.notes]


CARD = """---
license: other
---

# References and instructions of {title}

Imported by npedit {version}. The set holds references, instructions and captions; it holds no edited image.

{facts}

Licence of the source: {licence}
"""


def _data_card(form: SetForm, licence: str, report: ImportReport) -> str:
    facts = "\n".join(f"- {line}" for line in report_lines(report))
    stated = licence or "not stated by the source; ask its authors"
    return CARD.format(title=form.title, version=__version__, facts=facts, licence=stated)
