"""What the three passes must answer: JSON schemas, and tolerant reading of a model's text.

Tolerant means: text around the JSON, code fences, a model's thoughts, single quotes, trailing commas, "Yes." for "yes"
and "true" for true are understood. An answer that lacks a field, or has a value of another kind, is unreadable. No
value is guessed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from npedit.questions import normalise_edit_type

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
MAX_STARTS = 200  # brackets of a text that are tried as the beginning of JSON
YES_NO: Schema = {"type": "string", "enum": ["yes", "no"]}


class UnreadableAnswer(Exception):
    """An answer that does not hold what was asked for; the message says what is missing."""


# ------------------------------------------------------------------------------------------------------------ schemas


def _object(**properties: Schema) -> Schema:
    """The schema of an object with exactly these properties, in the form that strict servers demand."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def look_schema() -> Schema:
    """The schema of the first pass."""
    return _object(objects=_list(_object(name=TEXT, where=TEXT, attributes=_list(TEXT))), caption=TEXT)


def write_schema(edit_types: Sequence[str]) -> Schema:
    """The schema of the second pass; `edit_types` are those that are asked for."""
    kind = {"type": "string", "enum": sorted(set(edit_types))}
    question = _object(question=TEXT, answer=YES_NO)
    proposal = _object(edit_type=kind, instruction=TEXT, object=TEXT, target_caption=TEXT, questions=_list(question))
    return _object(proposals=_list(proposal))


def caption_schema() -> Schema:
    """The schema of the pass that completes a row."""
    questions = _list(_object(question=TEXT, answer=YES_NO))
    return _object(edit_possible={"type": "boolean"}, object=TEXT, target_caption=TEXT, questions=questions)


def verify_schema() -> Schema:
    """The schema of the third pass."""
    flag = {"type": "boolean"}
    return _object(object_present=flag, edit_possible=flag, caption_right=flag, answers=_list(YES_NO), reason=TEXT)


# ------------------------------------------------------------------------------------------------------------ reading


def parse_look(text: str) -> dict[str, Any]:
    """{"objects": [{"name", "where", "attributes"}], "caption"} from a model's text.

    Raises:
        UnreadableAnswer: a field is missing or of another kind.
    """
    found = read_object(text, "caption")
    objects = []
    for thing in _read_list(found, "objects"):
        if isinstance(thing, str):
            thing = {"name": thing}
        if not isinstance(thing, Mapping):
            raise UnreadableAnswer(f"expected an object in 'objects'; got {_short(thing)}")
        attributes = thing.get("attributes") or []
        attributes = [attributes] if isinstance(attributes, str) else attributes
        if not isinstance(attributes, list):
            raise UnreadableAnswer(f"expected a list in 'attributes'; got {_short(attributes)}")
        where = thing.get("where")
        objects.append(
            {
                "name": _read_text(thing, "name"),
                "where": _clean(where) if isinstance(where, str) else "",
                "attributes": [_clean(str(a)) for a in attributes],
            }
        )
    return {"objects": objects, "caption": _read_text(found, "caption")}


def parse_write(text: str, edit_types: Sequence[str]) -> list[dict[str, Any]]:
    """The proposals in a model's text. One that is unreadable has the key "unreadable" with the reason, and does not
    make the others unreadable. `edit_types` are those that were asked for; synonyms of them are understood.

    Raises:
        UnreadableAnswer: there is no list of proposals.
    """
    found = read_value(text, "proposals")
    items = found if isinstance(found, list) else _read_list(found, "proposals")
    return [_parse_proposal(item, edit_types) for item in items]


def _parse_proposal(item: Any, edit_types: Sequence[str]) -> dict[str, Any]:
    try:
        if not isinstance(item, Mapping):
            raise UnreadableAnswer(f"expected an object in 'proposals'; got {_short(item)}")
        questions = _read_questions(item)
        fields = {name: _read_text(item, name) for name in ("instruction", "object", "target_caption")}
        return {"edit_type": _match_type(_read_text(item, "edit_type"), edit_types), **fields, "questions": questions}
    except UnreadableAnswer as error:
        kind = item.get("edit_type") if isinstance(item, Mapping) else ""
        return {"edit_type": _clean(kind) if isinstance(kind, str) else "", "unreadable": str(error)}


def _read_questions(item: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"question": _read_text(q, "question"), "answer": _yes_no(q.get("answer"))}
        for q in _read_list(item, "questions")
        if isinstance(q, Mapping)
    ]


def parse_caption(text: str) -> dict[str, Any]:
    """{"edit_possible", "object", "target_caption", "questions"} from a model's text. If the edit is not possible, the
    texts are empty.

    Raises:
        UnreadableAnswer: a field is missing or of another kind.
    """
    found = read_object(text, "edit_possible")
    if not _boolean(found, "edit_possible"):
        return {"edit_possible": False, "object": "", "target_caption": "", "questions": []}
    texts = {name: _read_text(found, name) for name in ("object", "target_caption")}
    return {"edit_possible": True, **texts, "questions": _read_questions(found)}


def _match_type(word: str, edit_types: Sequence[str]) -> str:
    """The wanted type that a word means, or the word itself."""
    if word in edit_types:
        return word
    try:
        known = normalise_edit_type(word)
    except ValueError:
        known = word.strip().lower()
    return known if known in edit_types else word


def parse_verify(text: str, questions: int) -> dict[str, Any]:
    """{"object_present", "edit_possible", "caption_right", "answers", "reason"} with one answer for each question.

    Raises:
        UnreadableAnswer: a field is missing or of another kind, or the number of answers differs.
    """
    found = read_object(text, "edit_possible")
    flags = {name: _boolean(found, name) for name in ("object_present", "edit_possible", "caption_right")}
    answers = [_yes_no(a.get("answer") if isinstance(a, Mapping) else a) for a in _read_list(found, "answers")]
    if len(answers) != questions:
        raise UnreadableAnswer(f"expected {questions} answers; got {len(answers)}")
    reason = found.get("reason")
    return {**flags, "answers": answers, "reason": _clean(reason) if isinstance(reason, str) else ""}


def read_object(text: str, key: str) -> dict[str, Any]:
    """The JSON object in a model's text that has `key`.

    Raises:
        UnreadableAnswer: there is none.
    """
    found = read_value(text, key)
    if not isinstance(found, dict):
        raise UnreadableAnswer(f"expected a JSON object; got {_short(found)}")
    return found


def read_value(text: str, key: str) -> Any:
    """The JSON object with `key` in a model's text, or else the first JSON value in it.

    Raises:
        UnreadableAnswer: there is no JSON value.
    """
    text = re.sub(r"<think(ing)?>.*?</think(ing)?>", " ", text, flags=re.DOTALL)
    values = list(_json_values(text))
    for value in values:
        if isinstance(value, dict) and key in value:
            return value
    if values:
        return values[0]
    raise UnreadableAnswer(f"expected a JSON object; got {_short(text)}")


def _json_values(text: str) -> list[Any]:
    """Every object or list in a text that is not inside another one."""
    values: list[Any] = []
    place = 0
    for _ in range(MAX_STARTS):
        start = re.compile(r"[{\[]").search(text, place)
        if start is None:
            break
        value, place = _decode_at(text, start.start())
        values += [] if value is None else [value]
    return values


def _decode_at(text: str, start: int) -> tuple[Any, int]:
    """(the JSON value that begins at `start`, where it ends); (None, the next place) if there is none."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    end = text.rfind("}" if text[start] == "{" else "]")
    piece = text[start : end + 1]
    for repaired in (re.sub(r",(\s*[}\]])", r"\1", piece), piece):
        try:
            return json.loads(repaired, strict=False), end + 1
        except (ValueError, RecursionError):
            pass
        try:
            value = ast.literal_eval(repaired)  # single quotes, as Python writes them
            if isinstance(value, dict | list):
                return value, end + 1
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    return None, start + 1


def _read_text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UnreadableAnswer(f"expected a text in {name!r}; got {_short(value)}")
    return _clean(value)


def _clean(text: str) -> str:
    """A text on one line. Half of a surrogate pair, which no file can hold, becomes a question mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _read_list(found: Any, name: str) -> list[Any]:
    value = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(value, list):
        raise UnreadableAnswer(f"expected a list in {name!r}; got {_short(value)}")
    return value


def _boolean(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"):
        return value.strip().lower() in ("true", "yes")
    if not isinstance(value, bool):
        raise UnreadableAnswer(f"expected true or false in {name!r}; got {_short(value)}")
    return value


def _yes_no(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    word = value.strip().strip(".!\"'").lower() if isinstance(value, str) else ""
    if word not in ("yes", "no"):
        raise UnreadableAnswer(f"expected yes or no as an answer; got {_short(value)}")
    return word


def _short(value: Any) -> str:
    """A value as it is shown in a message."""
    return repr(_clean(value)[:80]) if isinstance(value, str) else _clean(repr(value))[:80]
