"""One Ctrl-C ends a command though its server never answers; what was answered is kept."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest

from npedit.judges.cache import AnswerCache
from tests.support.command_line import start
from tests.support.judge_server import serving, write_gedit
from tests.support.writer_server import good_answer, photos

HELD_SECONDS = 120.0  # how long the server holds a request


def evaluate_words(folder, url):
    judge = ("--judge", url, "--judge-model", "m", "--dino", "none", "--clip", "none")
    return "evaluate", "gedit", "--data", write_gedit(folder / "data"), "--model", "copy", "--out", folder / "r", *judge


def prepare_words(folder, url):
    source = photos(folder / "photos", 8)
    return "prepare", source, "--out", folder / "r", "--writer", url, "--writer-model", "m"


@pytest.mark.parametrize(
    ("words", "right"),
    [
        pytest.param(evaluate_words, lambda body: '{"score": [7, 8]}', marks=pytest.mark.slow),
        (prepare_words, lambda body: json.dumps(good_answer(body))),
    ],
)
def test_one_ctrl_c_ends_the_command_with_a_server_that_never_answers(tmp_path, words, right):
    released = threading.Event()

    def answer(n, body):
        return right(body) if n < 3 else lambda handler: released.wait(HELD_SECONDS)

    with serving(answer) as server:
        process = start(*words(tmp_path, server.url))
        deadline = time.monotonic() + 60
        while len(server.bodies) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            said, _ = process.communicate(timeout=45)
        finally:
            process.kill()
            released.set()
        assert time.monotonic() - began < 30 and process.returncode == 130, said  # seconds, on a busy machine too
        assert b"Traceback" not in said and b"Go on with" in said
    with AnswerCache(tmp_path / "r" / "answers.jsonl") as cache:
        assert len(cache) == 3
