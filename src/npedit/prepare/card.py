"""The data card of a prepared set: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from npedit.scoring.tables import markdown_table

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(facts: Mapping[str, Any]) -> str:
    """The text of README.md, from the facts of prepare.json."""
    counts = facts["counts"]
    size = next((name for most, name in SIZES if counts["rows"] < most), "1M<n<10M")
    head = {"task_categories": ["image-to-image"], "size_categories": [size], "tags": ["image-editing", "npedit"]}
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n",
        "# Photos with edit instructions\n",
        f"{counts['rows']} edits of {counts['photos_with_rows']} photos. There are no edited images: each row has a "
        "photo, an instruction, and a caption of the wanted result. `npedit prepare` wrote the texts with the models "
        f"below.{'' if facts.get('review') else ' No person has read them.'}\n",
        _table("Edits by type", ("type", "wanted share", "rows", "share"), _type_rows(facts)),
        _table("Models", ("pass", "model", "prompt version", "prompt sha256"), _model_rows(facts)),
        _rejected_text(counts),
        _table("Rejected by reason", ("pass and reason", "edits"), list(counts["reasons"].items())),
        _photo_text(facts),
        _table("Licences of the photos", ("licence", "photos"), list(facts["licences"].items())),
        _table("Sources of the photos", ("source", "photos"), list(facts["sources"].items())),
        _column_text(),
    ]
    return "\n".join(part for part in parts if part)


def count_values(photos: Sequence[Mapping[str, Any]], name: str, most: int = 30) -> dict[str, int]:
    """How many photos have each value of a column, the most frequent first; "not stated" for an empty one. {} if no
    photo has a value."""
    found = Counter(photo.get(name) or "not stated" for photo in photos)
    return dict(found.most_common(most)) if set(found) - {"not stated"} else {}


def _type_rows(facts: Mapping[str, Any]) -> list[Sequence[Any]]:
    counts = facts["counts"]
    total = max(1, counts["rows"])
    by_type = counts["rows_by_type"]
    return [
        (kind, f"{share:.3f}", by_type.get(kind, 0), f"{by_type.get(kind, 0) / total:.3f}")
        for kind, share in facts["shares"].items()
    ]


def _model_rows(facts: Mapping[str, Any]) -> list[Sequence[Any]]:
    models = {"look": facts["writer"], "write": facts["writer"], "verify": facts["verifier"]}
    return [
        (name, model["name"], facts["prompts"][name]["version"], facts["prompts"][name]["sha256"][:12])
        for name, model in models.items()
        if model
    ]


def _rejected_text(counts: Mapping[str, Any]) -> str:
    return (
        f"{counts['rejected']} proposed edits were rejected, {counts['rejected_share']:.1%} of those proposed; "
        f"`rejected.jsonl` lists them with the reasons. The writer did not offer {counts['not_offered']} edits that it "
        "was asked for.\n"
    )


def _photo_text(facts: Mapping[str, Any]) -> str:
    photos = facts["photos"]
    return (
        f"{photos['found']} photos were found; {photos['bad']} could not be used (`bad_photos.jsonl`); "
        f"{photos['duplicates']} near-duplicates of another photo "
        f"{'were left out' if facts['settings']['duplicates'] == 'one' else 'are in the set'}. "
        f"{facts['held_out']} rows are held out (`held_out.txt`); no near-duplicate of them is left for training. The "
        "photos are the original files, with their EXIF data (which may hold a place).\n"
    )


def _column_text() -> str:
    return (
        "## Columns\n\n`file_name`, `id`, `instruction`, `edit_type`, `object`, `source_caption`, `target_caption`, "
        "`questions` (Yes/No questions about the edited image with the wanted answers), `group` (near-duplicates share "
        "one), `original_name`; where known `licence`, `source`.\n"
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table under a heading; "" without rows."""
    if not rows:
        return ""
    return "\n".join([f"## {title}\n", *markdown_table(head, rows), ""])
