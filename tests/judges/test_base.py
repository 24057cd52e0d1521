"""What becomes of a judge's words, what is kept of them, and which texts it is asked with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from npedit.benchmarks._answers import parse_scores
from npedit.benchmarks._protocol import PROTOCOL_FOLDER, Protocol, available_protocols
from npedit.errors import UserError
from npedit.judges.base import guess_critic_family
from npedit.judges.cache import AnswerCache, answer_cache_key
from tests.support.judge_server import picture

GOOD = '{"reasoning": "fine", "score": [7, 8]}'
VIE = """
_context_no_delimit = "CONTEXT"
_prompts_0shot_two_image_edit_rule = '''TWO'''
_prompts_0shot_tie_rule_SC = "SC of <instruction>"
_prompts_0shot_rule_PQ = "PQ"
open("/nowhere/at/all")
"""

# ----------------------------------------------------------------------------------------------------------- answers

READ = [
    (GOOD, (7, 8)),
    (f"```json\n{GOOD}\n```", (7, 8)),
    (f"<think>perhaps {{'score': [1, 1]}}?</think>{GOOD}", (7, 8)),
    (f"so I think [1, 2]</think>\n{GOOD}", (7, 8)),
    (f"||V^=^V||\n{GOOD}\n||V^=^V||", (7, 8)),
    (f"First {{let me see}} the pictures. {GOOD} That is all.", (7, 8)),
    ('{"score": [0, 10], "reasoning": "braces } and { in \\" words"}', (0, 10)),
    ('{"score": [7.5, 8], "reasoning": "a\nbroken line"}', (7.5, 8)),
    ("{'score': [7, 8,], 'reasoning': 'python'}", (7, 8)),
    (f"{GOOD}\n{GOOD}", (7, 8)),
    ("[7, 8]", (7, 8)),
    ('{"score": [7, 8], "details": {"score": [1, 1]}}', (7, 8)),
    ('{"评分": 1, "score": [3, 4], "reasoning": "编辑成功"}', (3, 4)),
]
NOT_READ = [
    "", " ", "7", "7, 8", "I cannot help with that.", "无法评价", "{}", "[]", "[7]", "[7, 8, 9]", "{", "[7, 8",
    '{"score": [7, 8]', '{"score": 7}', '{"score": [7]}', '{"score": [7, 8, 9]}', '{"score": []}', '{"score": null}',
    '{"score": [true, false]}', '{"score": [NaN, 3]}', '{"score": [Infinity, 3]}',
    '{"score": [[7, 8]]}', '{"score": {"a": 7, "b": 8}}', '{"scores": [7, 8]}', "rate_limit_exceeded",
    f'{GOOD} or rather {{"score": [1, 2]}}', "<think>[7, 8] would be fair", '<think>{"score": [7, 8]}',
    "first 7 and then 8", "x" * 5 + "{" * 20_000, "[" * 20_000, '{"score": [7, 8] is my view}',
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), READ)
def test_readable_answers(text, wanted):
    assert parse_scores("json", text, 2, 0, 10) == ("ok", tuple(float(x) for x in wanted))


@pytest.mark.parametrize("text", NOT_READ)
def test_unreadable_answers_have_no_scores(text):
    assert parse_scores("json", text, 2, 0, 10) == ("parse_error", ())


@pytest.mark.parametrize("score", ["[11, 3]", "[-1, 3]", "[3, 10.01]", "[100, 100]"])
def test_scores_outside_the_scale_are_missing(score):
    assert parse_scores("json", f'{{"score": {score}}}', 2, 0, 10) == ("range_error", ())


def test_a_single_score_needs_no_list():
    assert parse_scores("json", '{"score": 0}', 1, 0, 10) == ("ok", (0.0,))
    assert parse_scores("json", "4", 1, 0, 10) == ("ok", (4.0,))


LINES = "Brief reasoning: fine, though: small flaws.\n**Prompt Compliance:** 5\nVisual Naturalness: 4\n- Detail: 3/5\n"


def test_one_score_in_each_line():
    assert parse_scores("lines", LINES, 3, 1, 5) == ("ok", (5.0, 4.0, 3.0))
    assert parse_scores("lines", LINES.replace("4", "0"), 3, 1, 5) == ("range_error", ())
    assert parse_scores("lines", LINES.replace("4", "four"), 3, 1, 5) == ("parse_error", ())
    assert parse_scores("lines", LINES + "Total: 4", 3, 1, 5) == ("parse_error", ())
    assert parse_scores("lines", "", 3, 1, 5) == ("parse_error", ())


def test_the_expected_value_of_a_digit():
    """2 * (0.4 * 5 + 0.4 * 3 + 0.1 * 0) / 0.9; the tenth that is left is on other words."""
    probabilities = {"0": 0.1, "1": 0.0, "2": 0.0, "3": 0.4, "4": 0.0, "5": 0.4}
    outcome, (score,) = parse_scores("digits", json.dumps({"probabilities": probabilities}), 1, 0, 10)
    assert outcome == "ok" and score == pytest.approx(64 / 9, abs=1e-12)
    sure = dict.fromkeys(probabilities, 0.0) | {"5": 0.7}
    assert parse_scores("digits", json.dumps({"probabilities": sure}), 1, 0, 10) == ("ok", (10.0,))
    elsewhere = {w: p / 2 for w, p in probabilities.items()}
    assert parse_scores("digits", json.dumps({"probabilities": elsewhere}), 1, 0, 10) == ("parse_error", ())


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_returns_only_answers_and_refusals(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerCache(path) as cache:
        for outcome in ("ok", "refused", "rejected", "transport_error"):
            cache.put({"key": outcome, "outcome": outcome, "text": "é", "usage": {"prompt_tokens": 2}})
        with pytest.raises(UserError, match="another evaluation writes it"):
            AnswerCache(path)
    with AnswerCache(path) as again:
        assert len(again) == 2 and again.get("ok")["text"] == "é" and again.get("refused")
        assert again.get("rejected") is None and again.get("transport_error") is None
        assert again.total_token_usage() == {"prompt_tokens": 4}


def test_answers_of_any_length_are_read_from_the_file(tmp_path):
    texts = {"a": "x" * 200_000, "b": "é\n", "c": "y" * (1 << 16)}
    with AnswerCache(tmp_path / "answers.jsonl") as cache:
        for key, text in texts.items():
            cache.put({"key": key, "outcome": "ok", "text": text})
        assert {key: cache.get(key)["text"] for key in texts} == texts
    with AnswerCache(tmp_path / "answers.jsonl") as again:
        assert {key: again.get(key)["text"] for key in texts} == texts and again.get("d") is None


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_cut_last_line_loses_only_that_answer(tmp_path, cut):
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache:
        for k in "abc":
            cache.put({"key": k, "outcome": "ok", "text": ""})
    path.write_bytes(path.read_bytes()[:-cut])
    with AnswerCache(path) as cache:
        assert cache.get("a") and cache.get("b") and not cache.get("c")
        cache.put({"key": "d", "outcome": "ok"})
    with AnswerCache(path) as cache:
        assert [bool(cache.get(k)) for k in "abcd"] == [True, True, False, True]


@pytest.mark.parametrize("line", [b"nonsense", b"", b"\0\0\0", b"\xff\xfe", b"[1]", b'{"outcome": "ok"}'])
def test_a_damaged_line_is_skipped_and_counted(tmp_path, line, caplog):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key": "a", "outcome": "ok"}\n' + line + b'\n{"key": "b", "outcome": "ok"}\n')
    with AnswerCache(path) as cache:
        assert len(cache) == 2 and cache.get("a") and cache.get("b")
    assert "1 damaged lines of 3 are skipped (2)" in caplog.text


def test_a_key_covers_pixels_order_and_every_fact():
    a, b = picture(0), picture(1)
    facts = {"protocol": "p", "judge": {"model": "m", "revision": "r"}, "prompt": "q", "pass": 0, "attempt": 0}
    keys = {answer_cache_key([a, b], **facts), answer_cache_key([b, a], **facts), answer_cache_key([a], **facts)}
    changed = a.copy()
    changed.putpixel((0, 0), tuple(255 - v for v in a.getpixel((0, 0))))
    keys |= {
        answer_cache_key([changed, b], **facts),
        answer_cache_key([Image.frombytes("RGB", a.size[::-1], a.tobytes()), b], **facts),
    }
    for name, other in (("protocol", "P"), ("prompt", "q "), ("pass", 1), ("attempt", 1)):
        keys.add(answer_cache_key([a, b], **{**facts, name: other}))
    keys.add(answer_cache_key([a, b], **{**facts, "judge": {"model": "m", "revision": "s"}}))
    assert len(keys) == 10
    assert answer_cache_key([a.copy(), b.copy()], **facts) in keys  # of pixels, not of objects or files


# --------------------------------------------------------------------------------------------------------- protocols


def test_npedits_protocols_are_complete_and_differ():
    own = [n for n in available_protocols() if n.startswith("npedit-")]
    loaded = [Protocol.load(n) for n in own]
    assert len(own) == 3 and len({p.hash for p in loaded}) == 3 and len({p.prompts_hash for p in loaded}) == 3
    for protocol in loaded:
        for question in protocol.questions:
            for task in question.texts:
                prompts = question.prompts(task or "any", "A <instruction> {x}")
                shown = "source" in question.pictures
                assert all(("A <instruction> {x}" in p) == shown and "<criteria>" not in p for p in prompts)
                other = question.prompts(task or "any", "A <instruction> {x}", swapped=True) if question.swapped else []
                assert not shown or (len(other) == len(prompts) and set(other).isdisjoint(prompts))
    assert "texts" not in json.dumps(loaded[0].to_record()) and loaded[0].to_record()["hash"] == loaded[0].hash


def test_the_hash_covers_every_field():
    protocol = Protocol.load("npedit-edit-v1")
    settings, question = protocol.request_settings, protocol.questions[0]
    others = [
        replace(protocol, tries=3),
        replace(protocol, resize="source"),
        replace(protocol, request_settings=replace(settings, max_tokens=9)),
        replace(protocol, request_settings=replace(settings, temperature=0.5)),
        replace(protocol, questions=(replace(question, texts={"": ("x <instruction>",)}), *protocol.questions[1:])),
    ]
    assert len({protocol.hash, *(o.hash for o in others)}) == 6


def test_the_record_of_a_protocol_keeps_its_keys_and_its_hash():
    """Kept answers are found by the hash: a renamed field of the class must not change the record."""
    protocol = Protocol.load("npedit-edit-v1")
    keys = "name answer low high overall resize manner tries reminder questions hash prompts_hash"
    assert set(protocol.to_record()) == set(keys.split())
    assert set(protocol.to_record()["manner"]) == {"temperature", "max_tokens", "text_first", "jpeg_quality", "options"}
    assert protocol.hash == "191dc593fb974134ea2f487cc36908be95bf5e5600e3b9f22e347f49e1671b60"


def test_official_texts_are_read_from_a_folder_and_not_run(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "vie_prompts.py").write_text(VIE)
    gpt, qwen = (Protocol.load(n, tmp_path) for n in ("viescore-gpt", "viescore-qwen"))
    sc, pq = gpt.questions
    assert sc.prompts("any", "paint <instruction>") == ["CONTEXT\nTWO\nSC of paint <instruction>"]
    assert pq.prompts("any", "paint it") == ["CONTEXT\nPQ"]
    assert gpt.prompts_hash == qwen.prompts_hash and gpt.hash != qwen.hash
    assert (
        gpt.request_settings.text_first
        and gpt.request_settings.jpeg_quality == 75
        and gpt.request_settings.temperature is None
    )
    assert gpt.resize == "source" and qwen.request_settings.max_tokens == 512 and not qwen.request_settings.text_first
    (tmp_path / "deep" / "vie_prompts.py").write_text(VIE.replace("SC of", "SC  of"))
    assert Protocol.load("viescore-gpt", tmp_path).prompts_hash != gpt.prompts_hash


@pytest.mark.parametrize("package", ["evalscope/benchmarks/image_edit/gedit", "lmms_eval/tasks/gedit_bench/viescore"])
def test_official_texts_are_read_from_an_installed_package(tmp_path, monkeypatch, package):
    folder = tmp_path / package
    folder.mkdir(parents=True)
    (tmp_path / package.split("/")[0] / "__init__.py").write_text("raise RuntimeError('it must not be run')")
    (folder / "vie_prompts.py").write_text(VIE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Protocol.load("viescore-gpt").questions[1].prompts("", "") == ["CONTEXT\nPQ"]


def test_official_texts_of_imgedit_are_read(tmp_path):
    texts = {"add": "ADD <edit_prompt>.", "style": "STYLE <edit_prompt>."}
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    (tmp_path / "prompt.py").write_text(f"IMGEDIT_PROMPTS = {texts!r}\n")
    a, b = (Protocol.load("imgedit-gpt", tmp_path / n) for n in ("prompts.json", "prompt.py"))
    assert a.questions[0].prompts("add", "a cat") == ["ADD a cat."] and a.prompts_hash == b.prompts_hash
    with pytest.raises(UserError, match="expected an edit type among add, style; got 'remove'"):
        a.questions[0].prompts("remove", "a cat")


def test_missing_texts_are_an_error(tmp_path):
    with pytest.raises(UserError, match="--no-deps lmms-eval"):
        Protocol.load("viescore-gpt")
    with pytest.raises(UserError, match="found none"):
        Protocol.load("viescore-gpt", tmp_path)
    (tmp_path / "vie_prompts.py").write_text(VIE.replace("tie_rule_SC", "tie_rule"))
    with pytest.raises(UserError, match="got none of .'_prompts_0shot_tie_rule_SC'"):
        Protocol.load("viescore-gpt", tmp_path)
    (tmp_path / "vie_prompts.py").write_text(VIE.replace("<instruction>", "it"))
    with pytest.raises(UserError, match="one placeholder"):
        Protocol.load("viescore-gpt", tmp_path)
    (tmp_path / "vie_prompts.py").write_text("def broken(")
    with pytest.raises(UserError, match="cannot be read"):
        Protocol.load("viescore-gpt", tmp_path)
    with pytest.raises(UserError, match="has its own texts"):
        Protocol.load("npedit-edit-v1", tmp_path)
    with pytest.raises(UserError, match="Did you mean 'viescore-gpt'"):
        Protocol.load("viescore")


def test_no_published_text_is_in_the_package():
    """Marks of VIEScore's and ImgEdit's wording, taken apart here so that this file has none either."""
    marks = ("professional digital " + "artist", "data " + "rater", "over" + "editing", "privacy " + "confidential")
    for path in PROTOCOL_FOLDER.glob("*.yaml"):
        assert not [m for m in marks if m in path.read_text(encoding="utf-8").lower()], path


def test_the_critic_family_is_guessed_from_the_models_name():
    assert guess_critic_family("Qwen/Qwen2.5-VL-72B-Instruct-AWQ") == guess_critic_family("qwen3_vl_8b") == "qwen_vl"
    assert guess_critic_family("OpenGVLab/InternVL3-14B-hf") == "internvl"
    assert guess_critic_family("llava-hf/llava-onevision-qwen2-7b-ov-hf") == "llava_onevision"
    assert guess_critic_family("gpt-4.1-2025-04-14") == ""
