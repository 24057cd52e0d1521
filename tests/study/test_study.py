"""A study trains what is missing, scores all alike, and holds each claim against the interval of the difference."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from scipy import stats

from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.recipe.config import validate_settings
from npedit.recipe.packaged import recipe_path
from npedit.runs import lock
from npedit.runs.checkpoint import METRICS, read_config, read_rows
from npedit.study import page as study_page
from npedit.study import study
from npedit.study.file import Study, load_study, variant_recipe
from npedit.toy_models.build import train_graded_critic

TINY = {
    "name": "tiny",
    "recipe": "demo",
    "set": [
        "stages.0.updates=1", "stages.0.batch_size=2", "stages.1.updates=2", "stages.1.batch_size=2",
        'trainer.benchmark=""', "trainer.evaluate_every=0", "trainer.sample_every=0", "trainer.sample_items=1",
    ],
    "items": 9,
    "variants": {
        "full": {"words": "all of it"},
        "dmd_only": {"set": ["stages.1.settings.critic_weight=0"]},
        "one_step": {"of": "full", "steps": 1},
    },
    "tables": [{"title": "Losses", "rows": ["full", "dmd_only"], "claims": ["full > dmd_only", "full ~ one_step"]}],
}  # fmt: skip


def row(name: str, n: int, *hits: int) -> dict:
    """A row of as many seeds as hits."""
    each = [h / n for h in hits]
    return {
        "both": wilson_interval(sum(hits) / len(hits), n),
        "each": each,
        "runs": [f"{name}-{i}" for i in range(len(hits))],
    }


def rates(a: int, b: int, n: int) -> dict:
    return {"a": row("a", n, a), "b": row("b", n, b)}


def test_difference_of_two_rates_has_newcombes_interval():
    """The worked example of Newcombe (1998): 56/70 against 48/80 gives 0.2 [0.0524, 0.3339] by method 10."""
    d, low, high = study_page.difference(wilson_interval(56, 70), wilson_interval(48, 80))
    assert (d, low, high) == (pytest.approx(0.2), pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


@pytest.mark.parametrize(
    ("claim", "a", "b", "word"),
    [
        ("a > b", 60, 30, "holds"),
        ("a > b", 30, 60, "refuted"),
        ("a > b", 50, 48, "open"),
        ("a ~ b", 50, 51, "open"),
        ("a ~ b", 80, 20, "refuted"),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_the_difference(claim, a, b, word):
    assert f"**{word}**" in study_page.judge_claim(claim, rates(a, b, 100))


def test_equality_holds_only_with_the_whole_interval_within_a_tenth():
    assert "**holds**" in study_page.judge_claim("a ~ b", rates(500, 505, 1000))


def test_seed_deviation_is_pooled_over_rows_with_several_seeds():
    """Two rows with deviations 0.02 and 0.0396 and 2 and 1 degrees of freedom; a third has a single seed."""
    deviation, freedom = study_page.seed_std([[0.48, 0.50, 0.52], [0.272, 0.328], [0.7]])
    assert freedom == 3 and deviation == pytest.approx(((2 * 0.02**2 + 0.0396**2) / 3) ** 0.5, rel=1e-3)
    assert study_page.seed_std([[0.7]]) == (0.0, 0)


def test_seed_deviation_widens_a_claims_interval():
    """3 seeds against 1 by Student's t, added in quadrature to the scenes' interval; not between the same runs."""
    scores = {"a": row("a", 900, 470, 480, 490), "b": row("b", 900, 420), "c": row("a", 900, 470, 480, 490)}
    apart = study_page.seed_margin(scores["a"], scores["b"], (0.02, 8))
    assert apart == pytest.approx(stats.t.ppf(0.975, 8) * 0.02 * (1 / 3 + 1) ** 0.5, rel=1e-4)
    d, low, _ = study_page.difference(scores["a"]["both"], scores["b"]["both"])
    assert low > 0 > d - ((d - low) ** 2 + apart**2) ** 0.5
    assert "**holds**" in study_page.judge_claim("a > b", scores)
    assert "**open**" in study_page.judge_claim("a > b", scores, (0.02, 8))
    assert study_page.judge_claim("a > c", scores, (0.02, 8)) == study_page.judge_claim("a > c", scores)


def test_student_t_quantiles_are_scipys():
    """Beyond its end the table uses its last value, which is too wide and never too narrow."""
    for k in range(1, 40):
        half, true = study_page.seed_margin(row("a", 9, 1), row("b", 9, 1), (1.0, k)) / 2**0.5, stats.t.ppf(0.975, k)
        assert half == pytest.approx(true, abs=1e-4) if k <= 14 else true < half < 1.1 * true


def test_several_seeds_on_the_same_scenes_keep_the_interval_of_one():
    """The mean of three seeds has the interval of one run, because the scenes are the same."""
    one = {"n": 900, "by_type": {}, "copy_rate": 0.1, "run": "a", "alarms": [], "seconds": 60, "passes": {}}
    one |= {"critic_right": None, "applied": wilson_interval(600, 900), "preserved": wilson_interval(600, 900)}
    found = study_page.pool_seeds([one | {"both": wilson_interval(h, 900)} for h in (440, 450, 460)])
    assert found["both"] == wilson_interval(450, 900) and found["each"] == [440 / 900, 0.5, 460 / 900]


def make_study(**changes) -> Study:
    return validate_settings(Study, TINY | changes, "")


def run(made: Study, folder: Path, **options) -> str:
    """Run a study; returns its page."""
    return study.run_study(made, folder, recipe_path, print, **options).read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a study that has run. Its three variants have two training runs."""
    folder, progress = tmp_path_factory.mktemp("study") / "s", []
    study.run_study(make_study(), folder, recipe_path, progress.append)
    assert len(progress) == 2
    return folder


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of that folder, which a test may change."""
    return shutil.copytree(trained, tmp_path / "s")


def test_a_study_holds_a_run_while_it_scores_it_and_its_folder_while_it_writes(finished, monkeypatch):
    """Nobody can move these folders at that time; before, `train --fresh` could."""
    checked = []

    def require_held(module, name: str, folder: Path) -> None:
        work = getattr(module, name)

        def checking(*given, **named):
            with pytest.raises(UserError, match="held by"):
                lock.move_aside(folder)
            checked.append(name)
            return work(*given, **named)

        monkeypatch.setattr(module, name, checking)

    (finished / "full-0" / "score-full.json").unlink()
    require_held(study.toy, "score", finished / "full-0")
    require_held(study, "write_results", finished)
    run(make_study(), finished)
    assert checked[-1] == "write_results" and len(checked) == 2


def test_a_folder_that_another_process_holds_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(study, "POLL_SECONDS", 0.01)
    held, order = threading.Event(), []

    def other_process() -> None:
        with lock.hold(tmp_path, "train"):
            held.set()
            time.sleep(0.2)
            order.append("other")

    other = threading.Thread(target=other_process)
    other.start()
    held.wait()
    with study.hold_when_free(tmp_path, "study: score"):
        order.append("study")
    other.join()
    assert order == ["other", "study"] and caplog.text.count("waiting: expected") == 1


def test_a_study_trains_scores_writes_its_page_and_resumes(finished, tmp_path, monkeypatch):
    made, results = make_study(), finished / "results.md"
    words = results.read_text()
    assert "full > dmd_only" in words and "(full-0/manifest.json)" in words
    assert (finished / "1.png").read_bytes()[:4] == b"\x89PNG"
    scores = json.loads((finished / "results.json").read_text())
    assert scores["full"]["passes"]["critic"] > 0 and scores["dmd_only"]["passes"]["critic"] == 0
    assert scores["one_step"]["runs"] == ["full-0"] and scores["full"]["n"] == 9
    # An unroll makes one or two calls, the fake score and DMD three: at least five for each of the two pictures.
    assert scores["full"]["passes"]["generator"] >= 2 * 5 * 2 / 3

    counted = finished / "dmd_only-0" / "passes.json"
    passes = counted.read_text()
    counted.unlink()  # as if it had been killed at the very end: it goes on, and what was counted is not lost
    assert run(made, finished) == words
    assert counted.read_text() == passes

    with pytest.raises(UserError, match=r"ends in \.md"):
        study_page.publish_results(results, tmp_path / "docs")
    page = study_page.publish_results(results, tmp_path / "docs" / "r.md")
    links = re.findall(r"\]\(([^)]*)\)", page.read_text())
    assert len(links) > 2 and all((page.parent / link).is_file() for link in links)
    kept, told_of = (json.loads((f / "full-0" / "manifest.json").read_text()) for f in (finished, page.parent / "r"))
    assert {k for k in kept if kept[k] != told_of[k]} <= {"command"}
    assert kept["command"].endswith(told_of["command"]) and "/" not in told_of["command"].split()[0]

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(study.trainer, "train", no_training)
    assert run(made, finished) == words
    monkeypatch.chdir(tmp_path)  # a study can resume from its published copy
    shutil.copytree(page.with_suffix(""), Path("runs/tiny"))
    assert run(made, Path("runs/tiny")) == words


def test_a_variants_own_seeds_are_trained_and_missing_ones_are_named(finished, tmp_path, monkeypatch):
    variants = {"full": {"seeds": [0, 1]}, "dmd_only": TINY["variants"]["dmd_only"]}
    made = make_study(variants=variants, tables=[{"title": "Losses", "rows": list(variants)}])
    shutil.rmtree(finished / "dmd_only-0")
    train = study.trainer.train

    def stop(recipe, folder, **more):
        raise UserError(f"stopped at {folder.name}")

    monkeypatch.setattr(study.trainer, "train", stop)
    with pytest.raises(UserError, match="stopped at full-1"):
        run(made, finished)
    monkeypatch.setattr(study.trainer, "train", train)
    words = run(made, finished, only=["dmd_only"])
    assert "Not run: full (seed 1)." in words and "no row has several seeds" in words
    words = run(made, finished)
    scores = json.loads((finished / "results.json").read_text())
    assert scores["full"]["runs"] == ["full-0", "full-1"] and len(scores["full"]["each"]) == 2
    assert scores["full"]["n"] == 9 and "ot run" not in words and "(1 degrees of freedom)" in words
    quick = make_study(variants={"full": {"seeds": [0, 1]}}, tables=[])
    assert run(quick, tmp_path / "q", quick=True)
    assert [p.name for p in (tmp_path / "q").iterdir() if p.is_dir()] == ["full-0"]


def test_a_study_trains_its_critics_and_starts_a_variant_from_anothers_run(finished):
    variants = {
        "full": {},
        "weak": {"critic": "weak"},
        "two": {"critic": "two", "set": ["stages.0=null"]},
        "further": {"start": "full", "set": ["stages.0=null"]},
    }
    tables = [{"title": "Critics", "rows": ["weak", "full"], "by_critic": True}]
    critics = {"weak": {"batches": 1}, "two": {"members": ["embedded", "weak"]}}
    (finished / "full-0" / "score-full.json").unlink()  # it was made without the critic's own score
    words = run(make_study(variants=variants, tables=tables, critics=critics), finished)
    scores = json.loads((finished / "results.json").read_text())
    assert scores["weak"]["critic_right"] < 0.8 < scores["full"]["critic_right"]
    assert scores["two"]["critic_right"] is None and "answers" in words
    assert scores["two"]["passes"]["updates"] == 2  # stage 0 was left out
    config = read_config(finished / "further-0")
    assert config["start"] == str(finished / "full-0") and len(config["stages"]) == 1
    rows = [r for r in read_rows(finished / "two-0" / METRICS) if "critic/p_of/1-LlavaOnevision" in r]
    assert rows and (finished / "1.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="expected a critic of 2 batches"):
        train_graded_critic(finished / "critics" / "weak-1", 2, 9)
    edited = make_study(variants=variants, tables=tables, critics=critics | {"weak": {"batches": 2}})
    with pytest.raises(UserError, match=r"weak-1/critic' -> '.*weak-2/critic'"):
        run(edited, finished)


def test_every_recipe_of_the_packaged_study_is_valid():
    made = load_study(recipe_path("study-toy"))
    for name, variant in made.variants.items():
        if not variant.of:
            assert variant_recipe(made, name, 3, recipe_path, Path("s")).seed == 3
            quick = variant_recipe(made, name, 3, recipe_path, Path("s"), quick=True)
            assert quick.total_updates() < variant_recipe(made, name, 3, recipe_path, Path("s")).total_updates() / 4


def test_the_results_page_is_generated_from_the_published_scores(tmp_path):
    """docs/results.md is made of docs/results/results.json, and that of the scores of its runs, with their recipes."""
    made, docs = load_study(recipe_path("study-toy")), Path(__file__).parents[2] / "docs"
    scores = json.loads((docs / "results" / "results.json").read_text())
    page = study_page.write_results(made, tmp_path, scores).read_text().replace("](", "](results/")
    assert page == (docs / "results.md").read_text()
    for name, score in scores.items():
        runs = [docs / "results" / run for run in score["runs"]]
        assert score == study_page.pool_seeds([json.loads((run / f"score-{name}.json").read_text()) for run in runs])
        for run in [] if made.variants[name].of else runs:
            stated = variant_recipe(made, name, read_config(run)["seed"], recipe_path, Path("runs/study-toy"))
            study.require_same_recipe(run, stated)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tables": [{"title": "x", "rows": ["ful"]}]}, "full"),
        ({"tables": [{"title": "x", "rows": ["full"], "claims": ["full beats dmd_only"]}]}, "full > dmd_only"),
        ({"variants": {"a": {"of": "b"}, "b": {"of": "a"}}, "tables": []}, "another's runs"),
        ({"variants": {"a": {"start": "b"}, "b": {}}, "tables": []}, "start of variant 'a'"),
        ({"variants": {"a": {"seeds": [1]}, "b": {"start": "a", "seeds": [0, 1]}}, "tables": []}, r"among \[1\]"),
        ({"variants": {"a": {"critic": "week"}}, "critics": {"weak": {"batches": 3}}, "tables": []}, "weak"),
        ({"critics": {"both": {"members": ["embeded", "embedded"]}}}, "embedded"),
        ({"critics": {"odd": {}}}, "give one of them"),
        ({"itemss": 3}, "items"),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, change, said):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(UserError, match=said):
        load_study(path)


def test_a_variant_with_an_unknown_key_stops_the_study_before_it_trains(tmp_path):
    variants = TINY["variants"] | {"odd": {"set": ["stages.1.settings.critc_weight=0"]}}
    with pytest.raises(UserError, match="critic_weight"):
        study.run_study(validate_settings(Study, TINY | {"variants": variants}, ""), tmp_path / "s", recipe_path, print)
    assert not (tmp_path / "s").exists()


def test_an_edited_study_refuses_runs_of_the_old_recipe(finished):
    edited = make_study(set=[*TINY["set"], "stages.1.settings.guidance=2.5"])
    with pytest.raises(UserError, match=r"guidance: 4\.0 -> 2\.5"):
        run(edited, finished)
    more_steps = make_study(variants=TINY["variants"] | {"one_step": {"of": "full", "steps": 2}})
    run(more_steps, finished)  # another way to score is no other recipe
    assert json.loads((finished / "full-0" / "score-one_step.json").read_text())["steps"] == 2


def test_the_page_of_a_study_that_is_filled_by_two_processes_names_the_missing_variants(finished, tmp_path):
    made = make_study()
    other = shutil.move(finished / "full-0", tmp_path / "other")
    words = run(made, finished, only=["dmd_only"])
    assert "Not run: full, one_step." in words and "`full > dmd_only`: **not run** (full)" in words
    assert not (finished / "full-0").exists() and "(dmd_only-0/manifest.json)" in words
    (finished / "full-0").mkdir()  # begun by the other process, and not finished
    (finished / "full-0" / "manifest.json").write_text("{}")
    study_page.publish_results(finished / "results.md", tmp_path / "r.md")
    assert [p.parent.name for p in (tmp_path / "r").glob("*/manifest.json")] == ["dmd_only-0"]
    shutil.rmtree(finished / "full-0")
    shutil.move(other, finished / "full-0")
    words = run(made, finished, only=["full"])
    assert "ot run" not in words and "(dmd_only-0/manifest.json)" in words and "(full-0/manifest.json)" in words
    with pytest.raises(UserError, match=r"trained; got 'one_stp'"):
        run(made, finished, only=["one_stp"])


def test_a_duplicate_key_in_a_study_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match=r"study.yaml: expected each key once; got 'name' in line 1 and again"):
        load_study(path)
