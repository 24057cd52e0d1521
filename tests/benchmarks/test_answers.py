"""Judges' answers: what is unambiguous is read, and nothing is guessed."""

import pytest

from npedit.benchmarks._answers import parse_scores

READABLE = {
    '{"score": ["8", "9"]}': (8, 9),
    '{"score": ["8/10", "9/10"]}': (8, 9),
    '{"score": [8/10, 9/10]}': (8, 9),
    '{"score": [8，9]}': (8, 9),
    '{"reasoning"："好"，"score"：[8，9]}': (8, 9),
    '{"reasoning": "the "cat" is gone", "score": [8, 9]}': (8, 9),
    '{"score": [8, 9], "reasoning": "the "cat" is gone"}': (8, 9),
}
UNREADABLE = (
    '{"score": ["8/5", "9/5"]}',
    '{"score": ["8 or 9", "9"]}',
    '{"reasoning": "I would say "score": [1, 1] if", "score": [8, 9]}',
    '{"reasoning": "the "cat" is gone", "score": [8, 9',
    '{"reasoning": "the "cat" is gone", "score": [8]}',
    '{"score": ["eight", "nine"]}',
)


@pytest.mark.parametrize("text", READABLE)
def test_unambiguous_answers_are_read(text):
    assert parse_scores("json", text, 2, 0, 10) == ("ok", READABLE[text])


@pytest.mark.parametrize("text", UNREADABLE)
def test_ambiguous_answers_are_not(text):
    assert parse_scores("json", text, 2, 0, 10) == ("parse_error", ())


def test_lines_with_full_width_colons_are_read():
    assert parse_scores("lines", "Compliance：5\nLook：4\nDetail：3/5", 3, 1, 5) == ("ok", (5, 4, 3))
