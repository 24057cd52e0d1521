"""The scores in a judge's answer, or the reason why there are none. Nothing is guessed: unreadable answers are missing.

An answer is valid only if it has exactly as many scores as were asked for, all within the scale. The official
GEdit-Bench code accepts any count and range, and draws a random number for an answer that it cannot read.
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
MIN_DIGIT_PROBABILITY = (
    0.5  # total probability of the six digits; below it, the judge wants to answer with something else
)
FULL_WIDTH = str.maketrans("\uff0c\uff1a\uff3b\uff3d\uff0f", ",:[]/")  # punctuation in Chinese answers
ParsedScores = tuple[str, tuple[float, ...]]  # outcome; the scores if the outcome is ok, else ()


def parse_scores(answer_format: str, text: str, count: int, low: float, high: float) -> ParsedScores:
    """The `count` scores of an answer, each in [low, high]. `answer_format` is json, lines or digits."""
    parsers = {"json": _scores_from_json, "lines": _scores_from_lines, "digits": _score_from_digit_probabilities}
    found = parsers[answer_format](_strip_reasoning(text), count)
    found = found and [_parse_number_text(value, high) for value in found]
    if found is None or len(found) != count or not all(_is_number(n) for n in found):
        return PARSE_ERROR, ()
    if not all(low <= n <= high for n in found):
        return RANGE_ERROR, ()
    return OK, tuple(float(n) for n in found)


def _strip_reasoning(text: str) -> str:
    """The text without <think> blocks, complete or not, and without code fences."""
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL).rpartition("</think>")[2]
    return re.sub(r"```\w*", " ", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse_number_text(value: Any, high: float) -> Any:
    """The number in a text such as "8" or "8/10", where 10 must be the scale's maximum. Other values are unchanged."""
    found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*(\d+)\s*)?", value) if isinstance(value, str) else None
    return float(found[1]) if found and float(found[2] or high) == high else value


def _scores_from_json(text: str, count: int) -> Sequence[Any] | None:
    """The list under "score" in the text's JSON objects. A text without any object may be the list alone. None if
    several objects have different scores."""
    found = [o["score"] for o in _iterate_objects(text) if isinstance(o, dict) and "score" in o]
    scores = [s if isinstance(s, list) else [s] for s in found]
    if scores:
        return scores[0] if all(s == scores[0] for s in scores) else None
    if "{" in text:
        return _scores_from_malformed_json(text)
    bare = _parse_json_or_literal(text.strip())
    return bare if isinstance(bare, list) else [bare] if count == 1 else None


def _scores_from_malformed_json(text: str) -> Sequence[Any] | None:
    """The value of "score" in an object that is not valid JSON, for example with an unescaped quote in the reasoning.
    None if the object is incomplete, or has several different scores."""
    found = re.findall(r'"score"\s*:\s*(\[[^][{}]*\]|"[^"]*"|-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?)\s*(?=[,}])', text)
    if not found or len(found) != len(re.findall(r'"score"\s*:', text)) or not text.rstrip().endswith("}"):
        return None
    values = [_parse_json_or_literal(value) for value in found]
    return _as_list(values[0]) if all(v == values[0] for v in values) else None


def _as_list(value: Any) -> Sequence[Any] | None:
    return None if value is None else value if isinstance(value, list) else [value]


def _iterate_objects(text: str) -> Iterator[Any]:
    """The values of all outermost {...}; None for one that cannot be parsed. Braces within strings are ignored."""
    depth, start, quoted, i = 0, 0, False, 0
    while i < len(text):
        mark = text[i]
        if quoted:
            quoted = mark != '"'
            i += mark == "\\"  # the escaped character does not end the string
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
    """The value of a JSON text or a Python literal (single quotes, trailing comma); None for other text."""
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
    """The integers of lines "criterion: number". Markdown emphasis is ignored."""
    plain = text.translate(FULL_WIDTH).replace("*", "").replace("#", "")
    return [
        int(n) for n in re.findall(r"^[^:\n]+:[ \t]*(-?\d+)(?:[ \t]*/[ \t]*5)?[ \t]*\.?[ \t]*$", plain, re.MULTILINE)
    ]


def _score_from_digit_probabilities(text: str, count: int) -> Sequence[Any] | None:
    """Twice the expected value of the digit, from {"probabilities": {digit: number}}: a score from 0 to 10."""
    found = json.loads(text)["probabilities"]
    mass = sum(found.values())
    expected = sum(int(w) * p for w, p in found.items()) / max(mass, MIN_DIGIT_PROBABILITY)
    return [min(2 * expected, 10.0)] if mass >= MIN_DIGIT_PROBABILITY else None
