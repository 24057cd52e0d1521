"""`npedit prepare`: scan the photos, ask for edits with many requests at once, verify them, write the set.

A stopped run resumes: every answer is kept. The set is a function of the photos, the settings and the answers.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npedit import __version__
from npedit.errors import UserError
from npedit.prepare import photos as scanning
from npedit.prepare.asking import Answers, Asker, Meter
from npedit.prepare.card import count_values, write_card
from npedit.prepare.duplicates import MAX_BITS, group_near_duplicates, join_groups
from npedit.prepare.engine import Engine, LocalEngine
from npedit.prepare.out_folder import PREPARE, begin_set, require_folder
from npedit.prepare.passes import Passes, prepare_photo, unanswered_reason
from npedit.prepare.plan import refill_types, wanted_types
from npedit.prepare.prompts import Prompts
from npedit.prepare.set_folder import (
    ANSWERS,
    CARD,
    FACTS,
    MAX_REFERENCES,
    PHOTOS,
    count_rows,
    draw_held_out,
    write_set,
)
from npedit.prepare.writer import Writer
from npedit.questions import SCENE
from npedit.runs.files import write_text
from npedit.runs.lock import hold

log = logging.getLogger(__name__)
Row = dict[str, Any]
Made = dict[str, dict[str, list[Row]]]  # photo id -> {"rows", "rejected"}


@dataclass(frozen=True)
class PrepareSettings:
    """How a set is made; `npedit prepare --help` describes each setting. `shares` sum to 1."""

    shares: Mapping[str, float]
    per_photo: int = 2
    side: int = 1024
    seed: int = 0
    rounds: int = 2
    duplicates: str = "one"  # "one" of a group is kept, "mark": all are kept, "off": no groups
    duplicate_bits: int = MAX_BITS
    subjects: bool = False
    held_out: float = 0.02
    min_side: int = 16
    max_pixels: int = 100_000_000
    shard: tuple[int, int] = (0, 1)


@dataclass
class Progress:
    """What a progress display shows. `stage` is "photos" or "edits"."""

    stage: str
    done: int = 0
    total: int = 0
    rows_by_type: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    cost: float = 0.0


ReportProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Scan:
    """The photos of a run. `chosen` are asked for edits; `groups` maps the id of each photo to its group."""

    photos: list[Row]
    chosen: list[Row]
    bad: list[Row]
    groups: dict[str, str]

    @property
    def by_id(self) -> dict[str, Row]:
        """Photo id -> photo, with its group."""
        return {photo["id"]: {**photo, "group": self.groups[photo["id"]]} for photo in self.photos}


def prepare(
    folder: Path,
    out: Path,
    settings: PrepareSettings,
    prompts: Prompts,
    writer: Writer,
    verifier: Writer | None,
    meter: Meter,
    rights: Mapping[str, Mapping[str, str]] | None = None,
    report: ReportProgress = lambda progress: None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Make a training set in `out` from the photos in `folder`; returns the facts that prepare.json holds. `verifier`
    None leaves the verification out. `rights` are licences and sources by file name. `engine` None is the threads of
    this process.

    Raises:
        UserError: bad input, the model cannot be reached, or no row was made. All answers are kept.
    """
    require_folder(out, PREPARE, [folder])
    out.mkdir(parents=True, exist_ok=True)
    engine = engine or LocalEngine(max(writer.workers, 2))
    with hold(out, "prepare"), engine.open_answers(out / ANSWERS, meter) as (answers, total):
        begin_set(out, PREPARE, [folder])
        scan = scan_folder(folder, out, settings, rights or {}, engine, report)
        passes = make_passes(settings, prompts, writer, verifier, answers, total)
        made, stopped = ask_for_edits(scan.chosen, settings, passes, engine, report)
        return finish_set(out, scan, made, settings, describe_run(folder, settings, passes, total, stopped))


def make_passes(
    settings: PrepareSettings,
    prompts: Prompts,
    writer: Writer,
    verifier: Writer | None,
    answers: Answers,
    meter: Meter,
) -> Passes:
    """What the three passes need."""
    checker = Asker(verifier, answers, meter) if verifier else None
    asker = Asker(writer, answers, meter)
    return Passes(prompts, asker, checker, settings.side, settings.seed, settings.max_pixels)


def scan_folder(
    folder: Path,
    out: Path,
    settings: PrepareSettings,
    rights: Mapping[str, Mapping[str, str]],
    engine: Engine,
    report: ReportProgress,
) -> Scan:
    """Read the photos of this shard and group near-duplicates.

    Raises:
        UserError: no photo can be used.
    """
    names = scanning.find_photos(folder)
    _report_unknown(rights, names, folder)
    names = scanning.choose_shard(names, settings.shard)
    found, bad = scanning.scan_photos(
        folder, names, out / PHOTOS, settings.max_pixels, settings.min_side, engine.scan,
        lambda done, total: report(Progress("photos", done, total)),
    )  # fmt: skip
    if not found and names:
        raise UserError(
            f"expected photos that can be read; got {len(bad)} bad ones in {folder}, such as {bad[0]['file']}: "
            f"{bad[0]['reason']}; correct the photos"
        )
    return group_scan([{**photo, **rights.get(photo["name"], {})} for photo in found], list(bad), settings)


def _report_unknown(rights: Mapping[str, object], names: Sequence[str], folder: Path) -> None:
    """Say which names of the table of licences are no photos."""
    if unknown := sorted(set(rights) - set(names)):
        log.warning(
            "--licences: expected names of photos in %s, such as %r; %d of %d are none, such as %r; write them "
            "relative to that folder, with / between folders", folder, names[0], len(unknown), len(rights), unknown[0],
        )  # fmt: skip


def group_scan(photos: list[Row], bad: list[Row], settings: PrepareSettings) -> Scan:
    """Group near-duplicates, and choose the photos that are asked for edits."""
    if settings.duplicates == "off":
        groups = {photo["id"]: photo["id"] for photo in photos}
    else:
        groups = group_near_duplicates(photos, settings.duplicate_bits)
    chosen = [p for p in photos if settings.duplicates != "one" or groups[p["id"]] == p["id"]]
    if settings.subjects:
        groups = join_groups(groups, [[p["id"] for p in members] for members in subjects(photos).values()])
    return Scan(photos, chosen, bad, groups)


def subjects(photos: Sequence[Row]) -> dict[str, list[Row]]:
    """The photos of each sub-folder: one subject. Photos at the top are no subject."""
    found: dict[str, list[Row]] = defaultdict(list)
    for photo in photos:
        if "/" in photo["name"]:
            found[photo["name"].rpartition("/")[0]].append(photo)
    return found


# --------------------------------------------------------------------------------------------------------------- ask


def ask_for_edits(
    photos: Sequence[Row], settings: PrepareSettings, passes: Passes, engine: Engine, report: ReportProgress
) -> tuple[Made, str]:
    """(what each photo gave, why it ended early or ""). After the first round, further rounds ask photos that lack rows
    for other edit types, those first of which most rows are missing.

    Raises:
        UserError: the model cannot be reached.
    """
    made: Made = {photo["id"]: {"rows": [], "rejected": []} for photo in photos}
    asked: dict[str, list[str]] = {}
    plan = {p["id"]: wanted_types(p["id"], settings.shares, settings.per_photo, settings.seed) for p in photos}
    progress = Progress("edits", total=len(photos))
    for number in range(settings.rounds):
        jobs = [(photo, plan[photo["id"]]) for photo in photos if plan.get(photo["id"])]
        progress.total += len(jobs) if number else 0
        for photo, result in engine.run(prepare_photo, jobs, passes):
            if isinstance(result, str):
                return made, result
            asked.setdefault(photo["id"], []).extend(plan[photo["id"]])
            for name in ("rows", "rejected"):
                made[photo["id"]][name] += result[name]
            _count(progress, result, passes.writer.meter)
            report(progress)
        readable = [p for p, r in made.items() if not any(row["pass"] == "look" for row in r["rejected"])]
        types = {p: [row["asked_type"] for row in made[p]["rows"]] for p in readable}
        plan = refill_types(readable, types, asked, settings.shares, settings.per_photo)
    return made, unanswered_reason(row for result in made.values() for row in result["rejected"])


def _count(progress: Progress, result: Mapping[str, list[Row]], meter: Meter) -> None:
    progress.done += 1
    progress.rows_by_type.update(row["asked_type"] for row in result["rows"])
    progress.rejected += sum(row["reason"] != "not offered" for row in result["rejected"])
    progress.cost = meter.cost


# ------------------------------------------------------------------------------------------------------------ finish


def describe_run(folder: Path, settings: PrepareSettings, passes: Passes, meter: Meter, stopped: str) -> dict[str, Any]:
    """The facts of prepare.json that are known before the rows are counted."""
    verifier = passes.verifier.writer if passes.verifier else None
    return {
        "npedit": __version__,
        "photos_folder": folder.name,
        "settings": {**asdict(settings), "shares": dict(settings.shares), "shard": list(settings.shard)},
        "shares": dict(settings.shares),
        "writer": {"name": passes.writer.writer.name, **passes.writer.writer.identity},
        "verifier": {"name": verifier.name, **verifier.identity} if verifier else None,
        "prompts": passes.prompts.to_record(),
        "usage": dict(meter.usage),
        "cost": round(meter.cost, 6),
        "requests": dict(meter.requests),
        "stopped": stopped,
    }


def finish_set(out: Path, scan: Scan, made: Made, settings: PrepareSettings, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the set from what the photos gave; returns the complete facts.

    Raises:
        UserError: no row was made, or the set cannot be written.
    """
    order = [photo["id"] for photo in scan.photos if photo["id"] in made]
    rows = [row for photo in order for row in made[photo]["rows"]]
    rejected = [row for photo in order for row in made[photo]["rejected"]]
    if settings.subjects:
        add_references(rows, scan.photos)
    held_out = draw_held_out(rows, scan.groups, settings.held_out, settings.seed)
    by_id = scan.by_id
    write_set(out, rows, rejected, scan.bad, by_id, held_out)
    used = [by_id[photo] for photo in dict.fromkeys(row["photo"] for row in rows)]
    facts |= {
        "counts": count_rows(rows, rejected),
        "photos": {
            "found": len(scan.photos) + len(scan.bad),
            "bad": len(scan.bad),
            "duplicates": len(scan.photos) - len(set(scan.groups.values())),
        },
        "held_out": len(held_out),
        "licences": count_values(used, "licence"),
        "sources": count_values(used, "source"),
    }
    write_text(out / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_text(out / CARD, write_card(facts))
    if not rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in list(facts["counts"]["reasons"].items())[:3])
        raise UserError(
            f"expected edits; got none of {len(made)} photos ({facts['stopped'] or reasons or 'no photo'}); "
            f"{out / 'rejected.jsonl'} lists the reasons"
        )
    return facts


def add_references(rows: Sequence[Row], photos: Sequence[Row]) -> None:
    """Give each row of the type "scene" the other photos of its subject as `references`, at most `MAX_REFERENCES`.
    Photos without `path`, which a merge no longer finds, are left out."""
    folder = {photo["id"]: photo["name"].rpartition("/")[0] for photo in photos}
    members = {name: [p["id"] for p in group if "path" in p] for name, group in subjects(photos).items()}
    for row in rows:
        if row["edit_type"] == SCENE:
            others = [p for p in members.get(folder[row["photo"]], ()) if p != row["photo"]]
            row["references"] = others[:MAX_REFERENCES]
