"""A search: what each stage trains, that no configuration exceeds the budget, and a whole one at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npedit.errors import UserError
from npedit.recipe.config import validate_settings
from npedit.recipe.packaged import recipe_path
from npedit.report.reward_curves import plot_reward_curves, reward_ends
from npedit.steps.flow_grpo import Step
from npedit.study import study
from npedit.study.file import Study, Variant, load_study, quick_study, variant_recipe
from npedit.study.jobs import SELECTION, StudyWork
from npedit.study.page import publish_results
from npedit.study.search import STAGES, expand_search
from npedit.study.search_page import search_alarms, search_section
from tests.study.test_study import TINY

CONFIGURATIONS = {"a": [], "b": ["stages.0.settings.group=3"], "c": ["stages.0.settings.group=4"]}
TINY_SEARCH = TINY | {
    "set": [
        'trainer.benchmark=""', "trainer.evaluate_every=0", "trainer.sample_every=0", "trainer.sample_items=1",
        "trainer.evaluate_items=9",
    ],
    "variants": {
        "few": {
            "recipe": "toy-supervised",
            "set": ["stages.0.updates=1", "stages.0.batch_size=2", "stages.1.updates=1", "stages.1.batch_size=2"],
        },
        "np": {"start": "few", "set": ["stages.0=null", "stages.1.updates=2", "stages.1.batch_size=2"]},
    },
    "search": {
        "s": {
            "recipe": "toy-flow-grpo", "start": "few", "budget": "np", "configurations": CONFIGURATIONS, "keep": 2,
            "seeds": [0], "row": "few pairs, then Flow-GRPO", "set": [
                "stages.0.batch_size=1", "stages.0.settings.sampling_steps=2", "stages.0.settings.group=2",
                "trainer.benchmark=toy",
            ],
        }
    },
    "tables": [{"title": "Search", "rows": ["few", "s"], "claims": ["s > few"]}],
}  # fmt: skip


def finish(run: Path, generator: float = 100.0, critic: float = 50.0, success: float | None = None) -> None:
    """The files of a finished run that a search reads."""
    run.mkdir(parents=True)
    (run / "passes.json").write_text(json.dumps({"updates": 1, "generator": generator, "critic": critic}))
    if success is not None:
        (run / SELECTION).write_text(json.dumps({"n": 9, "both": {"value": success}}))


def expand(made: Study, folder: Path, stage: str, failed: tuple[str, ...] = ()) -> Study:
    for earlier in STAGES[: STAGES.index(stage) + 1]:
        work = StudyWork.__new__(StudyWork)  # without reading the recipes of the runs, which are not real
        work.study, work.folder = made, folder
        made = expand_search(work, "s", earlier, recipe_path, failed)
    return made


def test_the_stages_train_all_then_the_best_few_then_the_best_with_further_seeds(tmp_path: Path) -> None:
    seeds = {"seeds": [0, 1], **TINY_SEARCH, "items": 9}
    seeds["search"] = {"s": TINY_SEARCH["search"]["s"] | {"seeds": [0, 1]}}
    made = validate_settings(Study, seeds, "")
    assert expand(made, tmp_path, "best") == made  # the budget is not known yet
    finish(tmp_path / "np-0")
    assert set(expand(made, tmp_path, "best").variants) - set(made.variants) == {f"s.short.{c}" for c in "abc"}
    for name, success in {"a": 0.2, "b": 0.4, "c": 0.3}.items():
        finish(tmp_path / f"s.short.{name}-0", success=success)
    long = expand(made, tmp_path, "long")
    assert [v for v in long.variants if ".long." in v] == ["s.long.b", "s.long.c"]
    assert long.seeds_of("s.long.b") == [0]
    finish(tmp_path / "s.long.b-0", success=0.5)
    finish(tmp_path / "s.long.c-0", success=0.6)
    best = expand(made, tmp_path, "best")
    assert best.variants["s"].of == "s.long.c" and best.seeds_of("s") == [0, 1] and best.seeds_of("s.long.b") == [0]
    assert Study.model_validate(best.model_dump(mode="json")) == best  # as it goes to a worker


def test_a_stage_waits_for_all_runs_of_the_stage_before_but_not_for_failed_ones(tmp_path: Path) -> None:
    made = validate_settings(Study, TINY_SEARCH | {"items": 9}, "")
    later = lambda stage, *failed: set(expand(made, tmp_path, stage, failed).variants) - set(made.variants)  # noqa: E731
    shorts = {f"s.short.{c}" for c in "abc"}
    finish(tmp_path / "np-0")
    finish(tmp_path / "s.short.a-0", success=0.2)
    finish(tmp_path / "s.short.b-0", success=0.4)
    assert later("long") == later("best") == shorts
    assert later("long", "s.short.c-0") == shorts | {"s.long.a", "s.long.b"}
    finish(tmp_path / "s.long.a-0", success=0.5)
    assert "s" not in later("best", "s.short.c-0")
    assert expand(made, tmp_path, "best", ("s.short.c-0", "s.long.b-0")).variants["s"].of == "s.long.a"
    finish(tmp_path / "s.short.c-0", success=0.9)  # repeated with success, after the long runs of the others
    assert later("best") == shorts | {"s.long.b", "s.long.c"}
    finish(tmp_path / "s.long.c-0", success=0.1)
    finish(tmp_path / "s.long.b-0", success=0.3)
    assert expand(made, tmp_path, "best").variants["s"].of == "s.long.b"  # a is not among the best two any more


def test_the_page_shows_configurations_that_are_not_finished_and_alarms_of_all_that_are(tmp_path: Path) -> None:
    made = validate_settings(Study, TINY_SEARCH | {"items": 9}, "")
    run = tmp_path / "s.short.a-0"
    finish(run, success=0.2)
    (run / "config.resolved.yaml").write_text("trainer: {evaluate_items: 900}\n")
    fooled = [{"step": k, "critic/p_edit": k / 100, "critic/p_identity": k / 100} for k in range(1, 101)]
    fooled[9] |= {"eval/applied": 0.8, "eval/preserved": 0.8}
    fooled[89] |= {"eval/applied": 0.4, "eval/preserved": 0.4}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fooled))
    text = "\n".join(search_section(made, "s", tmp_path))
    assert "The search is not finished" in text and text.count("not finished |") == 2 and "| a |" in text
    assert [words[:16] for words in search_alarms(made, "s", tmp_path)] == ["`s.short.a-0` at"]
    (run / "manifest.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "claims.json").write_text("[]")
    (tmp_path / "results.md").write_text(text)
    copy = publish_results(tmp_path / "results.md", tmp_path / "docs" / "page.md").with_suffix("")
    assert "\n".join(search_section(made, "s", copy)) == text  # a study can go on from its published copy
    assert search_alarms(made, "s", copy) == search_alarms(made, "s", tmp_path)
    used = made.model_copy(update={"variants": made.variants | {"s": Variant(of="s.short.a")}})
    assert not search_alarms(used, "s", tmp_path)  # an alarm of the row itself is told there


def test_no_configuration_exceeds_the_budget_and_one_more_update_would(tmp_path: Path) -> None:
    made = load_study(recipe_path("study-toy"))
    generator, critic, updates = 138.9, 47.7, 670
    finish(tmp_path / "few_pairs_np_edit-0", generator, critic)
    work = StudyWork.__new__(StudyWork)
    work.study, work.folder = made, tmp_path
    expanded = expand_search(work, "grpo_search", "short", recipe_path)
    for name in (v for v in expanded.variants if v.startswith("grpo_search.")):
        recipe = variant_recipe(expanded, name, 0, recipe_path, tmp_path)
        own = Step.passes_per_update(recipe.stages[0].settings, recipe.stages[0].batch_size)
        limits = [int(0.25 * total * updates / each) for total, each in zip((generator, critic), own)]
        assert recipe.total_updates() == min(limits) > 5 and recipe.start.endswith("few_pairs-0")
        assert recipe.trainer.evaluate_every == max(1, recipe.total_updates() // 8)


def test_a_mistake_in_a_configuration_is_told_before_the_first_run(tmp_path: Path) -> None:
    wrong = {"s": TINY_SEARCH["search"]["s"] | {"configurations": {"a": [], "b": ["stages.0.settings.grup=3"]}}}
    with pytest.raises(UserError, match="group"):
        study.run_study(
            validate_settings(Study, TINY_SEARCH | {"search": wrong}, ""), tmp_path / "s", recipe_path, print
        )
    wrong = {"s": TINY_SEARCH["search"]["s"] | {"recipe": "toy-supervised", "set": []}}
    with pytest.raises(UserError, match="one stage, flow_grpo"):
        study.run_study(
            validate_settings(Study, TINY_SEARCH | {"search": wrong}, ""), tmp_path / "s", recipe_path, print
        )
    assert not (tmp_path / "s").exists()


def test_a_quick_search_uses_one_seed() -> None:
    made = quick_study(load_study(recipe_path("study-toy")))
    assert made.search["grpo_search"].seeds == [0] and len(made.search["grpo_search"].configurations) == 15


def test_curves_show_rewards_and_success_rates() -> None:
    rows = [{"step": k, "reward/mean": 0.5 + 0.01 * k, "eval/both": 0.4} for k in range(1, 21)]
    assert reward_ends(rows) == pytest.approx((0.515, 0.695)) and reward_ends([{"step": 0}]) is None
    assert plot_reward_curves({"a": rows, "b": [{"step": 0}]})[:4] == b"\x89PNG"
    assert plot_reward_curves({})[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_whole_search(tmp_path: Path) -> None:
    made, progress = validate_settings(Study, TINY_SEARCH, ""), []
    page = study.run_study(made, tmp_path / "s", recipe_path, progress.append)  # at last the best is scored as a row
    words, scores = page.read_text(), json.loads((tmp_path / "s" / "results.json").read_text())
    assert len(progress) == 2 + 3 + 2 + 1 and set(scores) == {"few", "np", "s"}
    assert "## Search: s" in words and "![Rewards and success rates of s](s.png)" in words and "`s > few`: **" in words
    assert len([line for line in words.splitlines() if line.startswith(("| a |", "| b |", "| c |"))]) == 3
    progress.clear()
    assert study.run_study(made, tmp_path / "s", recipe_path, progress.append).read_text() == words and not progress
