"""`npedit caption SET --out NEW`: the rows of a set with the captions that they lack, as a new set.

The instructions, and all other columns, stay as they are; columns of edited images are left out. A row that cannot be
completed is kept aside with the reason. A stopped run resumes: every answer is kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npedit import __version__
from npedit.data._formats import edited_columns, read_metadata
from npedit.data._metadata import find_metadata, parse_row, relative_name, resolve_photo_path
from npedit.data._photos import BadImage
from npedit.errors import UserError
from npedit.prepare import out_folder
from npedit.prepare.asking import Meter
from npedit.prepare.caption_rows import FILLED, caption_photo, is_complete
from npedit.prepare.engine import Engine, LocalEngine
from npedit.prepare.passes import Passes, short_reason, unanswered_reason
from npedit.prepare.prepare import PrepareSettings, Progress, ReportProgress, make_passes
from npedit.prepare.prompts import CAPTION, Prompts
from npedit.prepare.set_folder import (
    ANSWERS,
    CARD,
    FACTS,
    HELD_OUT,
    METADATA,
    REJECTED,
    place_photo,
    read_held_out,
    write_lines,
)
from npedit.prepare.writer import Writer
from npedit.runs.files import read_json_object, write_text
from npedit.runs.lock import hold
from npedit.scoring.tables import markdown_table

Row = dict[str, Any]
UNNAMED = "?"  # stands for the object of a removal or of a scene that has none yet


@dataclass(frozen=True)
class Entry:
    """One row of the set. `values` are its columns, with the columns `FILLED`; `files` maps the names of its pictures
    in the new set to the files."""

    number: int
    values: Row
    files: Mapping[str, Path]

    @property
    def photo(self) -> str:
        """The name of the photo."""
        return str(self.values["file_name"])


def caption_set(
    source: Path,
    out: Path,
    settings: PrepareSettings,
    prompts: Prompts,
    writer: Writer,
    verifier: Writer | None,
    meter: Meter,
    report: ReportProgress = lambda progress: None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the set in `source` to `out` with the captions that it lacks; returns the facts that prepare.json holds
    under "captions". `verifier` None leaves the verification out.

    Raises:
        UserError: bad input, the model cannot be reached, or no row is complete. All answers are kept.
    """
    out_folder.require_folder(out, out_folder.CAPTION, [source])
    folder, entries = read_entries(source)
    out.mkdir(parents=True, exist_ok=True)
    engine = engine or LocalEngine(max(writer.workers, 2))
    with hold(out, "caption"), engine.open_answers(out / ANSWERS, meter) as (answers, total):
        out_folder.begin_set(out, out_folder.CAPTION, [source])
        passes = make_passes(settings, prompts, writer, verifier, answers, total)
        rows, rejected, stopped = ask_for_captions(entries, passes, engine, report)
        facts = describe_captions(source, passes, total, stopped) | count_captions(entries, rows, rejected)
        write_captioned_set(folder, out, entries, rows, rejected, facts)
    if not rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in list(facts["reasons"].items())[:3])
        raise UserError(
            f"expected rows that can be completed; got none of {len(entries)} ({stopped or reasons}); {out / REJECTED} "
            "lists the reasons"
        )
    return facts


# -------------------------------------------------------------------------------------------------------------- read


def read_entries(source: Path) -> tuple[Path, list[Entry]]:
    """(the folder of the set, its rows).

    Raises:
        UserError: there is no set, or names file and line: a row is wrong, a picture is outside the set, or a value has
            no form in JSON.
    """
    folder, files = find_metadata(str(source))
    edited = edited_columns(files, {})
    entries: list[Entry] = []
    for file in files:
        for line, values in read_metadata(file):
            entries.append(_read_entry(len(entries), values, edited.get(file, ()), file, line, folder))
    return folder, entries


def _read_entry(number: int, values: Row, edited: Collection[str], file: Path, line: int, folder: Path) -> Entry:
    row = parse_row({**values, "object": values.get("object") or UNNAMED}, line, file, {}, folder)
    prefix = "" if row.subfolder == "." else f"{row.subfolder}/"
    pictures = (row.file_name, *row.references, *filter(None, [row.mask]))
    try:
        places = {relative_name(prefix + name): resolve_photo_path(file.parent, name) for name in pictures}
    except BadImage as error:
        raise UserError(f"{row.location}: {error}; correct the name") from None
    names = list(places)
    kept = {name: value for name, value in values.items() if name not in edited}
    found = kept | {"file_name": names[0], "id": row.id, "instruction": row.instruction, "edit_type": row.edit_type}
    found |= {"object": "" if row.object == UNNAMED else row.object, "questions": json.loads(row.questions or "[]")}
    found |= {"source_caption": row.source_caption, "target_caption": row.target_caption}
    if "reference_file_names" in values:
        found["reference_file_names"] = [relative_name(prefix + name) for name in row.references]
    if "mask_file_name" in values:
        found["mask_file_name"] = relative_name(prefix + row.mask) if row.mask else ""
    _require_json(found, row.location)
    return Entry(number, found, places)


def _require_json(values: Row, location: str) -> None:
    """Check that a row can be written into metadata.jsonl."""
    for name, value in values.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{location}: expected values that JSON can hold; got {value!r:.80} in {name!r} ({error}); write it as "
                "text or as a number, or leave the column out"
            ) from None


# --------------------------------------------------------------------------------------------------------------- ask


def ask_for_captions(
    entries: Sequence[Entry], passes: Passes, engine: Engine, report: ReportProgress
) -> tuple[list[Row], list[Row], str]:
    """(complete rows, rejected rows, why it ended early or ""), both in the order of the set.

    Raises:
        UserError: the model cannot be reached.
    """
    rejected = {entry.number: row for entry in entries if (row := _without_picture(entry))}
    usable = [entry for entry in entries if entry.number not in rejected]
    made = {entry.number: entry.values for entry in usable if is_complete(entry.values)}
    jobs = _jobs([entry for entry in usable if entry.number not in made])
    progress, stopped = Progress("captions", total=len(jobs)), ""
    for _, result in engine.run(caption_photo, jobs, passes):
        if isinstance(result, str):
            stopped = result
            break
        made |= {row.pop("number"): row for row in result["rows"]}
        rejected |= {row.pop("number"): row for row in result["rejected"]}
        progress.done += 1
        progress.rows_by_type.update(row["edit_type"] for row in result["rows"])
        progress.rejected, progress.cost = len(rejected), passes.writer.meter.cost
        report(progress)
    stopped = stopped or unanswered_reason(rejected.values())
    return [made[n] for n in sorted(made)], [rejected[n] for n in sorted(rejected)], stopped


def _without_picture(entry: Entry) -> Row:
    """The row as a rejected one if one of its pictures is missing; {} if all are there."""
    missing = [name for name, path in entry.files.items() if not path.is_file()]
    return {**entry.values, "pass": "look", "reason": f"no such file: {missing[0]}"} if missing else {}


def _jobs(entries: Sequence[Entry]) -> list[tuple[Row, list[Row]]]:
    """(photo, its rows) of each photo: what is in the photo is asked once for all of its rows."""
    jobs: dict[str, tuple[Row, list[Row]]] = {}
    for entry in entries:
        photo = {"id": entry.photo, "path": str(entry.files[entry.photo])}
        jobs.setdefault(entry.photo, (photo, []))[1].append({**entry.values, "number": entry.number})
    return list(jobs.values())


# ------------------------------------------------------------------------------------------------------------- write


def describe_captions(source: Path, passes: Passes, meter: Meter, stopped: str) -> dict[str, Any]:
    """Which models wrote the captions, with which prompts and at which cost."""
    verifier = passes.verifier.writer if passes.verifier else None
    return {
        "npedit": __version__,
        "set": source.name,
        "writer": {"name": passes.writer.writer.name, **passes.writer.writer.identity},
        "verifier": {"name": verifier.name, **verifier.identity} if verifier else None,
        "prompts": passes.prompts.to_record(("look", CAPTION, "verify")),
        "side": passes.side,
        "seed": passes.seed,
        "usage": dict(meter.usage),
        "cost": round(meter.cost, 6),
        "requests": dict(meter.requests),
        "stopped": stopped,
    }


def count_captions(entries: Sequence[Entry], rows: Sequence[Row], rejected: Sequence[Row]) -> dict[str, Any]:
    """How many rows were read, were complete before, are complete now, and were rejected for which reason."""
    reasons = Counter(f"{row['pass']}: {short_reason(row['reason'])}" for row in rejected)
    before = Counter({name: sum(bool(e.values[name]) for e in entries) for name in FILLED})
    return {
        "read": len(entries),
        "complete_before": sum(is_complete(entry.values) for entry in entries),
        "rows": len(rows),
        "rejected": len(rejected),
        "reasons": dict(reasons.most_common()),
        "with_before": dict(before),
        "with": {name: sum(bool(row[name]) for row in rows) for name in FILLED},
    }


def write_captioned_set(
    folder: Path, out: Path, entries: Sequence[Entry], rows: Sequence[Row], rejected: Sequence[Row], facts: Row
) -> None:
    """Write the new set: rows, pictures (hard links where possible), lists, card.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    files = {name: path for entry in entries for name, path in entry.files.items()}
    for name in dict.fromkeys(name for row in rows for name in _picture_names(row)):
        place_photo(files[name], out / name)
    write_lines(out / METADATA, rows)
    write_lines(out / REJECTED, rejected)
    ids = {row["id"] for row in rows}
    if (folder / HELD_OUT).is_file():
        held_out = [i for i in read_held_out(folder) if i in ids]
        write_text(out / HELD_OUT, "".join(f"{i}\n" for i in held_out))
    write_text(out / FACTS, json.dumps(_old_facts(folder) | {"captions": facts}, indent=1, ensure_ascii=False) + "\n")
    write_text(out / CARD, _card(folder, facts))


def _picture_names(row: Row) -> list[str]:
    """The names of a row's pictures in the new set: the photo, its further references, and its mask."""
    return [row["file_name"], *row.get("reference_file_names", ()), *filter(None, [row.get("mask_file_name")])]


def _old_facts(folder: Path) -> Row:
    try:
        return read_json_object(folder / FACTS)
    except ValueError:
        return {}


def _card(folder: Path, facts: Mapping[str, Any]) -> str:
    """The card of the set that was read, and a section about the captions."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = "# Photos with edit instructions\n"
    verifier = f"`{facts['verifier']['name']}`" if facts["verifier"] else "no model"
    head = ("column", f"rows that had it, of {facts['read']}", f"rows that have it, of {facts['rows']}")
    filled = markdown_table(head, [(n, facts["with_before"][n], facts["with"][n]) for n in FILLED])
    return (
        f"{text.rstrip()}\n\n## Captions\n\n`npedit caption` filled the columns below with "
        f"`{facts['writer']['name']}`; {verifier} verified them. No person has read them. {facts['rejected']} of "
        f"{facts['read']} rows could not be completed and were left out (`{REJECTED}`).\n\n" + "\n".join(filled) + "\n"
    )
