"""The training set on disk: an imagefolder of `datasets`, and what is kept beside it.

metadata.jsonl   one row an edit        images/          the photos, unchanged (hard links where possible)
held_out.txt     ids for data.held_out  rejected.jsonl   rejected rows with pass and reason
bad_photos.jsonl photos not used        prepare.json     models, prompts, settings, counts
answers.jsonl    every answer           photos.jsonl     what was read from each photo
begun.json       what makes the set, see prepare/out_folder.py
README.md        the data card               review.jsonl     decisions of a person, see serve/review_set.py
"""

from __future__ import annotations

import codecs
import filecmp
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from npedit.data._held_out import read_held_out_ids
from npedit.errors import explain_write_errors
from npedit.prepare.passes import short_reason
from npedit.runs.files import fsync_file, fsync_folder, write_text

METADATA, REJECTED, BAD_PHOTOS = "metadata.jsonl", "rejected.jsonl", "bad_photos.jsonl"
HELD_OUT, FACTS, CARD, IMAGES = "held_out.txt", "prepare.json", "README.md", "images"
ANSWERS, PHOTOS, REVIEW = "answers.jsonl", "photos.jsonl", "review.jsonl"
MAX_REFERENCES = 4  # further photos of one subject in a row

Row = dict[str, Any]


def write_set(
    folder: Path,
    rows: Sequence[Row],
    rejected: Sequence[Row],
    bad: Sequence[Row],
    photos: Mapping[str, Mapping[str, Any]],
    held_out: Sequence[str],
) -> None:
    """Write the set's rows, photos and lists. `photos` are by id; each has `path`, `name`, `group`, `licence` and
    `source`. `rows` have `photo`, the id, and the columns of `as_metadata`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    used: dict[str, None] = {}
    for row in rows:
        used |= dict.fromkeys([row["photo"], *row.get("references", ())])
    for photo in used:
        place_photo(Path(photos[photo]["path"]), folder / image_name(photos[photo]), is_named_by_content=True)
    has = {name: any(photos[p].get(name) for p in used) for name in ("licence", "source")}
    has["asked_type"] = any(row["asked_type"] != row["edit_type"] for row in rows)
    has["reference_file_names"] = any(row.get("references") for row in rows)
    write_lines(folder / METADATA, (as_metadata(row, photos, has) for row in rows))
    write_lines(folder / REJECTED, ({**row, "file": photos[row["photo"]]["name"]} for row in rejected))
    write_lines(folder / BAD_PHOTOS, bad)
    write_text(folder / HELD_OUT, "".join(f"{i}\n" for i in held_out))
    _remove_unused(folder, {image_name(photos[photo]) for photo in used})


def as_metadata(row: Row, photos: Mapping[str, Mapping[str, Any]], has: Mapping[str, bool]) -> Row:
    """A row of metadata.jsonl. `has` says which optional columns the set has: a column is in all rows or in none."""
    photo = photos[row["photo"]]
    columns = ("id", "instruction", "edit_type", "object", "source_caption", "target_caption", "questions")
    made = {"file_name": image_name(photo), **{name: row[name] for name in columns}}
    if has["asked_type"]:
        made["asked_type"] = row["asked_type"]
    if has["reference_file_names"]:
        made["reference_file_names"] = [image_name(photos[p]) for p in row.get("references", ())]
    made |= {"group": photo["group"], "original_name": photo["name"]}
    return made | {name: photo.get(name, "") for name in ("licence", "source") if has[name]}


def image_name(photo: Mapping[str, Any]) -> str:
    """The name of a photo in the set. It is made of the photo's id: `datasets` reads words such as "test" in a name as
    the name of a split."""
    return f"{IMAGES}/{photo['id'][:2]}/{photo['id']}{Path(photo['name']).suffix.lower()}"


def place_photo(source: Path, target: Path, is_named_by_content: bool = False) -> None:
    """Make a hard link to a file, or a copy where that is not possible. An existing file of the same content is kept;
    if the content makes the name, it is not read again."""
    with explain_write_errors(target):
        has_size = target.exists() and target.stat().st_size == source.stat().st_size
        if has_size and (is_named_by_content or target.samefile(source) or filecmp.cmp(source, target, shallow=False)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            aside = target.with_name(target.name + ".tmp")
            shutil.copyfile(source, aside)
            os.replace(aside, target)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of rows completely or not at all, one row at a time."""
    aside = path.with_name(path.name + ".tmp")
    with explain_write_errors(path):
        with open(aside, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            fsync_file(file)
        os.replace(aside, path)
        fsync_folder(path.parent)


def _remove_unused(folder: Path, used: set[str]) -> None:
    """Remove photos of an earlier run with other settings. Only names that `image_name` makes are removed."""
    for path in (folder / IMAGES).glob("??/*"):
        if f"{IMAGES}/{path.parent.name}/{path.name}" not in used and path.stem[:2] == path.parent.name:
            path.unlink()


def read_held_out(folder: Path) -> list[str]:
    """The ids in a set's held_out.txt as training reads them; [] if there is no such file, or none in it.

    Raises:
        UserError: it is no text.
    """
    path = folder / HELD_OUT
    if not path.is_file() or not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip():
        return []
    return read_held_out_ids(str(path.resolve()), folder)


def draw_held_out(rows: Sequence[Row], groups: Mapping[str, str], share: float, seed: int) -> list[str]:
    """The ids of the rows that are held out: about `share` of all, in complete groups. `groups` maps photo to group. At
    least one row of each edit type stays for training. A group that is too large for the share is left out, unless
    there is no other one."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[groups[row["photo"]]].append(row)
    left = Counter(row["edit_type"] for row in rows)
    order = sorted(members)
    random.Random(f"{seed}/held out").shuffle(order)
    held: set[str] = set()

    def take(group: str) -> None:
        types = Counter(row["edit_type"] for row in members[group])
        if all(left[kind] > count for kind, count in types.items()):
            left.subtract(types)
            held.update(row["id"] for row in members[group])

    wanted = round(share * len(rows))
    for group in order:
        if len(members[group]) <= 2 * (wanted - len(held)):  # brings the number nearer to the wanted one
            take(group)
    for group in sorted(order, key=lambda group: len(members[group])):
        if wanted and not held:
            take(group)
    return [row["id"] for row in rows if row["id"] in held]


def count_rows(rows: Sequence[Row], rejected: Sequence[Row]) -> dict[str, Any]:
    """Counts for prepare.json and the data card: rows by type, rejected ones by pass and reason, the rejected share.
    Edits that the writer did not offer are counted apart: there was no row."""
    missing = [row for row in rejected if row["reason"] == "not offered"]
    refused = [row for row in rejected if row["reason"] != "not offered" and row["pass"] != "look"]
    reasons = Counter(f"{row['pass']}: {short_reason(row['reason'])}" for row in rejected)
    return {
        "rows": len(rows),
        "photos_with_rows": len({row["photo"] for row in rows}),
        "rows_by_type": dict(sorted(Counter(row["asked_type"] for row in rows).items())),
        "rejected": len(refused),
        "rejected_share": round(len(refused) / max(1, len(rows) + len(refused)), 4),
        "not_offered": len(missing),
        "reasons": dict(reasons.most_common()),
    }
