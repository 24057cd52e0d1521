"""A judge behind real HTTP that misbehaves in every way: no fault ends as a score, none loses finished answers."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from email.utils import formatdate

import pytest

from npedit.benchmarks import _scorer, gedit
from npedit.benchmarks._headlines import measure_judge_noise
from npedit.benchmarks._protocol import Protocol
from npedit.errors import UserError
from npedit.judges.base import JudgeUnavailable, RequestSettings
from npedit.judges.cache import AnswerCache
from npedit.judges.server import API_KEY_VARIABLE, ServerJudge
from tests.support.judge_server import completion, images_of, picture, send, serving, text_of, write_edited, write_gedit

GOOD = '{"reasoning": "fine", "score": [7, 8]}'
MANNER = RequestSettings(temperature=0, max_tokens=64)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No proxy, no key."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", API_KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def judge_at(server, **more) -> ServerJudge:
    quick = {"timeout": 0.6, "max_attempts": 3, "initial_backoff": 0.01, "workers": 1}
    return ServerJudge(server.url, "tiny", **{**quick, **more})


def ask(answer, settings=MANNER, **more):
    """The reply to one question, and the server."""
    with serving(answer) as server:
        return judge_at(server, **more).ask("Look!", [picture(0), picture(1)], settings), server


# ------------------------------------------------------------------------------------------------------ the protocol


def test_a_request_is_one_user_message_with_pictures_first(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    reply, server = ask(lambda *_: GOOD)
    assert (reply.outcome, reply.text, reply.served_by) == ("ok", GOOD, "tiny-1")
    assert reply.usage == {"prompt_tokens": 100, "completion_tokens": 7}
    (body,), (headers,) = server.bodies, server.headers
    assert body["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 64)
    assert [m["role"] for m in body["messages"]] == ["user"] and text_of(body) == "Look!"
    assert [p["type"] for p in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    for k, sent in enumerate(images_of(body)):
        assert sent.format == "PNG" and sent.tobytes() == picture(k).tobytes()


def test_official_request_settings_send_text_first_jpeg_and_no_temperature():
    _, server = ask(lambda *_: GOOD, RequestSettings(None, None, text_first=True, jpeg_quality=75))
    (body,) = server.bodies
    assert "temperature" not in body and "max_tokens" not in body and "Authorization" not in server.headers[0]
    assert [p["type"] for p in body["messages"][0]["content"]] == ["text", "image_url", "image_url"]
    assert [im.format for im in images_of(body)] == ["JPEG", "JPEG"]


def test_invalid_addresses_and_unsupported_settings_are_refused():
    for url in (
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://user:key@x/v1",
        "http://x/v1?key=1",
        "http://[::1",
        "http://a b/",
        "http://x:y/",
    ):
        with pytest.raises(UserError):
            ServerJudge(url, "m")
    with pytest.raises(UserError, match="--judge-model"):
        ServerJudge("http://x/v1", "")
    with pytest.raises(UserError, match="expected a local judge"):
        ServerJudge("http://x/v1", "m").check_supported(RequestSettings(0, 1, answer_choices=("0", "1")))


# ------------------------------------------------------------------------------------------------------------ faults


def status(code, said="", **headers):
    body = json.dumps({"error": {"message": said, "code": said}}).encode()
    return lambda handler: send(handler, code, body, **headers)


def slow(handler):
    time.sleep(1.2)


def drip(handler):
    """A body that comes byte by byte: no single wait is long."""
    body = completion(GOOD)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for i in range(len(body)):
        handler.wfile.write(body[i : i + 1])
        handler.wfile.flush()
        time.sleep(0.1)


def cut(handler):
    """Half of a good body, then nothing."""
    body = completion(GOOD)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def reset(handler):
    """A connection torn down before a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def broken(body):
    return lambda handler: send(handler, 200, body)


TEMPORARY_FAULTS = {
    "rate limit": status(429, "rate_limit_exceeded"),
    "overload": status(503),
    "server error": status(500, "boom"),
    "bad gateway": lambda h: send(h, 502, b"<html>nginx</html>"),
    "time-out": slow,
    "drip": drip,
    "cut": cut,
    "reset": reset,
    "half json": broken(completion(GOOD)[:40]),
    "empty": broken(b""),
    "no choice": broken(b'{"choices": []}'),
    "error in a 200": broken(b'{"error": {"message": "overloaded"}}'),
    "a list": broken(b"[]"),
    "null message": broken(b'{"choices": [{"message": null}]}'),
}


@pytest.mark.parametrize("fault", TEMPORARY_FAULTS)
def test_a_temporary_fault_is_retried(fault):
    reply, server = ask(lambda n, _: TEMPORARY_FAULTS[fault] if n < 1 else GOOD)
    assert (reply.outcome, reply.text) == ("ok", GOOD) and len(server.bodies) == 2
    assert server.bodies[0] == server.bodies[1]


@pytest.mark.parametrize("fault", ["rate limit", "reset", "half json", "cut"])
def test_a_permanent_fault_is_a_missing_answer(fault):
    reply, server = ask(lambda *_: TEMPORARY_FAULTS[fault])
    assert reply.outcome == "transport_error" and not reply.text and len(server.bodies) == 3
    assert "3 attempts" in reply.detail


@pytest.mark.parametrize("wait", ["0.4", "date"])
def test_retry_after_is_respected(wait):
    def answer(n, _):
        value = formatdate(time.time() + 2, usegmt=True) if wait == "date" else wait
        return status(429, "slow down", Retry_After=value) if n < 1 else GOOD

    start = time.monotonic()
    reply, _ = ask(answer)
    assert reply.outcome == "ok" and time.monotonic() - start >= 0.4


def test_a_server_that_is_not_there_stops_the_run_within_seconds():
    lines = []
    with serving(lambda *_: GOOD) as server:
        judge = judge_at(server, max_attempts=6, on_retry=lines.append)
    start = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="expected a server at .*refused"):
        judge.ask("Look!", [], MANNER)
    assert time.monotonic() - start < 5 and len(lines) == 2


def test_a_login_page_stops_the_run_at_once():
    with serving(lambda *_: broken(b"<html>please log in</html>")) as server:
        with pytest.raises(JudgeUnavailable, match="please log in"):
            judge_at(server).ask("Look!", [], MANNER)
        assert len(server.bodies) == 1


def test_each_wait_for_a_retry_is_reported():
    lines = []
    reply, _ = ask(lambda n, _: status(503, "busy") if n < 1 else GOOD, on_retry=lines.append)
    assert reply.outcome == "ok" and len(lines) == 1 and "HTTP 503" in lines[0] and "attempt 2 of 3" in lines[0]
    assert "http://127.0.0.1:" in lines[0]


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r", "\u201csk-secret\u201d", "sk secret", "sk-secr\u00e9t"])
def test_an_invalid_key_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, key)
    with pytest.raises(UserError, match=API_KEY_VARIABLE) as caught:
        ServerJudge("http://localhost:1/v1", "m")
    assert "secr" not in str(caught.value) and caught.value.__cause__ is None


def test_a_key_that_the_server_repeats_reaches_neither_message_nor_file(bench, tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-very-secret")
    with serving(lambda *_: status(401, "Incorrect API key: sk-very-secret")) as server:
        with pytest.raises(JudgeUnavailable) as caught:
            run(server, bench, tmp_path / "a.jsonl")
    assert "secret" not in str(caught.value) and "[the key]" in str(caught.value)
    with serving(lambda *_: {"content": "your key is sk-very-secret"}) as server:
        with pytest.raises(JudgeUnavailable) as caught:
            run(server, bench, tmp_path / "a.jsonl")
    assert "secret" not in str(caught.value) + (tmp_path / "a.jsonl").read_text()


def test_the_users_parameters_replace_the_protocols():
    given = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None, "extra": {"a": 1}}
    _, server = ask(lambda *_: GOOD, parameters=given)
    (body,) = server.bodies
    assert "max_tokens" not in body and "temperature" not in body
    assert (body["max_completion_tokens"], body["extra"]) == (9, {"a": 1})
    with pytest.raises(UserError, match="messages"):
        ServerJudge("http://x/v1", "m", parameters={"messages": []})


REFUSALS = {
    "filter as status": status(400, "content_filter"),
    "policy": status(400, "Your request was rejected as a result of our safety system."),
    "filter as reason": {"content": GOOD, "finish_reason": "content_filter"},
    "refusal": {"content": None, "message": {"refusal": "I can't help with that."}},
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_refusals_are_final(fault):
    said = REFUSALS[fault]
    reply, server = ask(lambda *_: dict(said) if isinstance(said, dict) else said)
    assert reply.outcome == "refused" and len(server.bodies) == 1


def test_a_request_that_does_not_fit_is_rejected_and_not_repeated():
    for code in (400, 413, 422):
        reply, server = ask(lambda *_, code=code: status(code, "maximum context length"))
        assert reply.outcome == "rejected" and len(server.bodies) == 1 and "context" in reply.detail


@pytest.mark.parametrize(
    "fault",
    [status(401), status(403), status(404, "no such model"), status(402), status(429, "insufficient_quota")],
)
def test_errors_that_concern_every_request_stop_the_run(fault):
    with pytest.raises(JudgeUnavailable):
        ask(lambda *_: fault)


def test_a_redirect_is_not_followed_and_the_key_is_not_sent_on(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serving(lambda *_: GOOD) as other:
        for code in (301, 302, 307, 308):
            with pytest.raises(JudgeUnavailable, match=f"HTTP {code}"):
                ask(lambda *_, code=code: status(code, Location=f"{other.url}/chat/completions"))
        assert not other.bodies


# -------------------------------------------------------------------------------------------------- a whole benchmark


@pytest.fixture
def bench(tmp_path):
    """An item of each task, two of some, and edited pictures."""
    data = write_gedit(tmp_path / "data", dict.fromkeys(gedit.TASKS[:4], 2))
    found = gedit.read_items(data, ("en",), tmp_path / "edited")
    write_edited(tmp_path / "edited", found)
    return found


def scores_of(body):
    """A judgement that depends on the pictures and the question alone."""
    kind = len(images_of(body))
    value = sum(images_of(body)[-1].tobytes()[:50]) % 11
    return json.dumps({"reasoning": f"{kind} pictures", "score": [value, 10 - kind]})


def run(server, found, answers, passes=None, name="npedit-edit-v1", on_progress=lambda *_: None, **more):
    protocol = Protocol.load(name)
    with AnswerCache(answers) as cache:
        scorer = _scorer.Scorer(
            judge_at(server, **more), protocol, cache, passes or _scorer.RepeatSettings(), gedit.combine_numbers
        )
        return _scorer.score_items(
            scorer, found, lambda row: gedit.add_overall_score(row, protocol.overall), on_progress
        )


FAULTS = [
    *TEMPORARY_FAULTS.values(), *(v for v in REFUSALS.values() if callable(v)), status(413), "nonsense", "",
    '{"score":[11,3]}', '{"score": [5]}', '{"score": [1, 2', "I cannot judge people.", "5",
]  # fmt: skip


def test_no_fault_becomes_a_score(bench, tmp_path):
    """Two questions of three meet a fault at each attempt; what is scored equals the run without faults."""
    quick = [f for f in FAULTS if f not in (slow, drip)]
    with serving(lambda _, body: scores_of(body)) as server:
        clean = run(server, bench, tmp_path / "clean.jsonl")
    assert all(v is not None for row in clean for v in row["scores"].values())
    asked: dict[bytes, int] = {}
    lock = threading.Lock()

    def answer(_, body):
        with lock:
            place = asked.setdefault(images_of(body)[-1].tobytes() + text_of(body)[:60].encode(), len(asked))
        return scores_of(body) if place % 3 == 0 else quick[(place - place // 3 - 1) % len(quick)]

    with serving(answer) as server:
        faulty = run(server, bench, tmp_path / "faulty.jsonl", max_attempts=2)
    missing = 0
    for before, after in zip(clean, faulty):
        assert before["id"] == after["id"]
        for name, value in after["scores"].items():
            assert value is None or value == before["scores"][name]
            assert (value is None) == (name in after["why"])
            missing += value is None
    assert missing >= 20
    outcomes = {why for row in faulty for why in row["why"].values()}
    assert {"transport_error", "parse_error", "refused", "rejected", "range_error"} <= outcomes
    summary = gedit.summarise(faulty, bench, 0.99, "p")
    assert all(s["value"] is None and s["coverage"] < 0.99 for s in summary.values())


def test_an_unreadable_answer_is_asked_for_again_with_a_reminder(bench, tmp_path):
    with serving(lambda n, body: "Nice!" if n % 2 == 0 else GOOD) as server:
        rows = run(server, bench[:1], tmp_path / "a.jsonl")
    assert rows[0]["scores"] == {"SC": 7.0, "PQ": 7.0, "O": 7.0} and len(server.bodies) == 4
    texts = [text_of(b) for b in server.bodies]
    assert "one JSON object and nothing else" in texts[1] and texts[1].startswith(texts[0])


def test_a_second_run_asks_only_about_changed_pixels(bench, tmp_path):
    with serving(lambda _, body: scores_of(body)) as server:
        first = run(server, bench, tmp_path / "a.jsonl")
        assert len(server.bodies) == 2 * len(bench)
        assert run(server, bench, tmp_path / "a.jsonl") == first and len(server.bodies) == 2 * len(bench)
        picture(99).save(bench[3].edited)
        second = run(server, bench, tmp_path / "a.jsonl")
        assert len(server.bodies) == 2 * len(bench) + 2
        assert [a == b for a, b in zip(first, second)].count(False) <= 1
        bench[3].edited.rename(tmp_path / "moved.png")  # missing, and the judge is not asked
        assert run(server, bench, tmp_path / "a.jsonl")[3]["why"]["O"] == "missing_image"
        run(server, bench[:1], tmp_path / "a.jsonl", revision="other")
        assert len(server.bodies) == 2 * len(bench) + 4


def test_a_server_that_dies_stops_the_run_and_what_was_answered_is_kept(bench, tmp_path):
    def answer(n, body):
        return scores_of(body) if n < 15 else reset

    with serving(answer) as server:
        with pytest.raises(JudgeUnavailable, match="8 calls in a row.*15 answers are kept"):
            run(server, bench, tmp_path / "a.jsonl", max_attempts=1)
        server.answer = lambda _, body: scores_of(body)
        before = len(server.bodies)
        rows = run(server, bench, tmp_path / "a.jsonl")
        assert len(server.bodies) - before == 2 * len(bench) - 15
    assert all(row["scores"]["O"] is not None for row in rows)


def test_a_wrong_key_stops_all_workers_at_once(bench, tmp_path):
    with serving(lambda *_: status(401, "bad key")) as server:
        with pytest.raises(JudgeUnavailable, match="NPEDIT_JUDGE_KEY"):
            run(server, bench, tmp_path / "a.jsonl", workers=4)
        assert len(server.bodies) <= 8


def test_ctrl_c_keeps_what_was_answered(bench, tmp_path):
    def interrupt(done, _):
        if done == 4:
            raise KeyboardInterrupt

    with serving(lambda _, body: scores_of(body)) as server:
        with pytest.raises(KeyboardInterrupt):
            run(server, bench, tmp_path / "a.jsonl", on_progress=interrupt)
        kept = len(server.bodies)
        run(server, bench, tmp_path / "a.jsonl")
        assert 8 <= kept < 2 * len(bench) and len(server.bodies) == 2 * len(bench)


def test_several_workers_give_the_same_rows(bench, tmp_path):
    with serving(lambda _, body: scores_of(body)) as server:
        assert run(server, bench, tmp_path / "a.jsonl") == run(server, bench, tmp_path / "b.jsonl", workers=8)


def test_sc_shows_both_pictures_and_pq_only_the_edited_one(bench, tmp_path):
    with serving(lambda *_: GOOD) as server:
        run(server, bench[:1], tmp_path / "a.jsonl")
    sc, pq = server.bodies
    assert [im.tobytes() for im in images_of(sc)] == [bench[0].source().tobytes(), picture(50_000).tobytes()]
    assert [im.tobytes() for im in images_of(pq)] == [picture(50_000).tobytes()]
    assert bench[0].instruction in text_of(sc) and bench[0].instruction not in text_of(pq)


def test_repeats_and_swapped_pictures(bench, tmp_path):
    """SC is asked twice in each order and PQ twice; means over passes, and the spread of both kinds."""
    values = {(False, 0): 4, (False, 1): 6, (True, 0): 8, (True, 1): 10}
    asked = dict.fromkeys((False, True), 0)

    def answer(_, body):
        images = images_of(body)
        if len(images) == 1:
            return '{"score": [4, 9]}'
        exchanged = images[0].tobytes() == picture(50_000).tobytes()
        assert ("one that came out, then" in " ".join(text_of(body).split())) == exchanged
        value = values[exchanged, asked[exchanged]]
        asked[exchanged] += 1
        return json.dumps({"score": [10, value]})

    passes = _scorer.RepeatSettings(repeats=2, swap=True)
    with serving(answer) as server:
        rows = run(server, bench[:1], tmp_path / "a.jsonl", passes)
        assert len(server.bodies) == 6
    assert rows[0]["scores"] == {"SC": 7.0, "PQ": 4.0, "O": pytest.approx(28**0.5)}
    assert rows[0]["numbers"]["SC"] == [[10, 4], [10, 6], [10, 8], [10, 10]]
    noise = measure_judge_noise(rows, 2, True, min)
    assert noise == {"SC": {"repeat_sd": pytest.approx(2**0.5), "order_gap": 4.0}, "PQ": {"repeat_sd": 0.0}}
    with serving(lambda _, body: answer(0, body) if len(images_of(body)) == 1 or asked[True] < 2 else "no") as server:
        asked.update({False: 0, True: 2})
        rows = run(server, bench[:1], tmp_path / "b.jsonl", _scorer.RepeatSettings(swap=True))
    assert rows[0]["scores"]["SC"] is None and rows[0]["why"]["SC"] == "parse_error"  # one order alone is one-sided


# ------------------------------------------------------------------------------------------------ what cannot go well


def test_five_equal_rejections_stop_the_run_and_show_the_servers_message(bench, tmp_path):
    words = "Unsupported parameter: use max_completion_tokens (request {})"
    with serving(lambda n, _: status(400, words.format(1000 + n))) as server:
        with pytest.raises(
            JudgeUnavailable, match="5 requests in a row.*use max_completion_tokens.*--judge-parameters"
        ):
            run(server, bench, tmp_path / "a.jsonl")
        assert len(server.bodies) == 5


def test_ten_unreadable_answers_with_none_read_stop_the_run_with_an_excerpt(bench, tmp_path):
    with serving(lambda *_: {"content": None, "finish_reason": "length"}) as server:
        with pytest.raises(JudgeUnavailable, match="can read none.*length.*cut off by the token limit"):
            run(server, bench, tmp_path / "a.jsonl")
        assert len(server.bodies) == 10
    with serving(lambda *_: "What a nice picture!") as server:
        with pytest.raises(JudgeUnavailable, match="What a nice picture!"):
            run(server, bench, tmp_path / "b.jsonl")


def test_an_interruption_ends_within_seconds_though_the_server_never_answers(bench, tmp_path):
    released = threading.Event()

    def answer(n, body):
        return scores_of(body) if n < 4 else lambda handler: released.wait(30)

    def interrupt(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with serving(answer) as server:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(server, bench, tmp_path / "a.jsonl", on_progress=interrupt, timeout=60, workers=1)
        assert time.monotonic() - start < 10
        with AnswerCache(tmp_path / "a.jsonl") as cache:
            assert len(cache) == 4
        released.set()


def test_a_run_resumes_at_another_address(bench, tmp_path):
    with serving(lambda _, body: scores_of(body)) as first:
        run(first, bench[:3], tmp_path / "a.jsonl")
    with serving(lambda _, body: scores_of(body)) as second:
        run(second, bench[:5], tmp_path / "a.jsonl")
        assert len(second.bodies) == 4
    with AnswerCache(tmp_path / "a.jsonl") as cache:
        assert cache.count_answers_by_address() == {first.url: 6, second.url: 4}
