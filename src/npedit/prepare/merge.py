"""Merging finished shards into one set: near-duplicates are grouped again over all photos, and held-out rows are drawn
anew. No model is asked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npedit.errors import UserError, explain_write_errors
from npedit.prepare.out_folder import BEGUN, MERGE, PREPARE, begin_set, read_sources, require_folder
from npedit.prepare.prepare import PrepareSettings, finish_set, group_scan
from npedit.prepare.set_folder import (
    ANSWERS,
    BAD_PHOTOS,
    FACTS,
    METADATA,
    PHOTOS,
    REJECTED,
)
from npedit.runs.files import fsync_file, read_json_object, read_rows
from npedit.runs.lock import hold

Row = dict[str, Any]
SAME = ("shares", "writer", "verifier", "prompts")  # facts that must be equal in all shards


def merge(out: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """Write one set from shards that `npedit prepare --shard i/n` has made; returns the facts of prepare.json. Seed,
    share of held-out rows and treatment of near-duplicates are those of the shards.

    Raises:
        UserError: a shard is missing, unfinished, or made with other settings; or `out` is a shard or another set.
    """
    require_folder(out, MERGE, shards)
    facts = [_read_facts(shard) for shard in shards]
    _check_shards(shards, facts)
    settings = _settings(facts[0])
    photos, bad, made = _read_shards(shards)
    scan = group_scan(photos, bad, settings)
    chosen = {photo["id"] for photo in scan.chosen}
    made = {photo: result for photo, result in made.items() if photo in chosen}
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, "merge-shards"):
        begin_set(out, MERGE, shards)
        _join_answers(out, shards)
        merged = finish_set(out, scan, made, settings, _sum_facts(facts))
        _hand_over(out, shards)
        return merged


def _hand_over(out: Path, shards: Sequence[Path]) -> None:
    """From now on the set counts as begun by `npedit prepare` from the photos of the shards, so that it can go on."""
    sources = [read_sources(shard) for shard in shards]
    if sources[0] and all(found == sources[0] for found in sources):
        begin_set(out, PREPARE, sources[0])
    else:
        (out / BEGUN).unlink()


def _read_facts(shard: Path) -> dict[str, Any]:
    try:
        facts = read_json_object(shard / FACTS)
    except ValueError as error:
        raise UserError(
            f"expected a finished shard in {shard}; got {error}; run npedit prepare --shard for it to the end"
        ) from None
    if missing := [name for name in (*SAME, "settings") if name not in facts]:
        raise UserError(
            f"expected a shard of npedit prepare in {shard}; got a folder whose {FACTS} has no "
            f"{', '.join(missing)}; give the folders that npedit prepare --shard made"
        )
    if facts.get("stopped"):
        raise UserError(f"expected a finished shard in {shard}; it stopped: {facts['stopped']}; finish it")
    return facts


def _check_shards(shards: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    for shard, found in zip(shards[1:], facts[1:]):
        for name in SAME:
            if found[name] != facts[0][name]:
                raise UserError(
                    f"expected shards made alike; {name} differs: {shards[0]} has {facts[0][name]}, "
                    f"{shard} has {found[name]}; run the shards with the same options"
                )
    numbers = [tuple(found["settings"]["shard"]) for found in facts]
    count = max(n for _, n in numbers)
    if count > 1 and sorted(numbers) != [(i, count) for i in range(count)]:
        got = ", ".join(f"{i}/{n}" for i, n in numbers)
        raise UserError(f"expected the shards 0/{count} to {count - 1}/{count}, each once; got {got}; give them all")


def _settings(facts: dict[str, Any]) -> PrepareSettings:
    settings = facts["settings"]
    return PrepareSettings(**{**settings, "shard": tuple(settings["shard"])})


def _read_shards(shards: Sequence[Path]) -> tuple[list[Row], list[Row], dict[str, dict[str, list[Row]]]]:
    """(photos sorted by name, bad photos, what each photo gave). Of files with the same bytes in several shards, the
    one whose name comes first counts."""
    photos: dict[str, Row] = {}
    bad: list[Row] = []
    made: dict[str, dict[str, list[Row]]] = {}
    sources: dict[str, Path] = {}
    for shard in shards:
        unusable = read_rows(shard / BAD_PHOTOS)
        bad += unusable
        skipped = {row["file"] for row in unusable}
        for photo in read_rows(shard / PHOTOS):
            if "id" not in photo or photo["name"] in skipped:
                continue
            other = photos.get(photo["id"])
            if other is not None and other["name"] != photo["name"]:
                first, second = sorted((other, photo), key=lambda p: p["name"])
                bad.append({"file": second["name"], "reason": f"the same file as {first['name']}"})
                photo = first
            photos[photo["id"]] = photo
            if other is None or photo is not other:
                sources[photo["id"]] = shard
    for shard in shards:
        own = {photo for photo, source in sources.items() if source == shard}
        _read_rows_of(shard, own, photos, made)
        _find_photos_without_rows([photos[photo] for photo in own], read_sources(shard))
    return sorted(photos.values(), key=lambda p: p["name"]), bad, made


def _read_rows_of(shard: Path, own: set[str], photos: dict[str, Row], made: dict[str, dict[str, list[Row]]]) -> None:
    """Add the rows and rejected rows of a shard's own photos to `made`, and the photos' licences to `photos`."""
    for row in read_rows(shard / METADATA):
        names = [row["file_name"], *row.get("reference_file_names", ())]
        photo, *references = [Path(name).stem for name in names]
        for name, known in zip(names, (photo, *references)):
            photos[known].setdefault("path", str(shard / name))
        if photo in own:
            photos[photo] |= {name: row[name] for name in ("licence", "source") if name in row}
            entry = made.setdefault(photo, {"rows": [], "rejected": []})
            entry["rows"].append({**row, "photo": photo, "asked_type": row.get("asked_type", row["edit_type"])})
    for row in read_rows(shard / REJECTED):
        if row["photo"] in own:
            made.setdefault(row["photo"], {"rows": [], "rejected": []})["rejected"].append(row)


def _find_photos_without_rows(photos: Sequence[Row], folders: Sequence[Path]) -> None:
    """Give photos that are in no shard, because no row has them, the `path` of the file in the folder of photos if it
    has not changed: another photo's row may have them as reference."""
    for photo in photos:
        for place in (folder / photo["name"] for folder in folders):
            if "path" not in photo and place.is_file():
                facts = place.stat()
                if (facts.st_size, facts.st_mtime_ns) == (photo["bytes"], photo["modified"]):
                    photo["path"] = str(place)


def _join_answers(out: Path, shards: Sequence[Path]) -> None:
    """Copy the shards' answers and photos' facts, so that a later run over all photos asks nothing twice."""
    for name in (ANSWERS, PHOTOS):
        aside = out / f"{name}.tmp"
        with explain_write_errors(out / name):
            with open(aside, "wb") as file:
                for shard in shards:
                    if (shard / name).exists():
                        data = (shard / name).read_bytes()
                        file.write(data if data.endswith(b"\n") or not data else data + b"\n")
                fsync_file(file)
            os.replace(aside, out / name)


def _sum_facts(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the merged set that come from the shards."""
    usage, requests = Counter[str](), Counter[str]()
    for found in facts:
        usage.update(found["usage"])
        requests.update(found["requests"])
    cost = round(sum(found["cost"] for found in facts), 6)
    settings = {**facts[0]["settings"], "shard": [0, 1]}
    merged = {"usage": dict(usage), "requests": dict(requests), "cost": cost, "settings": settings}
    return {**facts[0], **merged, "merged": len(facts)}
