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

from npedit.errors import UserError
from npedit.recipe.config import validate_settings
from npedit.recipe.packaged import recipe_path
from npedit.runs import lock
from npedit.runs.checkpoint import METRICS, read_config, read_rows
from npedit.study import jobs, study
from npedit.study import page as study_page
from npedit.study.file import Study, load_study, quick_study, variant_recipe
from npedit.study.jobs import StudyWork
from npedit.toy_models.build import train_graded_critic
from tests.support.command_line import run as run_command

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = sorted(path.stem for path in recipe_path("study-toy").parent.glob("study-*.yaml"))
PAGES = {"results": "study-toy", **{page.stem: f"study-{page.stem[8:]}" for page in sorted(DOCS.glob("results-*.md"))}}

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
    require_held(jobs.toy, "score", finished / "full-0")
    require_held(study, "write_results", finished)
    run(make_study(), finished)
    assert checked[-1] == "write_results" and len(checked) == 2


def test_a_folder_that_another_process_holds_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    held, order = threading.Event(), []

    def other_process() -> None:
        with lock.hold(tmp_path, "train"):
            held.set()
            time.sleep(0.2)
            order.append("other")

    other = threading.Thread(target=other_process)
    other.start()
    held.wait()
    with jobs.hold_when_free(tmp_path, "study: score"):
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
    (finished / "9.png").write_bytes(b"of a table that the study no longer has")
    page = study_page.publish_results(results, tmp_path / "docs" / "r.md")
    assert {path.name for path in (tmp_path / "docs" / "r").glob("*.png")} == {"1.png"}
    links = re.findall(r"\]\(([^)]*)\)", page.read_text())
    assert len(links) > 2 and all((page.parent / link).is_file() for link in links)
    kept, told_of = (json.loads((f / "full-0" / "manifest.json").read_text()) for f in (finished, page.parent / "r"))
    assert {k for k in kept if kept[k] != told_of[k]} <= {"command"}
    assert kept["command"].endswith(told_of["command"]) and "/" not in told_of["command"].split()[0]

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(jobs.trainer, "train", no_training)
    assert run(made, finished) == words
    monkeypatch.chdir(tmp_path)  # a study can resume from its published copy
    shutil.copytree(page.with_suffix(""), Path("runs/tiny"))
    assert run(made, Path("runs/tiny")) == words


def test_a_variants_own_seeds_are_trained_and_missing_ones_are_named(finished, monkeypatch):
    variants = {"full": {"seeds": [0, 1]}, "dmd_only": TINY["variants"]["dmd_only"]}
    made = make_study(variants=variants, tables=[{"title": "Losses", "rows": list(variants)}])
    shutil.rmtree(finished / "dmd_only-0")
    train = jobs.trainer.train

    def stop(recipe, folder, **more):
        raise UserError(f"stopped at {folder.name}")

    monkeypatch.setattr(jobs.trainer, "train", stop)
    with pytest.raises(UserError, match=r"2 that did not:\s+full-1: stopped at full-1\s+dmd_only-0: stopped"):
        run(made, finished)
    assert "Not run: full (seed 1), dmd_only." in (finished / "results.md").read_text()  # the others are shown
    monkeypatch.setattr(jobs.trainer, "train", train)
    words = run(made, finished, only=["dmd_only"])
    assert "Not run: full (seed 1)." in words and "no row has several seeds" in words
    words = run(made, finished)
    scores = json.loads((finished / "results.json").read_text())
    assert scores["full"]["runs"] == ["full-0", "full-1"] and len(scores["full"]["each"]) == 2
    assert scores["full"]["n"] == 9 and "ot run" not in words and "1 degrees of freedom)" in words
    assert [len(outcomes) for outcomes in scores["full"]["outcomes"]] == [9, 9]
    assert quick_study(make_study(variants={"full": {"seeds": [0, 1]}}, tables=[])).seeds_of("full") == [0]


def test_a_study_trains_its_critics_and_starts_a_variant_from_anothers_run(finished, tmp_path):
    variants = {
        "full": {},
        "weak": {"critic": "weak"},
        "two": {"critic": "two", "set": ["stages.0=null"]},
        "further": {"start": "full", "set": ["stages.0=null"]},
    }
    tables = [{"title": "Critics", "rows": ["weak", "full"], "by_critic": True}]
    critics = {"weak": {"batches": 1}, "two": {"members": ["embedded", "weak"]}}
    (finished / "full-0" / "score-full.json").unlink()  # it was made without the critic's own score
    made = make_study(variants=variants, tables=tables, critics=critics)
    words = run(made, finished)
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
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)  # with paths of the old folder in its recipes: a start and critics
    assert not StudyWork(made, moved, recipe_path, False).missing_jobs()
    edited = make_study(variants=variants, tables=tables, critics=critics | {"weak": {"batches": 2}})
    with pytest.raises(UserError, match=r"weak-1/critic' -> '.*weak-2/critic'"):
        StudyWork(edited, finished, recipe_path, False)  # before anything is trained


def test_a_run_that_was_begun_with_another_recipe_is_refused_also_if_it_is_not_finished(finished):
    """`npedit train` lets a resumed run have more updates; in a study such a run would be of two recipes."""
    (finished / "dmd_only-0" / "passes.json").unlink()
    config = finished / "dmd_only-0" / "config.resolved.yaml"
    longer = yaml.safe_load(config.read_text())
    longer["stages"][-1]["updates"] += 1
    config.write_text(yaml.safe_dump(longer))
    with pytest.raises(UserError, match=r"dmd_only-0; got another \(stages\.1\.updates: 3 -> 2\)"):
        StudyWork(make_study(), finished, recipe_path, False)


def test_a_page_names_the_revisions_of_the_code_that_trained_its_runs(finished):
    manifest = finished / "full-0" / "manifest.json"
    facts = json.loads(manifest.read_text()) | {"git_revision": "a" * 40}
    manifest.write_text(json.dumps(facts | {"resumed": [{"update": 1, "git_revision": "b" * 40, "versions": {}}]}))
    (finished / "dmd_only-0" / "manifest.json").write_text(json.dumps(facts))
    words = run(make_study(), finished)
    assert "trained the runs: `aaaaaaaa` (1 run), `aaaaaaaa` and `bbbbbbbb` (1 run)." in words


@pytest.mark.parametrize("name", STUDIES)
def test_every_recipe_of_the_packaged_studies_is_valid(name):
    made = load_study(recipe_path(name))
    for row, variant in made.variants.items():
        if not variant.of:
            assert variant_recipe(made, row, 3, recipe_path, Path("s")).seed == 3
            quick = variant_recipe(made, row, 3, recipe_path, Path("s"), quick=True)
            assert quick.total_updates() < variant_recipe(made, row, 3, recipe_path, Path("s")).total_updates() / 4


@pytest.mark.parametrize("page", PAGES)
def test_a_published_page_and_its_scores_are_those_of_the_published_runs(page):
    """Each row of a page has the figures of its results.json, each row there those of its runs, and the runs have the
    recipes that the study's file states."""
    made, folder = _published_study(page), DOCS / page
    scores, text = json.loads((folder / "results.json").read_text()), (DOCS / f"{page}.md").read_text()
    for name, score in scores.items():
        runs = [folder / run for run in score["runs"]]
        kept = [json.loads((run / f"score-{name}.json").read_text()) for run in runs]
        assert score["each"] == [k["both"]["value"] for k in kept]
        assert score["both"]["value"] == pytest.approx(sum(score["each"]) / len(kept))
        low, high = score["both"]["ci95"]
        figures = f"**{score['both']['value']:.3f}** [{low:.3f}, {high:.3f}] | {score['applied']['value']:.3f}"
        assert re.search(rf"^\| {name}\b.*{re.escape(figures)}", text, re.MULTILINE), name
        if name in made.search or (page, name) == ("results", "few_pairs_grpo"):  # no variant has this name (any more)
            continue
        for run in [] if made.variants[name].of else runs:
            stated = variant_recipe(made, name, read_config(run)["seed"], recipe_path, Path(f"runs/{made.name}"))
            jobs.require_same_recipe(run, stated)


def _published_study(page: str) -> Study:
    """The study of a page in docs. docs/results.md is of an earlier form of study-toy, which had the variants of
    study-more too."""
    made = load_study(recipe_path(PAGES[page]))
    if page != "results":
        return made
    more = load_study(recipe_path("study-more"))
    both = {"variants": more.variants | made.variants, "critics": more.critics | made.critics}
    return made.model_copy(update=both)


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
        ({"variants": {"a.b": {}}, "tables": []}, "without dots"),
        ({"search": {"s": {"start": "ful", "budget": "full", "configurations": {"a": [], "b": []}}}}, "search 's'"),
        ({"search": {"s": {"start": "full", "budget": "full", "configurations": {"a": [], "b": []}}}}, r"among \[0\]"),
        ({"search": {"s": {"start": "full", "budget": "ful", "configurations": {"a": [], "b": []}}}}, "search 's'"),
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


@pytest.mark.parametrize(
    ("option", "name", "said"), [("--quote", "README.md", "a page without"), ("--publish", "docs", "ends in .md")]
)
def test_a_page_that_cannot_be_written_is_told_before_the_first_run(tmp_path, option, name, said):
    path, page = tmp_path / "s.yaml", tmp_path / name
    path.write_text(yaml.safe_dump(TINY))
    page.write_text("no marks")
    assert said in run_command("study", path, "--out", tmp_path / "s", option, page, code=2)
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


def test_only_includes_the_variants_that_a_variant_starts_from(tmp_path):
    chain = {"first": {}, "other": {}, "next": {"start": "first"}, "last": {"start": "next"}}
    made = make_study(variants=chain, tables=[])
    work = StudyWork(made, tmp_path, recipe_path, False)

    def names(*only: str) -> list[str]:
        return [job.name for job in work.missing_jobs(only)]

    assert names("last") == ["first-0", "next-0", "last-0"] and names("first") == ["first-0"]
    assert names() == ["first-0", "other-0", "next-0", "last-0"]


def test_a_duplicate_key_in_a_study_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match=r"study.yaml: expected each key once; got 'name' in line 1 and again"):
        load_study(path)
