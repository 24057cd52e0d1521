"""The judge behind `transformers serve`, the real one: a tiny model, asked by the command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from tests.judges.test_local import model_that_answers, records
from tests.support.command_line import run
from tests.support.judge_server import picture, write_gedit

PATIENCE = 120  # seconds until the server answers


def write_idefics(folder: Path) -> None:
    """A trained SmolVLM as the Idefics3 it grew out of: the same weights under another name. SmolVLM's own processor
    also reads videos, for which it wants torchvision."""
    folder.mkdir()
    model_that_answers(0).save(folder)
    facts = json.loads((folder / "config.json").read_text())
    own = {k: v for k, v in facts.items() if k not in ("model_type", "architectures", "transformers_version")}
    del own["vision_config"]["model_type"]
    model = Idefics3ForConditionalGeneration(Idefics3Config(**own))
    model.load_state_dict(model_that_answers(0).model.state_dict())
    model.save_pretrained(folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images["image_processor_type"] = "Idefics3ImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    image_tokens = (
        own["vision_config"]["image_size"] // own["vision_config"]["patch_size"] // own["scale_factor"]
    ) ** 2
    processor = {"image_seq_len": image_tokens, "processor_class": "Idefics3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))


@pytest.fixture
def address(tmp_path):
    """Where the server answers. What it says is in serve.log."""
    write_idefics(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [shutil.which("transformers", path=Path(sys.executable).parent), "serve", str(tmp_path / "tiny")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    url, deadline = f"http://localhost:{port}/v1", time.monotonic() + PATIENCE
    asked = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            try:
                asked.open(f"http://localhost:{port}/health", timeout=5).read()
                break
            except OSError:
                said = (tmp_path / "serve.log").read_text()
                assert server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def test_gedit_judged_by_transformers_own_server(address, tmp_path, monkeypatch):
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)
    write_gedit(tmp_path / "data")
    words = ("evaluate", "gedit", "--data", "data", "--model", "copy", "--judge-model", tmp_path / "tiny", "--out", "r")
    said = run(*words, "--judge", address)
    assert "22 answers came from" in said and "No headline" not in said
    rows = records(tmp_path / "r" / "rows.jsonl")
    assert len(rows) == 11 and all(r["scores"]["O"] == pytest.approx(7.0) and r["why"] == {} for r in rows)
    answers = (tmp_path / "r" / "answers.jsonl").read_text()
    assert "completion_tokens" in answers
    assert "0 answers came" in run(*words, "--judge", address)
    picture(0, (64, 48)).save(tmp_path / "data" / "photo.png")
    model = ("--writer", address, "--writer-model", tmp_path / "tiny")
    said = run("prepare", "data", "--out", "set", *model, code=2)  # the request is accepted; the model writes no JSON
    assert "look: unreadable" in said
