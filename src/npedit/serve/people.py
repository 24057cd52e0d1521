"""People compare the results of two editors without knowing which is which.

Each rater sees all items in an order of their own, and in half of them the first editor's result on the left. Order and
sides depend on the seed, the rater's name and the ids alone, so a rater can stop and go on. Answers are kept in a file
that is only ever added to; the last answer of a rater about an item counts:

    {"rater", "id", "left": editor, "right": editor, "answer": "left", "right" or "tie", "preferred": editor or null,
     "number": place in the rater's order from 1, "seed", "time", "digest": of the item and both results}

An answer counts only for the results that it was given about: those with its digest.
"""

from __future__ import annotations

import fcntl
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npedit.errors import UserError, explain_write_errors
from npedit.runs.files import append_row, fsync_rows, read_rows
from npedit.scoring import human_agreement, statistics
from npedit.scoring.results import Results, common_scores, lower_is_better
from npedit.serve.people_pairs import Pair, is_readable

LEFT, RIGHT, TIE = "left", "right", "tie"
ANSWERS = (LEFT, RIGHT, TIE)
LONGEST_NAME = 60  # characters of a rater's name
Row = dict[str, Any]


@dataclass(frozen=True)
class Presentation:
    """An item as a rater sees it. With `swapped` the second editor's result is on the left."""

    pair: Pair
    swapped: bool
    number: int


def rater_order(pairs: Sequence[Pair], rater: str, seed: int) -> list[Presentation]:
    """The items in the order of a rater. Half of them are swapped; of an odd number one more or less, by chance."""
    rng = random.Random(f"{seed}/{rater}")
    shuffled = sorted(pairs, key=lambda pair: pair.id)
    rng.shuffle(shuffled)
    more = rng.randrange(2)
    swapped = [(k + more) % 2 == 1 for k in range(len(shuffled))]
    rng.shuffle(swapped)
    return [Presentation(pair, side, k) for k, (pair, side) in enumerate(zip(shuffled, swapped, strict=True), 1)]


def clean_name(name: str) -> str:
    """A rater's name, without space around it.

    Raises:
        UserError: it is empty, long, or not printable.
    """
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"expected a name of 1 to {LONGEST_NAME} letters; got {name[:LONGEST_NAME]!r}; write another")
    return name


@dataclass
class Comparison:
    """Two editors that people compare. `names` are those of the first and of the second editor; `file` is the file of
    answers. Threads may call all methods."""

    names: tuple[str, str]
    pairs: Sequence[Pair]
    file: Path
    seed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _orders: dict[str, list[Presentation]] = field(default_factory=dict)
    _answered: dict[str, set[str]] = field(default_factory=dict)
    ignored: int = 0  # answers in the file about other results of these editors

    def __post_init__(self) -> None:
        rows, self.ignored = answers_about(read_rows(self.file), self.pairs, self.names)
        for rater, id in preferences(rows, self.names):
            self._answered.setdefault(rater, set()).add(id)

    def order(self, rater: str) -> list[Presentation]:
        """The readable items in a rater's order."""
        with self._lock:
            if rater not in self._orders:
                self._orders[rater] = rater_order(self.pairs, rater, self.seed)
            return self._orders[rater]

    def done(self, rater: str) -> int:
        """How many of the items a rater has answered."""
        answered = self._answered.get(rater, set())
        return sum(shown.pair.id in answered for shown in self.order(rater))

    def next(self, rater: str) -> Presentation | None:
        """The first item that a rater has not answered; None at the end. Items with a broken picture are left out."""
        for shown in list(self.order(rater)):
            if shown.pair.id not in self._answered.get(rater, set()):
                if is_readable(shown.pair):
                    return shown
                self.order(rater).remove(shown)
        return None

    def before(self, rater: str, number: int | None) -> Presentation | None:
        """The item before number `number` in a rater's order, the last one for None; None at the beginning."""
        found = [shown for shown in self.order(rater) if number is None or shown.number < number]
        return found[-1] if found else None

    def record(self, rater: str, shown: Presentation, answer: str) -> None:
        """Keep an answer.

        Raises:
            UserError: it is none, or the file cannot be written.
        """
        if answer not in ANSWERS:
            raise UserError(f"expected one of {', '.join(ANSWERS)}; got {answer!r}")
        left, right = self.names[::-1] if shown.swapped else self.names
        preferred = {LEFT: left, RIGHT: right, TIE: None}[answer]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row: Row = {"rater": rater, "id": shown.pair.id, "left": left, "right": right, "answer": answer}
        row |= {"preferred": preferred, "number": shown.number, "seed": self.seed, "time": now}
        row["digest"] = shown.pair.digest(self.names)
        with self._lock:
            append_row(self.file, row)
            fsync_rows(self.file)
            self._answered.setdefault(rater, set()).add(shown.pair.id)


@contextmanager
def hold_answers(file: Path) -> Iterator[None]:
    """Inside the block no other process adds answers to a file. A line that a kill truncated is ended first.

    Raises:
        UserError: another process has the file, it holds something else, or it cannot be written.
    """
    if file.is_file() and file.stat().st_size and not is_answers(file):
        raise UserError(
            f"--answers: expected a new file, or one with people's answers; got {file}, which holds something else; "
            "name another file"
        )
    with explain_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = open(file, "ab+")  # noqa: SIM115
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"expected {file} to be free; another page adds answers to it; stop it first") from None
        except OSError:
            pass  # a file system without locks
        held.seek(0)
        data = held.read()
        if data and not data.endswith(b"\n"):
            held.write(b"\n")
        held.flush()
        yield


def is_answers(path: Path) -> bool:
    """Whether a file holds answers of people about two editors, and not scores of pictures. The first answer may be
    truncated."""
    try:
        with open(path, encoding="utf-8") as file:
            line = next((line for line in file if line.strip()), "")
    except (OSError, ValueError):
        return False
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith('{"rater": ')
    return isinstance(first, dict) and {"rater", "answer"} <= set(first)


def answers_about(rows: Sequence[Row], pairs: Sequence[Pair], names: tuple[str, str]) -> tuple[list[Row], int]:
    """(the answers that were given about these results, the number of answers about the same two editors that were
    not). An answer of an older npedit has no digest and is one of the latter."""
    mine = [row for row in rows if {row.get("left"), row.get("right")} == set(names)]
    answered = {row.get("id") for row in mine}
    digests = {pair.id: pair.digest(names) for pair in pairs if pair.id in answered}
    kept = [row for row in mine if row.get("digest") and row["digest"] == digests.get(str(row.get("id")))]
    return kept, len(mine) - len(kept)


# ----------------------------------------------------------------------------------------------------------- statistics


def preferences(rows: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> dict[tuple[str, str], float]:
    """(rater, item) -> 1 if the second editor is preferred, -1 the first, 0 a tie. The last answer counts; answers
    about other editors are left out."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if {row.get("left"), row.get("right")} == set(names) and row.get("answer") in ANSWERS:
            preferred = {LEFT: row["left"], RIGHT: row["right"]}.get(row["answer"])
            found[str(row.get("rater")), str(row.get("id"))] = (preferred == names[1]) - (preferred == names[0])
    return found


def summarise(results: Sequence[Results], rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """What people say of the second editor against the first.

    `win_rate` is the mean over items of (wins + ties / 2) / raters, with its 95 % interval: items are drawn within
    tasks, and all answers about an item go together. `p` is of a sign-flip test over items. `left_share` is how often
    the left result was preferred where one was; 0.5 without a habit. `agreement` says for each metric of the results
    how often it orders the two pictures as people do on average.

    Raises:
        UserError: nobody has answered about an item of the results.
    """
    names = (results[0].name, results[1].name)
    tasks = {row.id: row.task for row in results[0].rows}
    found = {key: value for key, value in preferences(rows, names).items() if key[1] in tasks}
    if not found:
        raise UserError(f"expected answers about {names[0]} and {names[1]}; got none; collect some first")
    by_item: dict[str, list[float]] = defaultdict(list)
    for (_, id), value in found.items():
        by_item[id].append(value)
    better = np.array([np.mean(values) for values in by_item.values()])
    kinds = [tasks[id] for id in by_item]
    values = list(found.values())
    return {
        "baseline": names[0], "editor": names[1], "items": len(by_item), "raters": len({rater for rater, _ in found}),
        "answers": len(values), "wins": values.count(1), "ties": values.count(0), "losses": values.count(-1),
        "win_rate": float((better + 1).mean() / 2), "ci95": statistics.win_rate_interval(better, kinds, seed),
        "p": statistics.sign_flip_p_value(better, kinds, seed), "left_share": _left_share(rows, names),
        "agreement": _agreement(results, dict(zip(by_item, better, strict=True)), seed),
    }  # fmt: skip


def _left_share(rows: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> float | None:
    last = {(row["rater"], row["id"]): row["answer"] for row in rows if preferences([row], names)}
    sides = [answer == LEFT for answer in last.values() if answer != TIE]
    return float(np.mean(sides)) if sides else None


def _agreement(results: Sequence[Results], better: Mapping[str, float], seed: int) -> list[Row]:
    """For each metric the share of items that it orders as people do, with its interval; ties are right where people
    tie. `with_ties` is the share with the margin of ties that fits best."""
    labels = {(results[0].name, id): -value / 2 for id, value in better.items()}
    labels |= {(results[1].name, id): value / 2 for id, value in better.items()}
    found = []
    for name in results[0].score_names():
        if "/" in name:
            continue  # of a baseline
        measured = human_agreement.agreement_with_people(results, name, labels, lower_is_better(name), seed)
        accuracy, with_ties = measured.estimates[2:]
        if accuracy is not None:
            count = len(set(common_scores(results, name)[2]) & set(better))
            found.append({"metric": name, "n": count, "accuracy": accuracy, "with_ties": with_ties})
    return found
