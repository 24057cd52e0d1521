"""What a review changes in prepare.json and in the data card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npedit.prepare.card import count_values, write_card
from npedit.prepare.set_folder import CARD, FACTS, count_rows
from npedit.runs.files import read_json_object, write_text

Row = dict[str, Any]
TITLE = "## Review by a person"
SECTION = re.compile(rf"\n*{TITLE}\n.*?(?=\n## |\Z)", re.S)


def update_card(
    folder: Path, rows: Sequence[Row], rejected: Sequence[Row], review: Mapping[str, int], held_out: int
) -> None:
    """Write the counts of the review and of the rows that are left into prepare.json and the data card, where the set
    has them. A card that `npedit prepare` wrote is written anew; of any other one the section of the review.

    Raises:
        UserError: a file cannot be written.
    """
    facts = _read_facts(folder)
    new = facts | _count(facts, rows, rejected, held_out) | {"review": dict(review)}
    card = _read_text(folder / CARD)
    if facts:
        write_text(folder / FACTS, json.dumps(new, indent=1, ensure_ascii=False) + "\n")
    if card:
        write_text(folder / CARD, _rewrite(card, facts, new))


def _read_facts(folder: Path) -> Row:
    try:
        return read_json_object(folder / FACTS)
    except ValueError:
        return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _count(facts: Mapping[str, Any], rows: Sequence[Row], rejected: Sequence[Row], held_out: int) -> Row:
    """The facts that change. {} for a set whose counts are not those of its rows: `npedit caption` copied them."""
    if "counts" not in facts or "captions" in facts:
        return {}
    made = [
        {**row, "photo": row["file_name"], "asked_type": row.get("asked_type", row.get("edit_type"))} for row in rows
    ]
    photos = list({row["file_name"]: row for row in rows}.values())
    values = {"licences": count_values(photos, "licence"), "sources": count_values(photos, "source")}
    return {"counts": count_rows(made, rejected), "held_out": held_out, **values}


def _rewrite(card: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    section = review_section(new["review"])
    plain = SECTION.sub("", card).rstrip()
    if "counts" in new and "captions" not in new and plain == _written(old).rstrip():
        plain = _written(new).rstrip()
    return f"{plain}\n\n{section}"


def _written(facts: Mapping[str, Any]) -> str:
    """The card that `npedit prepare` writes for these facts; "" where they lack something."""
    try:
        return write_card(facts)
    except (KeyError, TypeError):
        return ""


def review_section(review: Mapping[str, int]) -> str:
    """The card's section about the review."""
    kept = review["rows"] - review["rejected"]
    return (
        f"{TITLE}\n\nA person has read {review['seen']} of {review['rows']} rows (`npedit review`): "
        f"{review['accepted']} accepted, {review['mended']} mended, {review['rejected']} rejected. {kept} rows are "
        "in the set; `review.jsonl` lists the decisions.\n"
    )
