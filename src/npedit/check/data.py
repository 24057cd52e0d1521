"""The data section: photos, sizes, crops, edit types, texts, near-duplicates; rows of each edit type to look at."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from npedit.check.captions import CaptionAgreement, Texts, compare_captions
from npedit.check.findings import ReportPicture, Section
from npedit.check.grids import draw_grid
from npedit.check.near_duplicates import HashedPhoto, find_near_duplicates, hash_photo
from npedit.check.scenes import report_scenes
from npedit.check.subject import Size, Subject
from npedit.data import Example
from npedit.data._photos import BadImage, crop_and_scale, read_photo, read_photo_size, to_pil
from npedit.questions import IDENTITY_EDIT

OBJECT_TYPES = frozenset(("add", "remove", "replace", "recolour", "pattern", "material", "move", "resize", "shape"))
FEW_ROWS = 5  # of an edit type
REPEATED_FATAL, REPEATED_WARNING = 0.5, 0.05  # share of target captions that repeat the source's
AGAINST_FATAL, AGAINST_WARNING = 0.6, 0.3  # share of captions that contradict their instruction
OWN_FATAL, OWN_WARNING = 0.6, 0.7  # `CaptionAgreement.own`
MOST_HASHED = 4000  # photos whose near-duplicates are looked for
SHOWN_PER_TYPE, SHOWN_PAIRS, SHOWN_IDS = 6, 8, 5
PHOTO_FILES = 500  # photo files whose sizes are read


def check_data(subject: Subject) -> Section:
    """The data section of the report."""
    section = Section("data", "Data")
    rows = read_texts(subject)
    _report_photos(section, subject)
    _report_crops(section, subject.data)
    _report_ids(section, subject.data)
    _report_types(section, rows)
    _report_objects(section, rows)
    needs_target = _needs_target_caption(subject)
    _report_captions(section, compare_captions(rows, subject.recipe.seed), needs_target)
    _report_cut_texts(section, subject, rows)
    _report_near_duplicates(section, subject)
    report_scenes(section, subject.examples)
    _show_rows(section, subject.examples)
    return section


def read_texts(subject: Subject) -> Sequence[Texts]:
    """The texts of at most `options.rows` rows, spread evenly over the data; of the decoded examples where the source
    has no rows."""
    rows = getattr(subject.data, "rows", None)
    if rows is None:
        return subject.examples
    stride = max(1, math.ceil(len(rows) / subject.options.rows))
    return [rows[i] for i in range(0, len(rows), stride)]


def _needs_target_caption(subject: Subject) -> bool:
    stage = subject.editing_stage
    return stage is not None and getattr(stage.settings, "dmd_weight", 0) > 0


# ----------------------------------------------------------------------------------------------------- photos, sizes


def _report_photos(section: Section, subject: Subject) -> None:
    examples, bad = subject.examples, subject.data.bad_rows
    count = len(subject.data)
    total = "no end of rows" if count > 10**12 else f"{count} rows"
    if bad:
        first = "; ".join(f"{row['file']}: {row['reason']}" for row in bad[:3])
        section.add(
            "bad-rows", "warning", f"{len(bad)} photos cannot be used ({first}); {total} are left.",
            "Training replaces them by other rows.", "Correct or delete these rows.",
        )  # fmt: skip
    section.add("photos", "ok", f"{total}; {len(examples)} were decoded as training will see them.")
    sizes = Counter((e.reference.shape[-2], e.reference.shape[-1]) for e in examples)
    rows = [(f"{w}x{h}", sizes[h, w], sizes[h, w] / len(examples)) for h, w in sorted(sizes)]
    section.add_table("Picture sizes (width x height) of the decoded examples", ("size", "examples", "share"), rows)
    flat = [e.id for e in examples if float(e.reference.std()) < 0.01]
    if flat:
        section.add(
            "flat-photos", "warning", f"{len(flat)} of {len(examples)} decoded photos have one colour only, such as "
            f"{', '.join(flat[:SHOWN_IDS])}.", "Nothing can be edited in them.", "Look at them in the grid; remove "
            "them.",
        )  # fmt: skip


def _report_crops(section: Section, data: Any) -> None:
    """How much of each photo its crop keeps, and how much it is enlarged; for sources whose photos are files."""
    rows = _rows_with_files(data)
    if not rows:
        return
    found: dict[Size, list[tuple[float, float]]] = defaultdict(list)
    for i in range(0, len(rows), max(1, math.ceil(len(rows) / PHOTO_FILES))):
        try:
            photo = read_photo_size(rows[i].photo_path())
        except (BadImage, OSError):
            continue  # `bad_rows` has it
        size = nearest_size(photo, data.sizes)
        found[size].append(crop_and_scale(photo, size))
    table = [
        (f"{w}x{h}", len(values), sum(k for k, _ in values) / len(values), max(s for _, s in values))
        for (h, w), values in sorted(found.items())
    ]
    section.add_table("Crops", ("training size", "photos", "mean share kept by the crop", "largest enlargement"), table)
    crops = [crop for values in found.values() for crop in values]
    if not crops:
        return
    cut, enlarged = sum(k < 0.6 for k, _ in crops), sum(s > 1.5 for _, s in crops)
    if cut > 0.2 * len(crops):
        section.add(
            "crops", "warning", f"{cut} of {len(crops)} photos lose more than 40 % of their area to the crop.",
            "What the instruction and the captions name may be cut off.", "Add sizes of these shapes to data.sizes.",
        )  # fmt: skip
    if enlarged > 0.2 * len(crops):
        section.add(
            "enlarged", "warning", f"{enlarged} of {len(crops)} photos are enlarged more than 1.5 times.",
            "The editor learns to return blurred pictures.", "Use smaller data.sizes, or larger photos.",
        )  # fmt: skip
    if cut <= 0.2 * len(crops) and enlarged <= 0.2 * len(crops):
        section.add("crops", "ok", f"{len(crops)} photos fit the training sizes.")


def _report_ids(section: Section, data: Any) -> None:
    """Ids that several rows have, for sources whose rows are known."""
    rows: Any = getattr(data, "rows", None)
    if not hasattr(rows, "values"):
        return
    counts = Counter(key for (key,) in rows.values("id"))
    if repeated := [key for key, n in counts.items() if n > 1]:
        section.add(
            "duplicate-ids", "warning", f"{len(repeated)} ids belong to several rows: {_some(repeated)}.",
            "An id in a file for data.held_out holds out all rows that have this id, and logs name rows by their ids.",
            "Give each row an id of its own, or leave the column 'id' out.",
        )  # fmt: skip


def _rows_with_files(data: Any) -> Sequence[Any]:
    """The rows of a data source whose photos are files of their own; empty for any other source."""
    rows: Sequence[Any] = getattr(data, "rows", ())
    has_files = len(rows) and hasattr(rows[0], "photo_path") and getattr(rows[0], "offset", -1) < 0
    return rows if has_files else ()


def nearest_size(photo: Size, sizes: Sequence[Size]) -> Size:
    """The training size whose aspect ratio is nearest to the photo's; all are (H, W)."""
    aspect = math.log(photo[1] / photo[0])
    return min(sizes, key=lambda s: abs(math.log(s[1] / s[0]) - aspect))


# ------------------------------------------------------------------------------------------------------------- texts


def _report_types(section: Section, rows: Sequence[Texts]) -> None:
    counts = Counter(row.edit_type for row in rows)
    with_object = Counter(row.edit_type for row in rows if row.object)
    table = [(kind, n, n / len(rows), with_object[kind] / n) for kind, n in counts.most_common()]
    section.add_table("Edit types", ("edit type", "rows", "share", "share with an object"), table)
    few = [kind for kind, n in counts.items() if n < FEW_ROWS and kind != IDENTITY_EDIT and len(rows) > 20 * FEW_ROWS]
    if few:
        section.add(
            "few-rows", "warning", f"Fewer than {FEW_ROWS} of {len(rows)} rows have the edit types {', '.join(few)}.",
            "The editor will hardly learn these types.", "Add rows of these types, or leave the types out.",
        )  # fmt: skip
    else:
        section.add("types", "ok", f"{len(counts)} edit types in {len(rows)} rows.")


def _report_objects(section: Section, rows: Sequence[Texts]) -> None:
    counts = Counter(row.edit_type for row in rows if row.edit_type in OBJECT_TYPES)
    named = Counter(row.edit_type for row in rows if row.object)
    without = [kind for kind, n in counts.items() if not named[kind] and n >= FEW_ROWS]
    if without:
        section.add(
            "no-objects", "warning", f"No row of the edit types {', '.join(without)} names its object.",
            "Whether the critic sees the objects, and whether the teacher can draw them, cannot be checked for these "
            "types.", "Fill the column 'object' with the name of what the edit is about.",
        )  # fmt: skip
    elif counts:
        section.add("objects", "ok", "Each edit type that is about an object has rows that name it.")


def _report_captions(section: Section, found: CaptionAgreement, is_needed: bool) -> None:
    if not found.compared:
        section.add(
            "captions-not-compared", "warning" if is_needed else "note",
            "No row has both a source caption and a target caption.",
            "Whether target captions describe the edit cannot be checked.", "Fill the column 'source_caption'.",
        )  # fmt: skip
        return
    _report_repeated(section, found, is_needed)
    _report_direction(section, found, is_needed)
    _report_shuffled(section, found, is_needed)


def _report_repeated(section: Section, found: CaptionAgreement, is_needed: bool) -> None:
    share = len(found.repeated) / found.compared
    fact = f"{len(found.repeated)} of {found.compared} target captions repeat the source caption."
    if share <= REPEATED_WARNING:
        section.add("captions-repeat", "ok", fact)
        return
    section.add(
        "captions-repeat", "will not learn" if share > REPEATED_FATAL and is_needed else "warning",
        f"{fact} Rows: {_some(found.repeated)}.",
        "Distribution matching pulls each edited image towards its target caption. A caption that repeats the source's "
        "pulls it back to the unedited photo.",
        "Write target captions that describe the wanted result.",
    )  # fmt: skip


def _report_direction(section: Section, found: CaptionAgreement, is_needed: bool) -> None:
    share = len(found.against) / max(1, found.directed)
    fact = f"The captions of {len(found.against)} of {found.directed} rows change against their instruction."
    if share <= AGAINST_WARNING or found.directed < 10:
        section.add("captions-against", "ok", fact)
        return
    section.add(
        "captions-against", "will not learn" if share > AGAINST_FATAL and is_needed else "warning",
        f"{fact} Rows: {_some(found.against)}.",
        "What the instruction asks to add is in the source caption and not in the target caption, or what it asks to "
        "remove is the other way round. Critic and distribution matching pull in opposite directions.",
        "Are source_caption and target_caption exchanged? Compare the rows, and set data.columns.",
    )  # fmt: skip


def _report_shuffled(section: Section, found: CaptionAgreement, is_needed: bool) -> None:
    if found.own is None:
        section.add("captions-own", "ok", "Too few rows with words to compare captions between rows.")
        return
    fact = (
        f"A target caption shares more words with its own row than with another row with probability {found.own:.2f} "
        "(0.5 is chance)."
    )
    if found.own > OWN_WARNING:
        section.add("captions-own", "ok", fact)
        return
    section.add(
        "captions-own", "will not learn" if found.own < OWN_FATAL and is_needed else "warning", fact,
        "The target captions seem to belong to other rows. The teacher then pulls each edit towards another picture.",
        "Compare some rows in the grid; a join of two tables may have mixed the rows up.",
    )  # fmt: skip


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")


def _report_cut_texts(section: Section, subject: Subject, rows: Sequence[Texts]) -> None:
    family, cut = subject.parts.family, dict[str, str]()
    for row in rows:
        ends = family.truncated_part([row.instruction, row.source_caption, row.target_caption])
        longest = max(ends, key=len)
        if longest:
            cut[row.id] = longest
    if not cut:
        section.add("text-cut", "ok", f"The text encoder reads all texts of {len(rows)} rows to their end.")
        return
    worst = max(cut, key=lambda key: len(cut[key]))
    section.add(
        "text-cut", "warning", f"The text encoder cuts texts of {len(cut)} of {len(rows)} rows. The worst is row "
        f"{worst}, of which this is lost: {cut[worst][:80]!r}.", "What is cut off is not seen in training.",
        "Shorten these texts; put what matters first.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- near-duplicates


def _report_near_duplicates(section: Section, subject: Subject) -> None:
    held_out, training, is_complete = _photos_to_compare(subject)
    if not held_out:
        section.add("near-duplicates", "ok", "No rows are held out, so there are no near-duplicates of them.")
        return
    pairs = find_near_duplicates(held_out, training)
    fact = f"{len(pairs)} of {len(held_out)} held-out photos are nearly the same as a photo of training"
    fact += "." if is_complete else f" ({len(training)} photos of training were compared)."
    if not pairs:
        section.add("near-duplicates", "ok", fact)
        return
    names = "; ".join(f"{a.name} and {b.name}" for a, b in pairs[:SHOWN_IDS])
    section.add(
        "near-duplicates", "warning", f"{fact} {names}.",
        "Scores on held-out rows will be better than on new photos.",
        "Give near-duplicates the same side: list ids in a file for data.held_out, or remove one of each pair.",
    )  # fmt: skip
    shown = [[(p.name, torch.from_numpy(p.thumbnail).permute(2, 0, 1)) for p in pair] for pair in pairs[:SHOWN_PAIRS]]
    section.pictures.append(ReportPicture("Held-out photos (left) and their near-duplicates", draw_grid(shown)))


def _photos_to_compare(subject: Subject) -> tuple[list[HashedPhoto], list[HashedPhoto], bool]:
    """(held-out photos, training photos, whether these are all)."""
    data = subject.data
    rows = _rows_with_files(data)
    if not rows:
        batches = data.held_out_batches(MOST_HASHED)
        held_out = [hash_photo(key, to_pil(image)) for b in batches for key, image in zip(b.ids, b.references)]
        training = [hash_photo(e.id, to_pil(e.reference)) for e in subject.examples] if held_out else []
        return held_out, training, False
    numbers = [int(number) for number in data.inventory()["held_out"]]
    chosen = set(numbers)
    others = [i for i in range(len(rows)) if i not in chosen] if numbers else []
    stride = max(1, math.ceil(len(others) / MOST_HASHED))
    held_out = _hash_files([rows[i] for i in numbers[:MOST_HASHED]])
    return held_out, _hash_files([rows[i] for i in others[::stride]]), stride == 1


def _hash_files(rows: Sequence[Any]) -> list[HashedPhoto]:
    """The photos of rows, each file once; those that cannot be read are left out."""
    found: dict[str, HashedPhoto] = {}
    for row in rows:
        name = str(row.photo)
        if name not in found:
            try:
                found[name] = hash_photo(name, read_photo(row.photo_path()))
            except (BadImage, OSError):
                continue
    return list(found.values())


def _show_rows(section: Section, examples: Sequence[Example]) -> None:
    by_type: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_type[example.edit_type].append(example)
    for kind, members in sorted(by_type.items()):
        shown = [(e.instruction, e.reference) for e in members[:SHOWN_PER_TYPE]]
        section.pictures.append(ReportPicture(f"{kind}: photos and instructions", draw_grid([shown])))
        texts = [f"{e.instruction}\n  before: {e.source_caption or '-'}\n  after:  {e.target_caption or '-'}"
                 for e in members[:SHOWN_PER_TYPE]]  # fmt: skip
        section.texts.append((f"{kind}: texts", "\n".join(texts)))
