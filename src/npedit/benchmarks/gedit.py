"""GEdit-Bench v1 (arXiv 2504.17761): real users' edits of photos, 606 in English and 606 in Chinese, of eleven tasks.

Each score is from 0 to 10. `SC` (semantic consistency): was the edit carried out, and nothing else changed? `PQ`
(perceptual quality): is the result free of faults? `O` (overall): the square root of SC times PQ of an item. SC and PQ
are the minimum of two numbers that the judge gives. A headline is the mean of the eleven tasks' means (macro), as in
the official code. The mean over items (`_micro`) differs, because tasks have 40 to 99 items. With a protocol that
scores from logits the names end in `_logit`.

An item is identified by (task, language, key), because keys alone are not unique. The language is the value of the
column: some English instructions contain Chinese characters. The data are parquet files with the columns of the Hub's
stepfun-ai/GEdit-Bench.

Deviations from the official code: unreadable answers and missing pictures are recorded as missing, counted and shown.
If a task has no scores, there is no headline.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npedit.benchmarks._headlines import Row, ScoreScale, summarise_score
from npedit.benchmarks._outputs import has_cache_key, save_png
from npedit.benchmarks._scorer import Item, SourceImage, set_score
from npedit.errors import UserError, explain_write_errors
from npedit.judges.base import NOT_IN_FILE, OK
from npedit.judges.cache import answer_cache_key

TASKS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add",
    "subject-remove", "subject-replace", "text_change", "tone_transfer",
)  # fmt: skip
LANGUAGES = {"en": "en", "cn": "cn", "zh": "cn"}  # command-line value -> column value
SIZE = 606  # number of items in one language
SCALE, QUESTIONS = (0, 10), 2  # required of a protocol for this benchmark
COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist")
combine_numbers = min  # a question's numbers -> its score


def read_items(data: Path, languages: Sequence[str], pictures: Path) -> list[Item]:
    """The benchmark's items in these languages ("en", "cn"), with the tasks in the official order. `data` is a parquet
    file or a folder of parquet files. `pictures` is the folder of edited pictures in the official layout.

    Raises:
        UserError: no such files, a column is missing, an unknown task, or two rows for one item.
    """
    found: dict[str, Item] = {}
    for row in _read_parquet_rows(data):
        task, language, key = row["task_type"], row["instruction_language"], row["key"]
        if language not in languages:
            continue
        if task not in TASKS:
            raise UserError(f"expected a task of GEdit-Bench in {data}; got {task!r}; check that it is this data set")
        name = f"gedit/{language}/{task}/{key}"
        if name in found:
            raise UserError(f"expected one row an item in {data}; got two for {name}; remove one of the files")
        more = {"language": language, "intersection": bool(row["Intersection_exist"])}
        source = SourceImage((row["input_image"] or {}).get("bytes") or b"", name)
        edited = edited_path(pictures, task, language, key)
        found[name] = Item(name, f"{language}/{task}", task, row["instruction"], source, edited, more)
    if not found:
        raise UserError(f"expected items in {' or '.join(languages)} in {data}; got none; check --data and --language")
    return sorted(found.values(), key=lambda i: (i.more["language"] != "en", TASKS.index(i.kind)))


def _read_parquet_rows(data: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(data.rglob("*.parquet")) if data.is_dir() else [data]
    if not files or not all(f.is_file() for f in files):
        raise UserError(
            f"expected parquet files of GEdit-Bench; got {data}, which has none; fetch them: "
            "hf download stepfun-ai/GEdit-Bench --repo-type dataset --local-dir gedit"
        )
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            missing = [c for c in COLUMNS if c not in pq.read_schema(file).names]
            if missing:
                raise UserError(
                    f"expected the columns {', '.join(COLUMNS)} in {file}; got none of {missing}; fetch it again"
                )
            rows += pq.read_table(file, columns=list(COLUMNS)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"expected a parquet file; got {file}, where {error}; fetch it again") from None
    return rows


def missing_items_message(found: Sequence[Item]) -> str:
    """A message about items that the data lack, compared with the official benchmark; "" if none are missing."""
    sizes = Counter(i.more["language"] for i in found)
    tasks = {i.task for i in found}
    wrong = [f"{n} {lang}" for lang, n in sizes.items() if n != SIZE]
    if not wrong and len(tasks) == len(TASKS) * len(sizes):
        return ""
    return f"expected {SIZE} items of {len(TASKS)} tasks a language; the data hold {', '.join(wrong) or 'other tasks'}"


# ------------------------------------------------------------------------------------------------------------ scores


def add_overall_score(row: Row, overall: str) -> Row:
    """The row with the overall score: the square root of the product of the two other scores."""
    consistency, quality = row["scores"]
    values = row["scores"][consistency], row["scores"][quality]
    why = next((row["why"][n] for n in (consistency, quality) if n in row["why"]), OK)
    set_score(row, overall, None if None in values else math.sqrt(values[0] * values[1]), why)
    return row


def summarise(
    rows: Sequence[Row], found: Sequence[Item], min_coverage: float, protocol: str
) -> dict[str, dict[str, Any]]:
    """Headline "PROTOCOL/LANGUAGE/SET/SCORE" and "..._micro" -> figures. SET is full or intersection. LANGUAGE is en,
    cn or both, where a task's mean is over both languages. `found` are all items of the benchmark, judged or not.
    `min_coverage` is the coverage, a share in [0, 1], that a headline needs."""
    scale = ScoreScale(*SCALE, min_coverage)
    languages = sorted({i.more["language"] for i in found}, key=lambda x: x != "en")
    chosen = {lang: (lang,) for lang in languages} | ({"both": tuple(languages)} if len(languages) > 1 else {})
    out = {}
    for language, members in chosen.items():
        for subset in ("full", "intersection"):
            fits = [i for i in found if i.more["language"] in members and (subset == "full" or i.more["intersection"])]
            wanted = {i.id for i in fits}
            part = [{**r, "task": r["task"].split("/")[1]} for r in rows if r["id"] in wanted]
            groups = dict.fromkeys(TASKS, 0) | Counter(i.kind for i in fits)
            for name in rows[0]["scores"] if rows else ():
                place = f"{protocol}/{language}/{subset}/{name}"
                out[place] = summarise_score(part, name, groups, scale)
                out[f"{place}_micro"] = summarise_score(part, name, groups, scale, micro=True)
    return out


# --------------------------------------------------------------------------------------------------- official layout


def edited_path(folder: Path, task: str, language: str, key: str) -> Path:
    """The path of an edited picture in the official layout. `folder` is {save_path}/{model}, or fullset/ in there."""
    inside = folder if folder.name == "fullset" else folder / "fullset"
    return inside / task / language / f"{key}.png"


def source_path(edited: Path) -> Path:
    """The path of an edited picture's source in the official layout."""
    return edited.with_name(f"{edited.stem}_SRCIMG.png")


def write_official_files(rows: Sequence[Row], found: Sequence[Item], folder: Path, judge: str) -> list[Path]:
    """Write {folder}/{judge}/eval_results_new/{folder's name}_{task}_gpt_score.csv and the combined one, as the
    official statistics read them. As in the official code, an item without both scores has no line. The sources of
    edited pictures in `folder` are written next to these pictures."""
    for item in found:
        path = source_path(item.edited)
        if (
            item.edited.is_relative_to(folder)
            and item.edited.is_file()
            and not has_cache_key(path, answer_cache_key([item.source()]))
        ):
            save_png(item.source(), path, answer_cache_key([item.source()]))
    by_id = {i.id: i for i in found}
    place = folder / judge / "eval_results_new"
    lines: dict[str, list[list[Any]]] = {}
    for row in rows:
        consistency, quality, _ = row["scores"].values()
        if None not in (consistency, quality):
            item = by_id[row["id"]]
            names = [str(source_path(item.edited)), str(item.edited), item.instruction]
            flags = [item.more["intersection"], item.more["language"]]
            lines.setdefault(item.kind, []).append([*names, consistency, quality, *flags])
    tables = {task: lines[task] for task in TASKS if task in lines}
    tables["combined"] = [line for group in tables.values() for line in group]
    written = []
    with explain_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        for task, group in tables.items():
            written.append(place / f"{folder.name}_{task}_gpt_score.csv")
            with open(written[-1], "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([CSV_COLUMNS, *group])
    return written


CSV_COLUMNS = (
    "source_image", "edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist",
    "instruction_language",
)  # fmt: skip


def read_official_scores(csv_file: Path, found: Sequence[Item]) -> list[Row]:
    """Rows from a combined CSV file of the official scripts. An item without a line is missing. The numbers can include
    random guesses of the official code, which look like answers.

    Raises:
        UserError: there is no such file, a column is missing, a number is not valid, or a line belongs to no item or
            to an item that has a line already.
    """
    by_place = {(i.kind, i.more["language"], i.edited.stem): i for i in found}
    scores: dict[str, tuple[float, float]] = {}
    try:
        with open(csv_file, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                task, language, name = Path(line["edited_image"]).parts[-3:]
                item = by_place.get((task, language, Path(name).stem))
                if item is None and LANGUAGES.get(language) in {i.more["language"] for i in found}:
                    raise UserError(
                        f"expected items of the data in {csv_file}; got {task}/{language}/{name}; "
                        "give the data that was scored"
                    )
                if item is not None and item.id in scores:
                    raise UserError(f"expected one line an item in {csv_file}; got two for {item.id}; remove one")
                if item is not None:
                    scores[item.id] = float(line["sementics_score"]), float(line["quality_score"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"expected the official combined CSV; got {csv_file}, where {error!r}; check it") from None
    bad = [k for k, v in scores.items() if not all(0 <= x <= 10 for x in v)]
    if bad:
        raise UserError(f"expected scores from 0 to 10 in {csv_file}; got others for {bad[:3]}; correct them")
    rows = []
    for item in found:
        row: Row = {"id": item.id, "task": item.task, **item.more, "scores": {}, "why": {}, "numbers": {}}
        for name, value in zip(("SC", "PQ"), scores.get(item.id, (None, None))):
            set_score(row, name, value, NOT_IN_FILE)
        rows.append(add_overall_score(row, "O"))
    return rows
