"""Call the command line as a user does, and look at what it leaves."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from npedit.cli import main as cli


def run(*words, code=0):
    done = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return re.sub(r"\s+", " ", done.output)


def picture(path, size=(64, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def start(*words):
    """`npedit WORDS` in a process of its own, which Ctrl-C reaches: a shell's background jobs ignore SIGINT, and their
    children inherit that. Its output, and errors with it, is `communicate()[0]`."""
    return subprocess.Popen(
        [sys.executable, "-m", "npedit", *map(str, words)],
        env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
