"""A search over settings in three stages, as further variants of a study.

    short   every configuration gets a part of the budget
    long    the best few get the whole budget, from the same start
    best    the best of these is trained with further seeds

The budget is what another variant computes in its whole training: pictures through the generator, and pictures through
the critic. The number of updates of a configuration is the largest that exceeds neither. Configurations are selected by
their success rate on other held-out scenes than those of the study's tables, so a lucky choice of scenes does not
flatter the row of the best one. Luck of the first seed can: the run by which it was selected is part of the row.
A stage begins when all runs of the stage before are finished; runs that failed are left out.

A configuration's variant is called SEARCH.STAGE.NAME. The row SEARCH uses the runs of the best one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from npedit.errors import UserError
from npedit.recipe.config import Recipe, find_class, load_recipe
from npedit.study.file import Search, Study, Variant, variant_recipe
from npedit.study.jobs import SELECTION, StudyWork, is_finished

STAGES = ("short", "long", "best")
EVALUATIONS = 8  # during a run, for the curves


def require_budget(work: StudyWork, name: str) -> str:
    """What is missing before a search can begin; "" if nothing is."""
    run = _budget_run(work, name)
    return "" if is_finished(run) else f"needs the finished run {run.name}, whose compute is the budget"


def check_searches(work: StudyWork, find: Callable[[str], Path]) -> None:
    """Check the recipes of all configurations, so that a mistake is told before the first run.

    Raises:
        UserError: see `affordable_updates`, and mistakes in a recipe.
    """
    for search in work.study.search.values():
        for own in search.configurations.values():
            affordable_updates(_recipe_of(work.study, search, [*search.set, *own], find), 1.0, 1.0)


def expand_search(
    work: StudyWork, name: str, stage: str, find: Callable[[str], Path], failed: Collection[str] = ()
) -> Study:
    """The study with the variants of a stage of a search. It is the same study while runs of an earlier stage are
    missing. The search goes on without the runs in `failed`."""
    search, new = work.study.search[name], {}
    if require_budget(work, name):
        return work.study
    if stage == "short":
        new = {f"{name}.short.{c}": _variant(work, name, c, search.short, find) for c in search.configurations}
        return work.study.model_copy(update={"variants": work.study.variants | new})
    kept = best_configurations(work, name, "short", search.configurations, failed)[: search.keep]
    if stage == "long":
        new = {f"{name}.long.{c}": _variant(work, name, c, 1.0, find) for c in kept}
    else:
        for best in (f"{name}.long.{c}" for c in best_configurations(work, name, "long", kept, failed)[:1]):
            trained = work.study.variants[best].model_copy(update={"seeds": search.seeds})
            new = {best: trained, name: Variant(of=best, words=trained.words)}
    return work.study.model_copy(update={"variants": work.study.variants | new})


def best_configurations(
    work: StudyWork, name: str, stage: str, among: Iterable[str], failed: Collection[str] = ()
) -> list[str]:
    """These configurations by their success rate on the scenes of the selection, the best first, without those whose
    run failed. [] while the run of another one is missing."""
    rates, seed = selection_rates(work.study, work.folder, name, stage), work.study.search[name].seeds[0]
    alive = [c for c in among if f"{name}.{stage}.{c}-{seed}" not in failed]
    return sorted(alive, key=lambda c: -rates[c]) if set(alive) <= set(rates) else []


def selection_rates(study: Study, folder: Path, name: str, stage: str) -> dict[str, float]:
    """The success rate on the scenes of the selection of every configuration whose run of this stage is finished."""
    search, found = study.search[name], {}
    for configuration in search.configurations:
        kept = folder / f"{name}.{stage}.{configuration}-{search.seeds[0]}" / SELECTION
        if kept.is_file():
            found[configuration] = float(json.loads(kept.read_text())["both"]["value"])
    return found


def affordable_updates(recipe: Recipe, generator: float, critic: float) -> int:
    """How many updates of a recipe's stage make no more than these generator passes and critic passes; at least 1.

    Raises:
        UserError: the recipe has several stages, or its step cannot count its passes.
    """
    stage = recipe.stages[-1]
    count = getattr(find_class("steps", stage.step), "passes_per_update", None)
    if len(recipe.stages) > 1 or count is None:
        raise UserError(
            f"expected a search over a recipe with one stage, flow_grpo; got {[s.step for s in recipe.stages]}; "
            "give the search a recipe of that form and a start"
        )
    own_generator, own_critic = count(stage.settings, stage.batch_size * stage.accumulate)
    return max(1, int(min(generator / own_generator, critic / own_critic)))


def describe_configuration(search: Search, configuration: str) -> str:
    """The settings of a configuration in one line."""
    words = ", ".join(search.configurations[configuration]) or "the common settings of the search"
    return words.replace("stages.0.", "").replace("settings.", "")


def _budget_run(work: StudyWork, name: str) -> Path:
    budget = work.study.search[name].budget
    return work.folder / f"{budget}-{work.study.seeds_of(budget)[0]}"


def _variant(work: StudyWork, name: str, configuration: str, part: float, find: Callable[[str], Path]) -> Variant:
    """The variant of one configuration with a part of the budget."""
    search = work.study.search[name]
    lines = [*search.set, *search.configurations[configuration]]
    updates = affordable_updates(_recipe_of(work.study, search, lines, find), *_budget(work, search, name, part, find))
    every = max(1, updates // EVALUATIONS)
    lines += [f"stages.0.updates={updates}", f"trainer.evaluate_every={every}"]
    words = "; ".join(filter(None, (search.row, describe_configuration(search, configuration))))
    return Variant(recipe=search.recipe, start=search.start, set=lines, seeds=search.seeds[:1], words=words)


def _recipe_of(study: Study, search: Search, lines: list[str], find: Callable[[str], Path]) -> Recipe:
    return load_recipe(find(search.recipe or study.recipe), [*study.set, *lines])


def _budget(
    work: StudyWork, search: Search, name: str, part: float, find: Callable[[str], Path]
) -> tuple[float, float]:
    """Generator passes and critic passes: this part of what the whole training of the budget's variant makes."""
    run = _budget_run(work, name)
    passes, seed = json.loads((run / "passes.json").read_text()), work.study.seeds_of(search.budget)[0]
    total = variant_recipe(work.study, search.budget, seed, find, work.folder).total_updates() * part
    return (passes["generator"] or 0.0) * total, (passes["critic"] or 0.0) * total
