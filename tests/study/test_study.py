"""A study trains what is missing, scores all alike, and holds each claim against the interval of the difference."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from scipy import stats

from npedit.benchmarks.toy import wilson_interval
from npedit.errors import UserError
from npedit.recipe.config import validate_settings
from npedit.recipe.packaged import recipe_path
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
        "trainer.evaluate_every=0", "trainer.evaluate_items=9", "trainer.sample_every=0", "trainer.sample_items=1",
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


def test_the_difference_is_newcombes():
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
def test_verdicts(claim, a, b, word):
    assert f"**{word}**" in study_page.judge_claim(claim, rates(a, b, 100))


def test_level_needs_the_interval_within_a_tenth():
    assert "**holds**" in study_page.judge_claim("a ~ b", rates(500, 505, 1000))


def test_chance_in_training_is_pooled_over_the_rows_with_several_seeds():
    """Rows of deviations .02 and .0396 with 2 and 1 degrees of freedom, beside one of a single seed."""
    deviation, freedom = study_page.seed_std([[0.48, 0.50, 0.52], [0.272, 0.328], [0.7]])
    assert freedom == 3 and deviation == pytest.approx(((2 * 0.02**2 + 0.0396**2) / 3) ** 0.5, rel=1e-3)
    assert study_page.seed_std([[0.7]]) == (0.0, 0)


def test_chance_in_training_widens_a_claims_interval():
    """By Student's t, 3 seeds against 1, added in squares to what the scenes leave open; not between the same runs."""
    scores = {"a": row("a", 900, 470, 480, 490), "b": row("b", 900, 420), "c": row("a", 900, 470, 480, 490)}
    apart = study_page.seed_margin(scores["a"], scores["b"], (0.02, 8))
    assert apart == pytest.approx(stats.t.ppf(0.975, 8) * 0.02 * (1 / 3 + 1) ** 0.5, rel=1e-4)
    d, low, _ = study_page.difference(scores["a"]["both"], scores["b"]["both"])
    assert low > 0 > d - ((d - low) ** 2 + apart**2) ** 0.5
    assert "**holds**" in study_page.judge_claim("a > b", scores)
    assert "**open**" in study_page.judge_claim("a > b", scores, (0.02, 8))
    assert study_page.judge_claim("a > c", scores, (0.02, 8)) == study_page.judge_claim("a > c", scores)


def test_students_t():
    """The table against scipy's; past its end the last is used, which is too wide and never too narrow."""
    for k in range(1, 40):
        half, true = study_page.seed_margin(row("a", 9, 1), row("b", 9, 1), (1.0, k)) / 2**0.5, stats.t.ppf(0.975, k)
        assert half == pytest.approx(true, abs=1e-4) if k <= 14 else true < half < 1.1 * true


def test_seeds_do_not_narrow_what_the_scenes_leave_open():
    """Three seeds on the same scenes: their mean, and the interval of one."""
    one = {"n": 900, "by_type": {}, "copy_rate": 0.1, "run": "a", "alarms": [], "seconds": 60, "passes": {}}
    one |= {"critic_right": None, "applied": wilson_interval(600, 900), "preserved": wilson_interval(600, 900)}
    found = study_page.pool_seeds([one | {"both": wilson_interval(h, 900)} for h in (440, 450, 460)])
    assert found["both"] == wilson_interval(450, 900) and found["each"] == [440 / 900, 0.5, 460 / 900]


def test_it_trains_scores_and_writes_and_goes_on(tmp_path, monkeypatch):
    told: list[str] = []
    made = validate_settings(Study, TINY, "")
    results = study.run_study(made, tmp_path / "s", recipe_path, told.append)
    words = results.read_text()
    assert len(told) == 2 and "full > dmd_only" in words and "(full-0/manifest.json)" in words
    assert (tmp_path / "s" / "1.png").read_bytes()[:4] == b"\x89PNG"
    scores = json.loads((tmp_path / "s" / "results.json").read_text())
    assert scores["full"]["passes"]["critic"] > 0 and scores["dmd_only"]["passes"]["critic"] == 0
    assert scores["one_step"]["runs"] == ["full-0"] and scores["full"]["n"] == 9
    # drafts of one or two calls, the fake score's and DMD's three: never fewer than five for each picture, two in each
    assert scores["full"]["passes"]["generator"] >= 2 * 5 * 2 / 3

    counted = tmp_path / "s" / "dmd_only-0" / "passes.json"
    passes = counted.read_text()
    counted.unlink()  # as if it had been killed at the very end: it goes on, and what was counted is not lost
    assert study.run_study(made, tmp_path / "s", recipe_path, told.append).read_text() == words
    assert counted.read_text() == passes

    with pytest.raises(UserError, match=r"ends in \.md"):
        study_page.publish_results(results, tmp_path / "docs")
    page = study_page.publish_results(results, tmp_path / "docs" / "r.md")
    links = re.findall(r"\]\(([^)]*)\)", page.read_text())
    assert len(links) > 2 and all((page.parent / link).is_file() for link in links)
    kept, told_of = (
        json.loads((f / "full-0" / "manifest.json").read_text()) for f in (tmp_path / "s", page.parent / "r")
    )
    assert {k for k in kept if kept[k] != told_of[k]} <= {"command"}
    assert kept["command"].endswith(told_of["command"]) and "/" not in told_of["command"].split()[0]

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(study.trainer, "train", no_training)
    assert study.run_study(made, tmp_path / "s", recipe_path, told.append).read_text() == words
    monkeypatch.chdir(tmp_path)  # the published copy is a study's folder to go on from
    shutil.copytree(page.with_suffix(""), Path("runs/tiny"))
    assert study.run_study(made, Path("runs/tiny"), recipe_path, told.append).read_text() == words


def test_a_variant_has_seeds_of_its_own_and_the_page_tells_which_are_missing(tmp_path, monkeypatch):
    variants = {"full": {"seeds": [0, 1]}, "dmd_only": TINY["variants"]["dmd_only"]}
    tables = [{"title": "Losses", "rows": list(variants)}]
    made = validate_settings(Study, TINY | {"variants": variants, "tables": tables}, "")
    train, trained = study.trainer.train, []

    def broken_off(recipe, run, **more):
        if trained:
            raise UserError("stopped here")
        trained.append(run.name)
        return train(recipe, run, **more)

    monkeypatch.setattr(study.trainer, "train", broken_off)
    with pytest.raises(UserError, match="stopped here"):
        study.run_study(made, tmp_path / "s", recipe_path, print)
    monkeypatch.setattr(study.trainer, "train", train)
    words = study.run_study(made, tmp_path / "s", recipe_path, print, only=["dmd_only"]).read_text()
    assert trained == ["full-0"] and "Not run: full (seed 1)." in words and "no row has several seeds" in words
    words = study.run_study(made, tmp_path / "s", recipe_path, print).read_text()
    scores = json.loads((tmp_path / "s" / "results.json").read_text())
    assert scores["full"]["runs"] == ["full-0", "full-1"] and len(scores["full"]["each"]) == 2
    assert scores["full"]["n"] == 9 and "ot run" not in words and "(1 degrees of freedom)" in words
    assert study.run_study(made, tmp_path / "q", recipe_path, print, quick=True).exists()
    assert sorted(p.name for p in (tmp_path / "q").iterdir() if p.is_dir()) == ["dmd_only-0", "full-0"]


def test_a_study_teaches_critics_and_lets_a_variant_start_from_another(tmp_path):
    variants = {
        "full": {},
        "weak": {"critic": "weak"},
        "two": {"critic": "two", "set": ["stages.0=null"]},
        "further": {"start": "full", "set": ["stages.0=null"]},
    }
    tables = [{"title": "Critics", "rows": ["weak", "full"], "by_critic": True}]
    critics = {"weak": {"batches": 1}, "two": {"members": ["embedded", "weak"]}}
    made = validate_settings(Study, TINY | {"variants": variants, "tables": tables, "critics": critics}, "")
    results = study.run_study(made, tmp_path / "s", recipe_path, print)
    scores = json.loads((tmp_path / "s" / "results.json").read_text())
    assert scores["weak"]["critic_right"] < 0.8 < scores["full"]["critic_right"]
    assert scores["two"]["critic_right"] is None and "answers" in results.read_text()
    assert scores["two"]["passes"]["updates"] == 2  # stage 0 was left out
    went_on = read_config(tmp_path / "s" / "further-0")
    assert went_on["start"] == str(tmp_path / "s" / "full-0") and len(went_on["stages"]) == 1
    said = [r for r in read_rows(tmp_path / "s" / "two-0" / METRICS) if "critic/p_of/1-LlavaOnevision" in r]
    assert said and (tmp_path / "s" / "1.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="expected a critic of 2 batches"):
        train_graded_critic(tmp_path / "s" / "critics" / "weak-1", 2, 9)
    edited = validate_settings(
        Study, TINY | {"variants": variants, "tables": tables, "critics": critics | {"weak": {"batches": 2}}}, ""
    )
    with pytest.raises(UserError, match=r"weak-1/critic' -> '.*weak-2/critic'"):
        study.run_study(edited, tmp_path / "s", recipe_path, print)


def test_the_packaged_study_is_sound():
    made = load_study(recipe_path("study-toy"))
    for name, variant in made.variants.items():
        if not variant.of:
            assert variant_recipe(made, name, 3, recipe_path, Path("s")).seed == 3
            quick = variant_recipe(made, name, 3, recipe_path, Path("s"), quick=True)
            assert quick.total_updates() < variant_recipe(made, name, 3, recipe_path, Path("s")).total_updates() / 4


def test_the_published_study_is_what_its_numbers_say(tmp_path):
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


def test_an_edited_study_does_not_pass_old_runs_off_as_its_own(tmp_path):
    study.run_study(validate_settings(Study, TINY, ""), tmp_path / "s", recipe_path, print)
    edited = TINY | {"set": [*TINY["set"], "stages.1.settings.guidance=2.5"]}
    with pytest.raises(UserError, match=r"guidance: 4\.0 -> 2\.5"):
        study.run_study(validate_settings(Study, edited, ""), tmp_path / "s", recipe_path, print)
    fewer = TINY | {"variants": TINY["variants"] | {"one_step": {"of": "full", "steps": 2}}}
    study.run_study(validate_settings(Study, fewer, ""), tmp_path / "s", recipe_path, print)
    assert json.loads((tmp_path / "s" / "full-0" / "score-one_step.json").read_text())["steps"] == 2


def test_only_some_variants_are_trained_and_the_page_says_which_are_missing(tmp_path):
    """Two processes fill one folder; each leaves a page of what is finished."""
    made = validate_settings(Study, TINY, "")
    words = study.run_study(made, tmp_path / "s", recipe_path, print, only=["dmd_only"]).read_text()
    assert "Not run: full, one_step." in words and "`full > dmd_only`: **not run** (full)" in words
    assert not (tmp_path / "s" / "full-0").exists() and "(dmd_only-0/manifest.json)" in words
    (tmp_path / "s" / "full-0").mkdir()  # begun elsewhere, and not finished
    (tmp_path / "s" / "full-0" / "manifest.json").write_text("{}")
    study_page.publish_results(tmp_path / "s" / "results.md", tmp_path / "r.md")
    assert [p.parent.name for p in (tmp_path / "r").glob("*/manifest.json")] == ["dmd_only-0"]
    shutil.rmtree(tmp_path / "s" / "full-0")
    words = study.run_study(made, tmp_path / "s", recipe_path, print, only=["full"]).read_text()
    assert "ot run" not in words and "(dmd_only-0/manifest.json)" in words and "(full-0/manifest.json)" in words
    with pytest.raises(UserError, match=r"trained; got 'one_stp'"):
        study.run_study(made, tmp_path / "s", recipe_path, print, only=["one_stp"])


def test_a_key_that_stands_twice_in_a_study_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match=r"study.yaml: expected each key once; got 'name' in line 1 and again"):
        load_study(path)
