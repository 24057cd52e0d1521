"""A real vision-language model as the judge, at tiny size, and the commands that run a benchmark from end to end."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import yaml

from npedit.benchmarks import gedit
from npedit.cli import judged as cli_judged
from npedit.critics import _chat
from npedit.critics.base import Critic
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.critics.qwen_vl import QwenVL
from npedit.critics.smolvlm import SmolVLM
from npedit.errors import UserError
from npedit.judges.base import RequestSettings
from npedit.judges.local import LocalJudge, hash_folder
from npedit.judges.server import ServerJudge
from tests.benchmarks.test_imgedit import write_data
from tests.support.command_line import run
from tests.support.judge_server import images_of, picture, serving, text_of, write_edited, write_gedit

ANSWER = '{"score": [7, 8]}'
MANNER = RequestSettings(temperature=0, max_tokens=40)
DIGITS = RequestSettings(temperature=0, max_tokens=1, answer_choices=("0", "1", "2", "3", "4", "5"))


def model_with_digit_tokens(seed: int) -> SmolVLM:
    """A tiny SmolVLM with the words of an answer in its vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chat, "TINY_TEXTS", (*_chat.TINY_TEXTS, ANSWER, "0 1 2 3 4 5 6 7 8 9 10"))
        return SmolVLM.tiny(seed)


def model_that_answers(seed: int) -> SmolVLM:
    """A tiny SmolVLM that answers every question with ANSWER. The layers add nothing, so that each token depends on the
    previous one only. The head is trained on the tokens of ANSWER."""
    critic = model_with_digit_tokens(seed)
    model = critic.model
    for layer in model.model.text_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    said = critic.tokenizer(ANSWER, add_special_tokens=False).input_ids
    words = [critic._prompt_ids("is it ?", [])[-1], *said, critic.tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
    assert len(set(words)) == len(words) and critic.tokenizer.unk_token_id not in words
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor([words[:-1]]))
        states = model.get_decoder()(inputs_embeds=embedded).last_hidden_state[0]
    head = model.lm_head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(head(states), torch.tensor(words[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.requires_grad_(False)
    return critic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its folder, as `from_pretrained` opens it."""
    place = tmp_path_factory.mktemp("judge") / "smolvlm-trained"
    place.mkdir()
    model_that_answers(0).save(place)
    return place


def test_a_local_model_is_opened_by_its_kind_and_answers_in_words(folder):
    judge = LocalJudge.open(str(folder))
    assert judge.family == "smolvlm" and judge.identity["dtype"] == "float32"
    reply = judge.ask("is it ?", [picture(0, (32, 32))], MANNER)
    assert (reply.outcome, reply.text) == ("ok", ANSWER)
    assert reply.text == judge.ask("is it ?", [picture(0, (32, 32))], MANNER).text


def test_the_revision_depends_on_weights_and_not_on_the_folder(folder, tmp_path):
    QwenVL.tiny(0).save(tmp_path / "a")
    QwenVL.tiny(0).save(tmp_path / "b")
    QwenVL.tiny(1).save(tmp_path / "c")
    a, b, c = (hash_folder(tmp_path / n) for n in "abc")
    assert a == b != c
    assert LocalJudge.open(str(tmp_path / "a")).identity == LocalJudge.open(str(tmp_path / "b")).identity


def test_wrong_weights_are_an_error_that_lists_the_supported_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="expected a judge: .*llava_onevision.*qwen3_vl.*got bert"):
        LocalJudge.open(str(tmp_path))
    with pytest.raises(UserError, match="expected a judge"):
        LocalJudge.open("nobody/nothing-of-this-name")


def test_request_settings_that_a_local_model_does_not_support_are_refused(folder):
    judge = LocalJudge.open(str(folder))
    with pytest.raises(UserError, match="shows pictures before the text"):
        judge.check_supported(RequestSettings(0, 10, text_first=True))
    with pytest.raises(UserError, match="limits the answer"):
        judge.check_supported(RequestSettings(0, None))
    toy = LocalJudge(LlavaOnevision.tiny(0), "toy", "llava_onevision", "0")
    with pytest.raises(UserError, match="in one token each"):
        toy.check_supported(DIGITS)


def test_probabilities_of_digits_equal_the_softmax_of_transformers(tmp_path):
    """Against transformers' forward pass: softmax over the whole vocabulary, read at the six digits."""
    model_with_digit_tokens(1).save(tmp_path / "judge")
    judge = LocalJudge.open(str(tmp_path / "judge"))
    judge.check_supported(DIGITS)
    image = picture(3, (32, 32))
    found = json.loads(judge.ask("is it ?", [image], DIGITS).text)["probabilities"]
    critic: Critic = judge.critic
    pixels = critic.processor(image, do_image_splitting=False, return_tensors="pt")["pixel_values"]
    visual_tokens = critic.encode_images(torch.zeros(1, 3, 32, 32))
    row = torch.tensor([critic._prompt_ids("is it ?", visual_tokens)])
    with torch.no_grad():
        logits = critic.model(input_ids=row, pixel_values=pixels).logits[0, -1].double()
    spoken = {w: critic.answer_id(w) for w in DIGITS.answer_choices}
    assert len(set(spoken.values())) == 6
    for word, token in spoken.items():
        assert found[word] == pytest.approx(float(logits.softmax(0)[token]), rel=1e-2)


# ---------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)
    write_gedit(tmp_path / "data", {"text_change": 2})
    return tmp_path


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gedit_with_a_local_judge_from_command_to_files(here, folder):
    said = run("evaluate", "gedit", "--data", "data", "--judge", folder, "--model", "copy", "--out", "r")
    rows = records(here / "r" / "rows.jsonl")
    assert len(rows) == 12 and all(set(r) >= {"id", "task", "scores", "why"} for r in rows)
    for row in rows:
        assert row["scores"] == {"SC": 7.0, "PQ": 7.0, "O": pytest.approx(7.0)} and row["why"] == {}
    summary = json.loads((here / "r" / "summary.json").read_text())
    figure = summary["npedit-edit-v1/en/full/O"]
    assert (figure["value"], figure["n"], figure["coverage"]) == (pytest.approx(7.0), 12, 1.0)
    facts = json.loads((here / "r" / "settings.json").read_text())
    assert facts["judge"]["revision"] == hash_folder(folder) and facts["protocol"]["hash"]
    assert facts["editor"] == {"editor": "copy"} and sum(facts["outcomes"]["O"].values()) == 12
    assert "npedit-edit-v1/en/full macro" in said and "the data hold 12 en" in said
    pictures = here / "r/official/copy/fullset/color_alter/en"
    assert sorted(p.name for p in pictures.iterdir()) == [f"{0:032x}.png", f"{0:032x}_SRCIMG.png"]
    kept = json.loads((here / "r/preservation/summary.json").read_text())
    assert (kept["l1"]["value"], kept["ssim"]["value"], kept["copied"]["n"]) == (0.0, pytest.approx(1.0), 12)
    assert kept["psnr"]["value"] is None and "preservation of the references" in said
    again = run("evaluate", "gedit", "--data", "data", "--judge", folder, "--model", "copy", "--out", "r")
    assert "0 answers came" in again and records(here / "r" / "rows.jsonl") == rows
    other = run(
        "evaluate", "gedit", "--data", "data", "--judge", folder, "--out", "r", "--model", "copy", "--swap", code=2
    )
    assert "is of another" in other and "swap False" in other


def serve_model(judge):
    """What a server does with a request: it shows the pictures to a real model and gives its words back."""
    one_at_a_time = threading.Lock()

    def answer(number, body):
        with one_at_a_time:
            settings = RequestSettings(temperature=0, max_tokens=body["max_tokens"])
            return judge.ask(text_of(body), images_of(body), settings).text

    return answer


def test_a_model_answers_the_same_behind_a_server_and_in_process():
    """The model is not trained on an answer, so that its words depend on the pixels and on the question."""
    judge = LocalJudge(model_with_digit_tokens(3), "tiny", "smolvlm", "x")
    asked = [(text, picture(k, (40, 32))) for k in range(3) for text in ("is it red ?", "is there a fence ?")]
    here = [judge.ask(text, [image, picture(9)], MANNER).text for text, image in asked]
    with serving(serve_model(judge)) as server:
        there = [ServerJudge(server.url, "tiny").ask(text, [image, picture(9)], MANNER) for text, image in asked]
    assert [reply.text for reply in there] == here and len(set(here)) > 1


def test_gedit_judged_through_a_server_with_the_model_behind_it(here, folder):
    words = ("evaluate", "gedit", "--data", "data", "--model", "copy")
    run(*words, "--judge", folder, "--out", "r")
    with serving(serve_model(LocalJudge.open(str(folder)))) as server:
        said = run(*words, "--judge", server.url, "--judge-model", "tiny", "--out", "s")
    assert (
        records(here / "r" / "rows.jsonl") == records(here / "s" / "rows.jsonl") and "24 answers came from tiny" in said
    )
    assert len(server.bodies) == 24  # two questions an item
    a, b = (json.loads((here / n / "summary.json").read_text()) for n in "rs")
    assert a == b


def test_a_judge_of_the_critics_family_gives_a_warning(here, folder, monkeypatch):
    words = ("evaluate", "gedit", "--data", "data", "--judge", folder, "--items", 3, "--steps", 1)
    said = run(*words, "--out", "r")
    assert (
        "of the same family" not in said and "No headline npedit-edit-v1/en/full/O: 25.0% of the items have it" in said
    )
    rows = records(here / "r" / "rows.jsonl")
    assert len(rows) == 3 and all(r["scores"]["O"] == pytest.approx(7.0) for r in rows)
    assert len(list((here / "r/official").rglob("*_SRCIMG.png"))) == 3
    editor = json.loads((here / "r" / "settings.json").read_text())["editor"]
    assert editor["steps"] == 1 and len(editor["weights"]) == 64
    assert cli_judged.critic_families("embedded") == {"llava_onevision"}
    monkeypatch.setattr(cli_judged, "critic_families", lambda model: {"smolvlm"})
    assert "of the same family, smolvlm" in run(*words, "--out", "r")


def test_gedit_with_a_server_and_the_official_scores_read_back(here):
    found = gedit.read_items(here / "data", ("en",), here / "theirs")
    write_edited(here / "theirs", found)
    with serving(lambda *_: '{"score": [9, 4]}') as server:
        common = ("evaluate", "gedit", "--data", "data")
        said = run(*common, "--judge", server.url, "--judge-model", "some/Judge", "--edited", "theirs", "--out", "r")
        assert len(server.bodies) == 24
        assert "4.000" in said and "No headline" not in said
        run(
            *common,
            "--judge",
            server.url,
            "--judge-model",
            "j",
            "--edited",
            "theirs",
            "--protocol",
            "npedit-digits-v1",
            code=2,
        )
    assert not list((here / "theirs").rglob("*_SRCIMG.png"))  # nothing is written into others' folders
    csv = here / "r/official/theirs/some-Judge/eval_results_new/theirs_combined_gpt_score.csv"
    output = run(*common, "--scores", csv, "--out", "s")
    assert "imported/en/full macro" in output
    a, b = (json.loads((here / n / "summary.json").read_text()) for n in "rs")
    assert a["npedit-edit-v1/en/full/O"] == b["imported/en/full/O"] and b["imported/en/full/O"]["value"] == 4.0


def test_imgedit_from_command_to_files(here, folder):
    write_data(here / "img")
    said = run(
        "evaluate", "imgedit", "--data", "img", "--judge", folder, "--model", "copy", "--out", "r", "--items", 4, code=2
    )
    assert "got none of 4 items" in said  # two scores each, not three
    rows = records(here / "r" / "rows.jsonl")
    assert len(rows) == 4 and {w for r in rows for w in r["why"].values()} == {"parse_error"}  # two scores, not three
    assert "No headline npedit-imgedit-v1/O" in said
    kept = records(here / "r/preservation/rows.jsonl")
    assert [r["id"] for r in kept] == [r["id"] for r in rows] and {r["scores"]["copied"] for r in kept} == {1.0}
    assert sorted(p.name for p in (here / "r/official/copy").glob("*.json")) == [
        "average_score.json", "result.json", "typescore.json",
    ]  # fmt: skip


def test_options_that_contradict_each_other_are_refused(here, folder):
    common = ("evaluate", "gedit", "--data", "data")
    assert "give one of them" in run(*common, code=2)
    assert "--language" in run(*common, "--judge", folder, "--language", "fr", code=2)
    assert "belongs to another benchmark" in run(*common, "--judge", folder, "--protocol", "npedit-imgedit-v1", code=2)
    assert "Did you mean 'npedit-edit-v1'" in run(*common, "--judge", folder, "--protocol", "npedit-edit", code=2)
    assert "greedy" in run(*common, "--judge", folder, "--model", "copy", "--repeats", 2, code=2)
    assert "are for servers" in run(*common, "--judge", folder, "--judge-model", "x", code=2)
    assert "nothing is asked" in run(*common, "--scores", "data", "--repeats", 2, code=2)
    assert not list(here.glob("runs/*/official"))


def test_the_critic_families_of_a_run(tmp_path, monkeypatch):
    run_folder = tmp_path / "run"
    (run_folder / "final").mkdir(parents=True)
    (run_folder / "final" / "npedit.json").write_text("{}")
    assert cli_judged.critic_families(str(run_folder)) == set()
    file = run_folder / "config.resolved.yaml"
    file.write_text(yaml.safe_dump({"trainer": {}, "critic": {"name": "internvl", "weights": "x"}}))
    assert (
        cli_judged.critic_families(str(run_folder))
        == {"internvl"}
        == cli_judged.critic_families(str(run_folder / "final"))
    )
    members = [{"name": "qwen_vl", "weights": "x"}, {"name": "smolvlm", "weights": "y"}]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(members))
    file.write_text(
        yaml.safe_dump({"trainer": {}, "critic": {"name": "ensemble", "weights": str(tmp_path / "m.yaml")}})
    )
    assert cli_judged.critic_families(str(run_folder)) == {"qwen_vl", "smolvlm"}
    for damaged in ("- {nam: internvl, weights: x}", "name: internvl", "- ["):
        (tmp_path / "m.yaml").write_text(damaged)
        with pytest.raises(UserError, match=r"m\.yaml"):
            cli_judged.critic_families(str(run_folder))
    file.write_text(yaml.safe_dump({"trainer": {}, "critic": None}))
    assert cli_judged.critic_families(str(run_folder)) == set()
    file.write_text("critic: [")
    with pytest.raises(UserError, match="config"):
        cli_judged.critic_families(str(run_folder))
