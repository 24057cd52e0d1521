"""ImgEdit-Bench, its Basic part (arXiv 2505.20275): 737 edits of nine types, three criteria from 1 to 5 each.

Scores: `S1` is about the instruction, `S2` and `S3` are about visual quality and detail, as defined by the edit type's
text (for a style: content and rendering; for an action: identity and body). `O` (overall) is the mean of the three. A
headline is the mean of the nine types' means (macro), as in the benchmark's tables; `_micro` is the mean over items.
The official files round each mean to two decimals; npedit rounds nothing.

The data are the official JSON file ({key: {"id": picture, "prompt", "edit_type"}}) and the pictures in the same folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npedit.benchmarks._answers import parse_scores
from npedit.benchmarks._headlines import Row, ScoreScale, summarise_score
from npedit.benchmarks._scorer import Item, SourceImage, set_score
from npedit.errors import UserError, explain_write_errors
from npedit.judges.base import NOT_IN_FILE, OK, PARSE_ERROR
from npedit.runs.checkpoint import write_text

TASKS = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
ALIASES = {"alter": "adjust", "hybrid": "compose"}  # other names in official files
FILES = ("basic_edit.json", "singleturn.json")
SIZE = 737
SCORES = ("S1", "S2", "S3")
SCALE, QUESTIONS = (1, 5), 1  # required of a protocol for this benchmark


def read_items(data: Path, pictures: Path) -> list[Item]:
    """The benchmark's items. `data` is the JSON file, or the folder with this file and the pictures. `pictures` is the
    folder of edited pictures, {key}.png.

    Raises:
        UserError: the file or a picture is missing, or an entry has another form.
    """
    file = next((data / n for n in FILES if (data / n).is_file()), data)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        raw = [(key, e["id"], e["prompt"], ALIASES.get(e["edit_type"], e["edit_type"])) for key, e in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected {' or '.join(FILES)} of ImgEdit-Bench, {{key: {{id, prompt, edit_type}}}}; got {data}, where "
            f"{error!r}; unpack Benchmark.tar of the Hub's sysuyy/ImgEdit and give its folder singleturn"
        ) from None
    found, absent = [], []
    for key, name, prompt, task in raw:
        if task not in TASKS:
            raise UserError(
                f"expected an edit type among {', '.join(TASKS)} in {file}; got {task!r} for {key}; fetch it again"
            )
        path = file.parent / name
        absent += [] if path.is_file() else [name]
        found.append(
            Item(
                f"imgedit/{task}/{key}", task, task, prompt, SourceImage(path, f"{task}/{key}"), pictures / f"{key}.png"
            )
        )
    if absent or not found:
        raise UserError(
            f"expected the source pictures in the folder of {file}; {len(absent)} are missing, such as {absent[:3]}; "
            "unpack the benchmark again"
        )
    return sorted(found, key=lambda i: TASKS.index(i.task))


def missing_items_message(found: Sequence[Item]) -> str:
    """A message about items that the data lack, compared with the official benchmark; "" if none are missing."""
    if len(found) == SIZE and len({i.task for i in found}) == len(TASKS):
        return ""
    return f"expected {SIZE} items of {len(TASKS)} types; the data hold {len(found)} of {len({i.task for i in found})}"


# ------------------------------------------------------------------------------------------------------------ scores


def combine_numbers(numbers: Sequence[float]) -> float:
    """The overall score of a pass: the mean of the three numbers."""
    return sum(numbers) / len(numbers)


def add_overall_score(row: Row, overall: str) -> Row:
    """The row with three scores, each the mean of a criterion over the passes, and the overall score, in place of the
    question's single score."""
    (name,) = row["scores"]
    total, passes = row["scores"].pop(name), row["numbers"][name]
    why = row["why"].pop(name, OK)
    for score, values in zip(SCORES, zip(*passes) if total is not None else [()] * 3):
        set_score(row, score, sum(values) / len(values) if values else None, why)
    set_score(row, overall, total, why)
    return row


def summarise(
    rows: Sequence[Row], found: Sequence[Item], min_coverage: float, protocol: str
) -> dict[str, dict[str, Any]]:
    """Headline "PROTOCOL/SCORE" and "..._micro" -> figures. `found` are all items of the benchmark, judged or not.
    `min_coverage` is the coverage, a share in [0, 1], that a headline needs."""
    scale = ScoreScale(*SCALE, min_coverage)
    groups = dict.fromkeys(TASKS, 0) | Counter(i.task for i in found)
    out = {}
    for name in rows[0]["scores"] if rows else ():
        out[f"{protocol}/{name}"] = summarise_score(rows, name, groups, scale)
        out[f"{protocol}/{name}_micro"] = summarise_score(rows, name, groups, scale, micro=True)
    return out


# --------------------------------------------------------------------------------------------------- official layout


def write_official_files(rows: Sequence[Row], found: Sequence[Item], folder: Path, judge: str) -> list[Path]:
    """Write the files of the official scripts: result.json (answers as lines "S1: 4", only for items with integer
    scores, because those scripts read integers alone), average_score.json and typescore.json, whose means are rounded
    to two decimals. This layout has no place for the judge's name."""
    keys = {i.id: i.edited.stem for i in found}
    answers, means = {}, {}
    for row in rows:
        values = row["scores"]
        if None not in values.values():
            means[keys[row["id"]]] = round(values["O"], 2)
            if all(values[s] == int(values[s]) for s in SCORES):
                answers[keys[row["id"]]] = "\n".join(f"{s}: {int(values[s])}" for s in SCORES)
    by_task: dict[str, list[float]] = {}
    for item in found:
        if item.edited.stem in means:
            by_task.setdefault(item.task, []).append(means[item.edited.stem])
    kinds = {task: round(sum(v) / len(v), 2) for task, v in by_task.items()}
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in (("result", answers), ("average_score", means), ("typescore", kinds)):
        written.append(folder / f"{name}.json")
        write_text(written[-1], json.dumps(content, indent=2) + "\n")
    return written


def read_official_scores(result: Path, found: Sequence[Item]) -> list[Row]:
    """Rows from a result.json of the official scripts: {key: answer}. An answer is missing if it is not a text with
    three lines "criterion: number".

    Raises:
        UserError: there is no such file, or a key belongs to no item.
    """
    try:
        answers = json.loads(result.read_text(encoding="utf-8"))
        unknown = sorted(set(answers) - {i.edited.stem for i in found})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"expected the official result.json; got {result}, where {error!r}; check it") from None
    if unknown:
        raise UserError(f"expected keys of the data in {result}; got {unknown[:3]}; give the file of these data")
    rows = []
    for item in found:
        answer = answers.get(item.edited.stem, "")
        outcome, numbers = parse_scores("lines", answer, 3, *SCALE) if isinstance(answer, str) else (PARSE_ERROR, ())
        why = outcome if item.edited.stem in answers else NOT_IN_FILE
        row: Row = {
            "id": item.id,
            "task": item.task,
            "scores": {},
            "why": {},
            "numbers": {"S": [list(numbers)] if numbers else []},
        }
        set_score(row, "S", combine_numbers(numbers) if outcome == OK else None, why)
        rows.append(add_overall_score(row, "O"))
    return rows
