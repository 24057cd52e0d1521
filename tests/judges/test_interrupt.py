"""One Ctrl-C ends `npedit evaluate` though the judge's server never answers; what was answered is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from npedit.judges.cache import AnswerCache
from tests.support.judge_server import serving, write_gedit


def test_one_ctrl_c_ends_the_command_with_a_server_that_never_answers(tmp_path):
    released = threading.Event()

    def answer(n, _):
        return '{"score": [7, 8]}' if n < 3 else lambda handler: released.wait(60)

    data = write_gedit(tmp_path / "data")
    with serving(answer) as server:
        command = ["evaluate", "gedit", "--data", str(data), "--model", "copy", "--out", str(tmp_path / "r")]
        command += ["--judge", server.url, "--judge-model", "m", "--dino", "none", "--clip", "none"]
        process = subprocess.Popen(
            [sys.executable, "-m", "npedit", *command],
            env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 60
        while len(server.bodies) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        said, _ = process.communicate(timeout=45)
        # The server would hold each request for 60 s. A busy machine needs some seconds to end a process.
        assert time.monotonic() - start < 30 and process.returncode not in (0, None), said
        assert b"Traceback" not in said
        released.set()
    with AnswerCache(tmp_path / "r" / "answers.jsonl") as cache:
        assert len(cache) == 3
