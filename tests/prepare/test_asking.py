"""Requests: each once, with a bound, a ceiling of cost, servers without structured output, and a writer in process."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import run
from judge_server import completion, send, serving
from PIL import Image
from writer_server import (
    good_answer,
    good_look,
    passes_of,
    photos,
    prepare,
    prompt_of,
    rows_of,
    writing,
)

from npedit.cli.prepare import print_summary
from npedit.critics.smolvlm import SmolVLM
from npedit.errors import UserError
from npedit.judges.cache import AnswerCache
from npedit.judges.chat_client import ChatClient
from npedit.judges.local import LocalJudge
from npedit.prepare.asking import Asker, Meter
from npedit.prepare.merge import merge
from npedit.prepare.passes import Passes, prepare_photo
from npedit.prepare.prepare import PrepareSettings
from npedit.prepare.prepare import prepare as prepare_set
from npedit.prepare.prompts import load_prompts
from npedit.prepare.writer import WRITER, LocalWriter, Request, ServerWriter, open_writer

ROOT = Path(__file__).parents[2]


def test_killed_half_way_it_resumes_and_asks_nothing_twice(tmp_path):
    source = photos(tmp_path / "photos", 12)

    def slow(name, answer, body):
        time.sleep(0.05)
        return answer

    with writing(slow) as server:
        words = ["prepare", source, "--out", tmp_path / "set", "--writer", server.url, "--writer-model", "tiny"]
        command = [sys.executable, "-m", "npedit", *map(str, words), "--workers", "2", "--seed", "3"]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "src"}, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(server.bodies) < 15 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(0.2)
        before = len(server.bodies)
        run(*words, "--workers", 2, "--seed", 3)
        assert 15 <= before < 48
        asked = Counter(prompt_of(b) + str(b["messages"]) for b in server.bodies)
        # only the requests that were in work when the process was killed are sent again
        assert len(asked) == 48 and sum(asked.values()) <= 48 + 2
        run("prepare", source, "--out", tmp_path / "other", *words[4:], "--seed", 3)
    for name in ("metadata.jsonl", "held_out.txt", "rejected.jsonl"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_full_disk_stops_the_run_and_it_resumes(tmp_path):
    source = photos(tmp_path / "photos", 12)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing() as server:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # of one file; the error is that of a full disk
            said = prepare(server, source, tmp_path / "set", code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "room on the disk" in said
        before = len(server.bodies)
        kept = len((tmp_path / "set" / "answers.jsonl").read_bytes().splitlines())
        assert 0 < kept <= before < 48
        prepare(server, source, tmp_path / "set")
        assert len(server.bodies) == before + 48 - kept


def test_no_more_requests_at_once_than_workers(tmp_path):
    lock, running, most = threading.Lock(), [0], [0]

    def count(name, answer, body):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return answer

    with writing(count) as server:
        prepare(server, photos(tmp_path / "photos", 8), tmp_path / "set", "--workers", 3, "--no-verify")
    assert most[0] == 3


def test_an_unreadable_answer_is_asked_for_once_more_with_the_reason(tmp_path):
    def broken(name, answer, body):
        return '{"caption": "a' if name == "look" and "could not be read" not in prompt_of(body) else answer

    with writing(broken) as server:
        prepare(server, photos(tmp_path / "photos", 1), tmp_path / "set", "--no-verify")
        assert passes_of(server) == ["look", "look", "write"]
        assert '"additionalProperties"' in prompt_of(server.bodies[1])  # for servers that ignore the schema
    with writing(lambda name, answer, body: "no JSON at all") as server:
        said = prepare(server, photos(tmp_path / "photos", 1), tmp_path / "other", code=2)
        assert passes_of(server) == ["look", "look"] and "unreadable" in said
    (row,) = rows_of(tmp_path / "other", "rejected.jsonl")
    assert row["pass"] == "look" and "expected a JSON object" in row["reason"]


def test_a_server_without_structured_output_gets_the_schema_in_words(tmp_path):
    def refuse(number, body):
        if "response_format" in body:
            return lambda handler: send(handler, 400, b'{"error": "response_format is not supported"}')
        schema = prompt_of(body).rpartition("JSON schema:")[2]
        name = "look" if '"caption"' in schema else "write" if '"proposals"' in schema else "verify"
        answer = good_answer({**body, "response_format": {"json_schema": {"name": name, "schema": {}}}})
        return f"Sure!\n```json\n{answer}\n```"

    with serving(refuse) as server:
        said = prepare(server, photos(tmp_path / "photos", 2), tmp_path / "set", "--workers", 1)
    assert "4 edits of 2 photos" in said
    assert sum("response_format" in body for body in server.bodies) == 1


def test_the_ceiling_of_cost_holds_while_many_requests_run(tmp_path):
    source = photos(tmp_path / "photos", 30)
    prices = ("--price-in", 10, "--price-out", 10)  # an answer costs 107 tokens: 0.00107
    with writing() as server:
        said = prepare(server, source, tmp_path / "set", *prices, "--max-cost", 0.08, code=2)
        sent = len(server.bodies)
        assert 0 < sent < 120 and 0.00107 * sent <= 0.08
        assert "--max-cost 0.08" in said
        assert rows_of(tmp_path / "set")  # photos that are finished are in the set
        said = prepare(server, source, tmp_path / "set", *prices, "--max-cost", 9)
        assert len(server.bodies) == 120 and "60 edits of 30 photos" in said and "cost 0.1284" in said
    run("prepare", source, "--out", tmp_path / "x", "--writer", "http://localhost:1/v1", "--max-cost", 3, code=2)


def test_a_ceiling_needs_token_counts(tmp_path):
    def uncounted(number, body):
        answer = completion(str(good_answer(body))).replace(b'"usage"', b'"unused"')
        return lambda handler: send(handler, 200, answer)

    with serving(uncounted) as server:
        words = ("--max-cost", 1, "--price-in", 1)
        said = prepare(server, photos(tmp_path / "photos", 1), tmp_path / "set", *words, code=2)
    assert "token counts" in said


def test_a_dry_run_shows_requests_answers_and_the_cost_of_all(tmp_path):
    with writing() as server:
        words = ("--price-in", 10, "--price-out", 10)
        said = prepare(server, photos(tmp_path / "photos", 20), tmp_path / "set", "--dry-run", 2, *words)
        assert Counter(passes_of(server)) == {"look": 2, "write": 2, "verify": 4}
        assert "Describe this photo" in said and '"caption": "a red chair in a room"' in said
        assert "All 20 photos: about 80 requests, 8,000 prompt tokens, 560 answer tokens, cost 0.0856" in said
        assert not (tmp_path / "set" / "metadata.jsonl").exists()
        prepare(server, tmp_path / "photos", tmp_path / "set")
        assert len(server.bodies) == 80  # the answers of the trial were kept


def test_a_server_that_is_gone_or_refuses_the_key_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NPEDIT_WRITER_KEY", "secret-key-123")
    source = photos(tmp_path / "photos", 6)

    def forbid(number, body):
        return lambda handler: send(handler, 401, b"bad key secret-key-123")

    with serving(forbid) as server:
        said = prepare(server, source, tmp_path / "set", code=2)
        assert server.headers[0]["Authorization"] == "Bearer secret-key-123"
        assert "401" in said and "--writer" in said and "NPEDIT_WRITER_KEY" in said and "secret-key" not in said
        assert len(server.bodies) <= 6
    assert all(b"secret-key" not in path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file())


def test_a_verifier_of_its_own_gets_its_own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("NPEDIT_WRITER_KEY", "key-one")
    monkeypatch.setenv("NPEDIT_VERIFIER_KEY", "key-two")
    with writing() as first, writing() as second:
        words = ("--verifier", second.url, "--verifier-model", "other")
        prepare(first, photos(tmp_path / "photos", 1), tmp_path / "set", *words)
    assert set(passes_of(first)) == {"look", "write"} and set(passes_of(second)) == {"verify"}
    assert first.headers[0]["Authorization"].endswith("one") and second.headers[0]["Authorization"].endswith("two")


@pytest.mark.parametrize(
    "status, body, message",
    [
        (200, b"<html>please log in</html>", "a page that begins"),
        (404, b"no such model", "--writer-model"),
        (402, b"pay first", "credit"),
        (302, b"", "HTTP 302"),
    ],
)
def test_a_server_that_will_never_answer_stops_the_run_at_once(tmp_path, status, body, message):
    with serving(lambda n, _: lambda handler: send(handler, status, body, Location="http://localhost:1/")) as server:
        said = prepare(server, photos(tmp_path / "photos", 3), tmp_path / "set", "--workers", 1, code=2)
        assert message in said and len(server.bodies) == 1


def test_a_busy_server_is_asked_again(tmp_path):
    def busy(number, body):
        if number == 0:
            return lambda handler: send(handler, 429, b"slow down", Retry_After="0")
        return json.dumps(good_answer(body))

    with serving(busy) as server:
        said = prepare(server, photos(tmp_path / "photos", 1), tmp_path / "set", "--no-verify")
    assert "2 edits of 1 photos" in said and passes_of(server) == ["look", "look", "write"]


def failing_from(number, after=503):
    """A server that answers `number` requests and then fails."""
    return lambda n, body: (
        json.dumps(good_answer(body)) if n < number else lambda handler: send(handler, after, b"down")
    )


def prepared(server, source, out):
    """`prepare` with a client that asks once, so that no test waits."""
    writer = ServerWriter(ChatClient(server.url, "tiny", WRITER, max_attempts=1), workers=1)
    settings = PrepareSettings(shares={"recolour": 1.0}, per_photo=1, rounds=1)
    return prepare_set(source, out, settings, load_prompts(), writer, None, Meter())


def test_a_server_that_fails_for_long_stops_the_run_and_no_photo_is_lost(tmp_path):
    source = photos(tmp_path / "photos", 20)
    with serving(failing_from(6)) as server:
        with pytest.raises(UserError, match="8 requests in a row got none.*503.*all answers are kept"):
            prepared(server, source, tmp_path / "set")
        assert len(server.bodies) == 6 + 8
    with writing() as server:
        facts = prepared(server, source, tmp_path / "set")
        assert facts["counts"]["photos_with_rows"] == 20 and not facts["stopped"]
        assert len(server.bodies) == 2 * 20 - 6


def test_a_set_with_photos_that_got_no_answer_is_not_finished(tmp_path):
    """Fewer failures than stop a run: the set is written, says so, and is no finished shard."""
    source = photos(tmp_path / "photos", 5)
    with serving(failing_from(6)) as server:
        facts = prepared(server, source, tmp_path / "set")
    assert facts["counts"]["photos_with_rows"] == 3
    assert facts["stopped"].startswith("2 edits or photos got no answer") and "503" in facts["stopped"]
    with pytest.raises(UserError, match="no answered question is asked again"):
        print_summary(tmp_path / "set", facts)
    with pytest.raises(UserError, match="expected a finished shard"):
        merge(tmp_path / "merged", [tmp_path / "set"])
    with writing() as server:
        assert not prepared(server, source, tmp_path / "set")["stopped"]


class ScriptedCritic(SmolVLM):
    """A real tiny critic whose text is replaced: random weights write no JSON."""

    prompts: list[str]

    def generate_text(self, prompts, images, max_tokens):
        assert len(super().generate_text(prompts, images, 1)) == 1  # the real model takes the request
        self.prompts.append(prompts[0])
        return [str(good_look())]


def test_a_critic_family_writes_in_this_process(tmp_path):
    critic = ScriptedCritic.tiny(0)
    critic.prompts = []
    writer = LocalWriter(LocalJudge(critic, "tiny", "smolvlm", "r"))
    source = photos(tmp_path / "photos", 1)
    with AnswerCache(tmp_path / "a.jsonl") as cache:
        passes = Passes(load_prompts(), Asker(writer, cache, Meter()), None, 64, 0, 10_000)
        result = prepare_photo({"id": "p", "path": str(source / "000.png")}, ["add"], passes)
    assert [row["pass"] for row in result["rejected"]] == ["write"]  # the look was read, no proposal was written
    assert "JSON schema" in critic.prompts[0] and "You describe photos" in critic.prompts[0]


def test_every_part_of_a_request_is_part_of_the_key_of_its_answer(tmp_path):
    with writing() as server, AnswerCache(tmp_path / "a.jsonl") as cache:
        request = Request("look", "s", "u", {}, Image.new("RGB", (20, 20)), 0.0, 10, 0)
        asker = Asker(open_writer(server.url, "tiny", WRITER, 1, 0), cache, Meter())
        changes = {"system": "t", "user": "v", "schema": {"a": 1}, "temperature": 1.0, "max_tokens": 11, "seed": 1}
        changes |= {"image": Image.new("RGB", (20, 20), "red")}
        for name, value in [("system", "s"), *changes.items()]:
            for _ in range(2):
                asker.ask(dataclasses.replace(request, **{name: value}), lambda text: text)
        assert len(server.bodies) == 1 + len(changes)
        asker = Asker(open_writer(server.url, "other", WRITER, 1, 0), cache, Meter())
        asker.ask(request, lambda text: text)
        assert len(server.bodies) == 2 + len(changes)


def test_a_refusal_is_kept_and_a_failure_is_asked_again(tmp_path):
    replies = [{"content": "", "finish_reason": "content_filter"}]
    with serving(lambda n, body: dict(replies[0])) as server:
        said = prepare(server, photos(tmp_path / "photos", 1), tmp_path / "set", code=2)
        assert "refused" in said and len(server.bodies) == 1
        prepare(server, tmp_path / "photos", tmp_path / "set", code=2)
        assert len(server.bodies) == 1
    with serving(lambda n, body: lambda handler: send(handler, 400, b"too large")) as server:
        for count in (1, 2):
            said = prepare(server, tmp_path / "photos", tmp_path / "other", code=2)
            assert "rejected" in said and len(server.bodies) == count
