"""A training set that a person reviews row by row. The set's files are the truth, and each is replaced at once.

metadata.jsonl   the rows; all but a mended one stay as they are, byte for byte
rejected.jsonl   gets {"id", "instruction", "edit_type", "file", "photo", "pass": "review", "reason", "position",
                 "held_out", "row"} for a row that a person rejects; `row` is the line that was in metadata.jsonl
held_out.txt     loses the ids of rejected rows
review.jsonl     one line a decision: {"id", "state", "time"}, and "before" (what a person changed) or "reason"

A rejected row is in rejected.jsonl before it leaves metadata.jsonl, and the other way round when it is taken back. A
row that is in both after a power failure counts as one of the set.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npedit.data._metadata import find_metadata, parse_row
from npedit.errors import UserError, explain_write_errors
from npedit.prepare.set_folder import HELD_OUT, METADATA, REJECTED, REVIEW, read_held_out
from npedit.runs.files import append_row, fsync_rows, repair_rows, write_text
from npedit.runs.lock import hold
from npedit.serve.review_card import update_card

Row = dict[str, Any]
ACCEPTED, MENDED, REJECTED_STATE = "accepted", "mended", "rejected"
STATES = (ACCEPTED, MENDED, REJECTED_STATE)
REVIEW_PASS = "review"  # the value of "pass" in rejected.jsonl
TEXTS = ("instruction", "edit_type", "object", "source_caption", "target_caption")
FIELDS = (*TEXTS, "questions")  # what a person can mend
MOST_REASON = 1000  # characters


@dataclass
class Entry:
    """One row. `line` is its line in metadata.jsonl, without the newline but with a carriage return before it. `state`
    is "" until a person has seen the row. `reason` and `held_out` (was it one of held_out.txt?) belong to a rejected
    row."""

    id: str
    values: Row
    line: str
    state: str = ""
    reason: str = ""
    held_out: bool = False

    def fields(self) -> Row:
        """What a person can mend, as text; the questions one a line."""
        shown: Row = {name: str(self.values.get(name) or "") for name in TEXTS}
        return shown | {"questions": questions_as_text(self.values.get("questions"))}


@dataclass
class ReviewSet:
    """The rows of a set in their order, with those that a person has rejected. Threads may call all methods."""

    folder: Path
    entries: list[Entry]
    held_out: list[str]
    other_rejected: list[str]  # lines of rejected.jsonl that are not from a review
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.entries)

    def position(self, id: str) -> int:
        """The number of a row in the order of the set."""
        return next(k for k, entry in enumerate(self.entries) if entry.id == id)

    def counts(self) -> dict[str, int]:
        """How many rows there are, were seen, and are in each state."""
        found = Counter(entry.state for entry in self.entries)
        return {"rows": len(self), "seen": len(self) - found[""], **{state: found[state] for state in STATES}}

    def next_unseen(self, after: int = -1) -> int | None:
        """The number of the next row that no person has seen, from the row behind `after` on and then from the start;
        None if all were seen."""
        order = [*range(after + 1, len(self)), *range(min(after + 1, len(self)))]
        return next((k for k in order if not self.entries[k].state), None)

    def accept(self, id: str, shown: Mapping[str, str] | None = None, given: Mapping[str, str] | None = None) -> str:
        """Accept a row, with the fields that differ between `shown` and `given` mended; a rejected row is taken back.
        Returns the new state.

        Raises:
            UserError: the mended row is none that training takes, or the set cannot be written.
        """
        with self._deciding(id) as entry:
            changed = {name: text for name, text in (given or {}).items() if text != (shown or {}).get(name)}
            mended = mend_row(entry.values, changed, self.folder / METADATA, self.position(id) + 1)
            before = {name: entry.values.get(name) for name in FIELDS if mended.get(name) != entry.values.get(name)}
            was_rejected = entry.state == REJECTED_STATE
            if before:
                entry.values, entry.line = mended, json.dumps(mended, ensure_ascii=False) + _carriage_return(entry.line)
            entry.state = MENDED if before or entry.state == MENDED else ACCEPTED
            if before or was_rejected:
                self._write_rows(entry, was_rejected)
            self._note(entry, {"before": before} if before else {})
            return entry.state

    def reject(self, id: str, reason: str) -> None:
        """Move a row to rejected.jsonl. The photo stays.

        Raises:
            UserError: there is no reason, the row would be the last of the set, or the set cannot be written.
        """
        with self._deciding(id) as entry:
            reason = reason.strip().encode("utf-8", "replace").decode()[:MOST_REASON]
            if not reason:
                raise UserError("expected a reason for the rejection; got none; write one, for example 'wrong object'")
            if not any(e.state != REJECTED_STATE for e in self.entries if e is not entry):
                raise UserError("expected a set with rows; this is the last one; delete the set instead")
            entry.state, entry.reason, entry.held_out = REJECTED_STATE, reason, entry.held_out or id in self.held_out
            self._write_rejected()
            self._write_metadata()
            self._write_held_out([i for i in self.held_out if i != id])
            self._note(entry, {"reason": reason})

    @contextmanager
    def _deciding(self, id: str) -> Iterator[Entry]:
        """The row that is decided about. If a file cannot be written, the row is what it was before."""
        with self._lock:
            entry = self.entries[self.position(id)]
            before = vars(entry).copy()
            try:
                yield entry
            except BaseException:
                vars(entry).update(before)
                raise

    def _write_rows(self, entry: Entry, was_rejected: bool) -> None:
        self._write_metadata()
        if was_rejected:
            self._write_rejected()
        if was_rejected and entry.held_out and entry.id not in self.held_out:
            self._write_held_out([*self.held_out, entry.id])
        entry.reason, entry.held_out = "", False

    def _write_metadata(self) -> None:
        kept = (entry.line for entry in self.entries if entry.state != REJECTED_STATE)
        write_text(self.folder / METADATA, "".join(f"{line}\n" for line in kept))

    def _write_rejected(self) -> None:
        lines = [*self.other_rejected, *(json.dumps(row, ensure_ascii=False) for row in self._rejected_rows())]
        write_text(self.folder / REJECTED, "".join(f"{line}\n" for line in lines))

    def _rejected_rows(self) -> Iterator[Row]:
        for position, entry in enumerate(self.entries):
            if entry.state == REJECTED_STATE:
                yield rejected_row(entry, position)

    def _write_held_out(self, ids: list[str]) -> None:
        if ids != self.held_out:
            write_text(self.folder / HELD_OUT, "".join(f"{i}\n" for i in ids))
            self.held_out = ids

    def _note(self, entry: Entry, more: Row) -> None:
        """Write down the decision, then the counts of prepare.json and of the data card."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append_row(self.folder / REVIEW, {"id": entry.id, "state": entry.state, "time": now, **more})
        fsync_rows(self.folder / REVIEW)
        kept = [e.values for e in self.entries if e.state != REJECTED_STATE]
        rejected = [*map(json.loads, self.other_rejected), *self._rejected_rows()]
        update_card(self.folder, kept, rejected, self.counts(), len(self.held_out))


def rejected_row(entry: Entry, position: int) -> Row:
    """A rejected row as rejected.jsonl holds it."""
    values = entry.values
    shown = {"id": entry.id, "instruction": values.get("instruction"), "edit_type": values.get("edit_type")}
    photo = {"file": values.get("original_name", values["file_name"]), "photo": Path(values["file_name"]).stem}
    facts = {"pass": REVIEW_PASS, "reason": entry.reason, "position": position, "held_out": entry.held_out}
    return {**shown, **photo, **facts, "row": values}


# ------------------------------------------------------------------------------------------------------------- mending


def mend_row(values: Row, changed: Mapping[str, str], metadata: Path, line: int) -> Row:
    """A row with the texts of `changed`, in a new object. Other columns stay, and an empty text makes no new column.

    Raises:
        UserError: the row is none that training takes, or the questions cannot be read.
    """
    mended = dict(values)
    for name, text in changed.items():
        value: Any = questions_from_text(text) if name == "questions" else text.strip()
        if value or name in values:
            mended[name] = value
    if mended != values:
        parse_row(mended, line, metadata, {}, metadata.parent)
    return mended


def questions_as_text(questions: Any) -> str:
    """Questions as text, one a line: "yes | Is the car red?", or "yes, both | Is the dog the same?" where the critic
    sees both pictures."""
    try:
        found = json.loads(questions) if isinstance(questions, str) and questions.strip() else questions or []
        return "\n".join(f"{_answer_as_text(entry)} | {entry['question']}" for entry in found)
    except (ValueError, TypeError, KeyError):
        return str(questions)


def _answer_as_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['answer']}, both" if entry.get("images") == "both" else str(entry["answer"])


def questions_from_text(text: str) -> list[dict[str, str]]:
    """The questions of such a text.

    Raises:
        UserError: a line is of another form.
    """
    made = []
    for line in filter(str.strip, text.splitlines()):
        words, bar, question = line.partition("|")
        answer, comma, images = (part.strip().lower() for part in words.partition(","))
        if answer not in ("yes", "no") or bool(comma) != (images == "both") or not bar or not question.strip():
            raise UserError(
                "expected questions as 'yes | QUESTION' or 'no | QUESTION', and 'yes, both | QUESTION' where both "
                f"pictures are looked at; got {line[:80]!r}; correct it"
            )
        both = {"images": "both"} if images else {}
        made.append({"question": question.strip(), "answer": answer, **both})
    return made


# ------------------------------------------------------------------------------------------------------------- opening


@contextmanager
def open_review(folder: Path) -> Iterator[ReviewSet]:
    """A set to review. Inside the block no other command writes the folder.

    Raises:
        UserError: it is no set with one metadata.jsonl whose rows have ids, or another process holds it.
    """
    folder = _find_folder(folder)
    with hold(folder, "review"):
        yield read_review(folder)


def _find_folder(folder: Path) -> Path:
    found, files = find_metadata(str(folder))
    if files != [found / METADATA]:
        raise UserError(
            f"expected a set with one {METADATA}; got {', '.join(map(str, files[:3]))}; write the rows into "
            "one file (npedit caption does)"
        )
    return found


def read_review(folder: Path) -> ReviewSet:
    """The rows of a set and what a person has decided so far. Errors as in `open_review`."""
    states = {str(row.get("id")): row.get("state") for row in repair_rows(folder / REVIEW)}
    entries = [_read_entry(folder / METADATA, number, line) for number, line in _read_lines(folder / METADATA)]
    ids = Counter(entry.id for entry in entries)
    if twice := [i for i, count in ids.items() if count > 1]:
        raise UserError(f"expected each id once; got {twice[0]!r} again in {folder / METADATA}; change one")
    for entry in entries:
        state = states.get(entry.id)
        entry.state = state if state in (ACCEPTED, MENDED) else ""
    others = _add_rejected(folder, entries, set(ids), _carriage_return(entries[0].line) if entries else "")
    return ReviewSet(folder, entries, read_held_out(folder), others)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of each line that is not blank."""
    try:
        with explain_write_errors(path):
            lines = path.read_bytes().decode("utf-8").split("\n")  # read_text would drop carriage returns
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 in {path}; got: {error}; correct it") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_entry(metadata: Path, number: int, line: str) -> Entry:
    where = f"{metadata}:{number}"
    try:
        values = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON; got {line[:60]!r} ({error}); correct it") from None
    id = values.get("id") if isinstance(values, dict) else None
    if not isinstance(id, str | int) or isinstance(id, bool) or not isinstance(values.get("file_name"), str):
        raise UserError(f"{where}: expected a row with id and file_name; got {line[:60]!r}; give each row an id")
    return Entry(str(id).strip(), values, line)  # as training reads it


def _carriage_return(line: str) -> str:
    return "\r" if line.endswith("\r") else ""


def _add_rejected(folder: Path, entries: list[Entry], ids: set[str], ending: str) -> list[str]:
    """Put the rows that a person rejected back into their places; returns the other lines of rejected.jsonl. `ending`
    is the end of a line in metadata.jsonl."""
    others, found = [], []
    path = folder / REJECTED
    for number, line in _read_lines(path) if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected JSON; got {line[:60]!r} ({error}); correct it") from None
        if row.get("pass") != REVIEW_PASS or not isinstance(row.get("row"), dict):
            others.append(line)
        elif str(row["id"]) not in ids:
            found.append(row)
    for row in sorted(found, key=lambda row: row["position"]):
        entries.insert(row["position"], _rejected_entry(row, ending))
    return others


def _rejected_entry(row: Mapping[str, Any], ending: str) -> Entry:
    line = json.dumps(row["row"], ensure_ascii=False) + ending
    return Entry(str(row["id"]), row["row"], line, REJECTED_STATE, str(row["reason"]), bool(row.get("held_out")))


def describe_progress(counts: Mapping[str, int]) -> str:
    """The counts of a review in words."""
    parts: Sequence[str] = [f"{counts[state]} {state}" for state in STATES]
    return f"{counts['seen']} of {counts['rows']} rows seen: {', '.join(parts)}"
