"""A judge's words -> numbers, or the reason why there are none. Never a guess: what cannot be read is missing.

Unlike the official GEdit-Bench code, which draws a random number for an answer it cannot read and takes any count and
range, an answer counts only if it has exactly as many scores as were asked for, all on the scale.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from npedit.judges.base import OK, PARSE_ERROR, RANGE_ERROR

DIGITS = ("0", "1", "2", "3", "4", "5")
MIN_DIGIT_PROBABILITY = 0.5  # of the probability, on digits: below it, the judge meant to say something else
FULL_WIDTH = str.maketrans("\uff0c\uff1a\uff3b\uff3d\uff0f", ",:[]/")  # as judges write them in Chinese
ParsedScores = tuple[str, tuple[float, ...]]  # outcome; the scores if it is ok, else ()


def parse_scores(kind: str, text: str, count: int, low: float, high: float) -> ParsedScores:
    """The `count` scores of an answer in the form `kind` (json, lines, digits), each in [low, high]."""
    found = {"json": _scores_from_json, "lines": _scores_from_lines, "digits": _score_from_digit_probabilities}[kind](
        _strip_reasoning(text), count
    )
    found = found and [_parse_number_text(value, high) for value in found]
    if found is None or len(found) != count or not all(_is_number(n) for n in found):
        return PARSE_ERROR, ()
    if not all(low <= n <= high for n in found):
        return RANGE_ERROR, ()
    return OK, tuple(float(n) for n in found)


def _strip_reasoning(text: str) -> str:
    """Without thoughts, finished or not, and without code fences."""
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL).rpartition("</think>")[2]
    return re.sub(r"```\w*", " ", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse_number_text(value: Any, high: float) -> Any:
    """A number that was written as text, "8" or "8/10" with the scale's end, as a number; all else unchanged."""
    found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*(\d+)\s*)?", value) if isinstance(value, str) else None
    return float(found[1]) if found and float(found[2] or high) == high else value


def _scores_from_json(text: str, count: int) -> Sequence[Any] | None:
    """The one list under "score" in the text's objects; without any object, the text may be the bare list. Several
    different ones: None."""
    found = [o["score"] for o in _iterate_objects(text) if isinstance(o, dict) and "score" in o]
    scores = [s if isinstance(s, list) else [s] for s in found]
    if scores:
        return scores[0] if all(s == scores[0] for s in scores) else None
    if "{" in text:
        return _scores_from_malformed_json(text)
    bare = _parse_json_or_literal(text.strip())
    return bare if isinstance(bare, list) else [bare] if count == 1 else None


def _scores_from_malformed_json(text: str) -> Sequence[Any] | None:
    """The value behind the one "score" in an object that is no JSON, as with an unescaped quote in the reasoning. None
    if the object does not end, or holds several different scores."""
    found = re.findall(r'"score"\s*:\s*(\[[^][{}]*\]|"[^"]*"|-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?)\s*(?=[,}])', text)
    if not found or len(found) != len(re.findall(r'"score"\s*:', text)) or not text.rstrip().endswith("}"):
        return None
    values = [_parse_json_or_literal(value) for value in found]
    return _as_list(values[0]) if all(v == values[0] for v in values) else None


def _as_list(value: Any) -> Sequence[Any] | None:
    return None if value is None else value if isinstance(value, list) else [value]


def _iterate_objects(text: str) -> Iterator[Any]:
    """The values of all outermost {...}; braces within strings do not count. What cannot be read gives None."""
    depth, start, quoted, i = 0, 0, False, 0
    while i < len(text):
        mark = text[i]
        if quoted:
            quoted = mark != '"'
            i += mark == "\\"  # what stands behind it ends no string
        elif mark == '"' and depth:
            quoted = True
        elif mark == "{":
            start = start if depth else i
            depth += 1
        elif mark == "}" and depth:
            depth -= 1
            if not depth:
                yield _parse_json_or_literal(text[start : i + 1])
        i += 1


def _parse_json_or_literal(text: str) -> Any:
    """A JSON value, or a Python literal (single quotes, a last comma); None if it is neither."""
    for form in (text, text.translate(FULL_WIDTH)):
        try:
            return json.loads(form, strict=False)
        except (ValueError, RecursionError):
            pass
    slash = re.sub(r"(?<=[\[,\s:])(\d+(?:\.\d+)?\s*/\s*\d+)(?=\s*[\],}])", r'"\1"', text.translate(FULL_WIDTH))
    if slash != text:
        try:
            return json.loads(slash, strict=False)
        except (ValueError, RecursionError):
            pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _scores_from_lines(text: str, count: int) -> Sequence[Any]:
    """The whole numbers of lines "criterion: number", marks of emphasis aside."""
    plain = text.translate(FULL_WIDTH).replace("*", "").replace("#", "")
    return [
        int(n) for n in re.findall(r"^[^:\n]+:[ \t]*(-?\d+)(?:[ \t]*/[ \t]*5)?[ \t]*\.?[ \t]*$", plain, re.MULTILINE)
    ]


def _score_from_digit_probabilities(text: str, count: int) -> Sequence[Any] | None:
    """Twice the expected digit, from {"probabilities": {digit: number}}, on the scale 0 to 10."""
    found = json.loads(text)["probabilities"]
    mass = sum(found.values())
    expected = sum(int(w) * p for w, p in found.items()) / max(mass, MIN_DIGIT_PROBABILITY)
    return [min(2 * expected, 10.0)] if mass >= MIN_DIGIT_PROBABILITY else None
