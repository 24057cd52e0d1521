"""A run that starts from another's editor, and one that a held-out judge looks at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from npedit import generator
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.export import card as export_card
from npedit.families.flux import Flux
from npedit.generator import edit_images
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs import checkpoint, files
from npedit.runs.resolve import resolve_editor
from npedit.scoring.critic_scores import score_with_critic
from npedit.steps.base import Judge, Parts
from npedit.training import evaluation, trainer
from npedit.training.samples import evaluation_batches

TRAINER = {"save_every": 1, "sample_items": 1, "steps": 1, "sample_every": 0, "evaluate_every": 0}


def recipe(step: str, data: str = "toy", **changes) -> Recipe:
    settings = {"steps": 1, "student": {"lr": 1e-3}} if step != "flow_grpo" else {"sampling_steps": 2, "group": 2}
    settings |= {"fake_updates": 1} if step == "np_edit" else {}
    stage = {"step": step, "updates": 2, "batch_size": 2, "settings": settings}
    return make_recipe(
        {"name": "small", "family": {"name": "flux"}, "critic": {"name": "llava_onevision"}, "data": {"name": data},
         "stages": [stage], "trainer": TRAINER}
        | changes
    )  # fmt: skip


def parts(made: Recipe) -> Parts:
    judge = Judge(LlavaOnevision.tiny(1), "short") if made.judge else None
    device = torch.device("cpu")
    return Parts(Flux.tiny(0), LlavaOnevision.tiny(0), "short", device, made.lora, judge=judge)


def train(made: Recipe, run: Path, **more) -> Path:
    return trainer.train(made, run, parts=parts, **more)


class Crash(Exception):
    """Ends a run without warning."""


def train_until(update: int, made: Recipe, run: Path) -> Path:
    """Train to the end of this update. The finished editor and the report are left out: they take longest."""

    def crash(name: str, facts: dict) -> None:
        if name == "update" and facts["step"] == update:
            raise Crash

    with pytest.raises(Crash):
        train(made, run, on_event=crash)
    return run


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe("supervised", "toy_pairs"), tmp_path_factory.mktemp("first") / "run")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 6.0}])
def test_the_student_starts_from_the_other_runs_editor(tmp_path: Path, lora: dict | None) -> None:
    first = train(recipe("reference_copy", lora=lora), tmp_path / "first")
    slow = recipe("reference_copy", lora=lora, start=str(first)).model_dump(mode="json")
    slow["stages"][0]["settings"]["student"]["lr"] = 1e-12  # so that it stays where it starts
    slow["data"] = {"name": "toy"}
    second = train_until(2, make_recipe(slow), tmp_path / "second")
    a, b = (checkpoint.load_checkpoint(r / "checkpoint-000002")[0] for r in (first, second))
    names = [k for k in a if k.startswith("student/ema.")]
    assert names and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-6) for k in names)
    fresh = parts(recipe("reference_copy", lora=lora)).create_trainable("student", 0)
    assert any(not torch.equal(p, a[f"student/ema.{n}"]) for n, p in fresh.named_parameters() if p.requires_grad)


def test_the_model_card_says_that_the_start_was_trained_on_pairs(supervised: Path, tmp_path: Path) -> None:
    run = train(recipe("flow_grpo", start=str(supervised)), tmp_path / "run")
    assert checkpoint.read_manifest(run)["no_pairs"] is False
    card = (run / "final" / "README.md").read_text()
    assert "which was shown edited images" in card and "no-pairs" not in card and "trained on pairs" in card
    unpaired = train(recipe("reference_copy"), tmp_path / "unpaired")
    again = train_until(1, recipe("reference_copy", start=str(unpaired)), tmp_path / "again")
    assert checkpoint.read_manifest(again)["no_pairs"] is True


def test_a_stopped_run_resumes_from_its_own_checkpoint(supervised: Path, tmp_path: Path) -> None:
    made = recipe("flow_grpo", start=str(supervised))
    whole = train_until(2, made, tmp_path / "whole")
    train_until(1, made, tmp_path / "run")
    train_until(2, made, tmp_path / "run")
    a, b = (checkpoint.load_checkpoint(r / "checkpoint-000002")[0] for r in (whole, tmp_path / "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize("first", ["supervised", "reference_copy"])
def test_a_run_resumes_and_ends_after_its_start_is_gone(tmp_path: Path, first: str, has_key: bool) -> None:
    start = train_until(1, recipe(first, "toy_pairs" if first == "supervised" else "toy"), tmp_path / "first")
    made = recipe("reference_copy", start=str(start / "checkpoint-000001"))
    run = train_until(1, made, tmp_path / "run")
    if not has_key:  # a run of an older version
        for path in run.rglob("manifest.json"):
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seen_pairs"}))
    shutil.rmtree(start)
    card = (train(made, run) / "final" / "README.md").read_text()
    exported = export_card.model_card(run / "final", resolve_editor(run))
    no_pairs = first == "reference_copy"
    assert checkpoint.read_manifest(run)["no_pairs"] is no_pairs and ("No edited image was used" in card) is no_pairs
    assert ("No pairs were used" in exported) is no_pairs
    assert ("which was shown edited images" in card) is (has_key and not no_pairs)
    assert ("is not known" in card) is (not has_key and not no_pairs)
    with pytest.raises(UserError, match="checkpoint-000001"):
        train(made, tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({"start": "nowhere"}, "expected a run"),
        ({"lora": {"rank": 4}}, "start: expected an editor of the same kind.*rank"),
        ({"family": {"name": "sd3"}}, "start: expected an editor of the same kind.*sd3.*flux"),
    ],
)
def test_unusable_starts_are_refused(supervised: Path, tmp_path: Path, changes: dict, scores: str) -> None:
    with pytest.raises(UserError, match=scores):
        train(recipe("reference_copy", **({"start": str(supervised)} | changes)), tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- judge


JUDGE = {"name": "llava_onevision", "weights": "another"}


def test_the_judge_scores_the_benchmarks_edited_images(tmp_path: Path) -> None:
    look = TRAINER | {"benchmark": "toy", "evaluate_items": 9, "evaluate_every": 1}
    made = recipe("np_edit", judge=JUDGE, trainer=look)
    run = train(made, tmp_path / "run")
    rows = checkpoint.read_rows(run / checkpoint.METRICS)
    assert [r["step"] for r in rows if "judge/p_edit" in r and "eval/applied" in r] == [0, 1, 2]
    assert "judge/p_yes/move" in rows[0] and "critic/p_edit" in rows[1]
    have = parts(made)
    (given,) = evaluation_batches(made, None, 9)
    net = have.family.open_net(run / "final" / "transformer")
    seeds = list(range(9))
    edited = edit_images(have.family, net, given.references, given.instructions, seeds=seeds, steps=1)
    scores = score_with_critic(have.judge.critic, "short", given, edited).mean_by_kind("judge", given.edit_types)
    assert rows[-1]["judge/p_edit"] == pytest.approx(scores["judge/p_edit"], abs=1e-4)
    assert rows[-1]["judge/p_identity"] == pytest.approx(scores["judge/p_identity"], abs=1e-4)
    page = (run / "report.html").read_text()
    assert "Critic and held-out scores" in page and "Causes of failed edits" in page
    counts = json.loads((run / "blame.json").read_text())
    assert len(counts) == 9 and all(
        r["n"] == 1 == r["right"] + r["critic"] + r["teacher"] + r["student"] for r in counts.values()
    )


def test_the_judge_scores_samples_without_a_benchmark(tmp_path: Path) -> None:
    run = train(recipe("reference_copy", judge=JUDGE, trainer=TRAINER | {"evaluate_items": 3}), tmp_path / "run")
    rows = checkpoint.read_rows(run / checkpoint.METRICS)
    assert [r.get("judge/items") for r in rows] == [3, None, 3]
    assert [("judge/p_edit" in r, "eval/both" in r) for r in rows] == [(True, False), (False, False), (True, False)]


def test_a_reward_hacking_alarm_is_printed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The judge falls from update to update while the critic's window is held high."""
    told, scores = [], iter(((0.9, 0.1), (0.5, 0.3), (0.1, 0.8)))  # (judge's, critic's) at updates 0, 1, 2

    def falling(*_: object) -> dict[str, float]:
        judge, critic = next(scores)
        return {"judge/p_edit": judge, "judge/p_identity": judge, "critic/p_edit": critic, "critic/p_identity": critic}

    monkeypatch.setattr(evaluation.Evaluation, "_evaluate", falling)
    made = recipe("reference_copy", judge=JUDGE, trainer=TRAINER | {"evaluate_items": 50, "evaluate_every": 1})
    run = train(made, tmp_path / "run", on_event=lambda name, facts: told.append(facts) if name == "alarm" else None)
    assert told == [{"step": n, "judge": "held-out judge", "since": 0} for n in (1, 2)]
    assert capsys.readouterr().out.count("ALARM at update") == 2
    assert "Alarm: reward hacking" in (run / "report.html").read_text()


def test_training_reads_no_metrics_again_at_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of metrics.jsonl are parsed when a run begins or resumes and for the report, never for an evaluation."""
    parsed: list[bytes] = []
    parse = files.parse_row
    monkeypatch.setattr(files, "parse_row", lambda line: (parsed.append(line), parse(line))[1])
    at_evaluation: list[int] = []
    made = recipe("reference_copy", judge=JUDGE, trainer=TRAINER | {"evaluate_items": 3, "evaluate_every": 1})
    record = lambda name, facts: at_evaluation.append(len(parsed)) if name in ("evaluate", "update") else None  # noqa: E731
    run = train(made, tmp_path / "run", on_event=record)
    assert len(at_evaluation) >= 4 and set(at_evaluation) == {0}
    assert len(parsed) == len(checkpoint.read_rows(run / checkpoint.METRICS))  # by the report, each line once


def test_large_pictures_are_edited_and_judged_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of the toy's pictures, one pass has at most two of them here."""
    monkeypatch.setattr(generator, "BATCH_PIXELS", 2 * 32 * 32)
    sizes: dict[str, list[int]] = {"edit_images": [], "score_with_critic": []}
    for name, place in (("edit_images", 2), ("score_with_critic", 3)):
        plain = getattr(evaluation, name)

        def record(*given, plain=plain, seen=sizes[name], place=place, **more):
            seen.append(len(given[place]))
            return plain(*given, **more)

        monkeypatch.setattr(evaluation, name, record)
    made = recipe("reference_copy", judge=JUDGE, trainer=TRAINER | {"evaluate_items": 3})
    train_until(1, made, tmp_path / "run")
    assert sizes == {"edit_images": [1, 2, 1], "score_with_critic": [2, 1]}  # one sample; then the judge's three


def test_the_judge_must_be_another_critic() -> None:
    with pytest.raises(UserError, match="judge: expected another than the critic"):
        recipe("np_edit", judge={"name": "llava_onevision"})
    with pytest.raises(UserError, match="judge.name"):
        recipe("np_edit", judge={"name": "llava"})
