"""The pieces of work of a study: train one critic, or train one variant with one seed and score it.

Whoever writes into a folder holds it (`runs/lock.py`): a run while it is trained and scored, a critic's folder while
it is trained. So several processes can fill one study's folder. A process that finds a run held waits until it is free.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from npedit.benchmarks import toy
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.recipe.config import EMBEDDED, Recipe, make_recipe
from npedit.runs.checkpoint import (
    METRICS,
    explain_write_errors,
    is_run,
    read_config,
    read_rows,
    require_allowed_changes,
    write_text,
)
from npedit.runs.lock import FolderHeldError, Lock, hold
from npedit.scoring.reward_hacking import reward_hacking_alarms
from npedit.steps.base import Parts
from npedit.study.file import Study, critic_weights, is_configuration, variant_recipe
from npedit.toy_models.build import train_graded_critic
from npedit.training import trainer
from npedit.training.parts import build_parts

log = logging.getLogger(__name__)
SCENES_SEED = 1  # held-out scenes of every study
SELECTION_SEED = 2  # other held-out scenes, by which a search selects its best configurations
SELECTION = "selection.json"
POLL_SECONDS = 0.5  # between two attempts to hold a folder that another process holds


@dataclass(frozen=True)
class Job:
    """One piece of work: a critic to train (`critic`), or a run to train and score (`variant`, `seed`). `needs` are the
    names of other jobs that must be finished first."""

    name: str
    variant: str = ""
    seed: int = 0
    critic: str = ""
    needs: tuple[str, ...] = ()
    updates: int = 0

    def describe(self) -> str:
        """One line about the job."""
        if self.critic:
            return f"critic {self.critic}, {self.updates} batches" if self.updates else f"critic {self.critic}"
        return f"{self.variant}, seed {self.seed}, {self.updates} updates"


@dataclass(frozen=True)
class Failure:
    """A job that did not finish, and why."""

    name: str
    reason: str


class StudyWork:
    """The jobs of a study in its folder. `find` turns a recipe's name into its file.

    Raises:
        UserError: the recipe of a variant is wrong; a run was begun with another recipe.
    """

    def __init__(self, study: Study, folder: Path, find: Callable[[str], Path], quick: bool) -> None:
        self.study, self.folder = study, folder
        self.recipes: dict[str, Recipe] = {}
        self.runs: dict[str, tuple[str, int]] = {}
        for name, variant in study.variants.items():
            for seed in study.seeds_of(name) if not variant.of else ():
                self.runs[f"{name}-{seed}"] = (name, seed)
                self.recipes[f"{name}-{seed}"] = variant_recipe(study, name, seed, find, folder, quick)
        for run, recipe in self.recipes.items():
            if is_run(folder / run):
                require_same_recipe(folder / run, recipe)

    def missing_jobs(self, only: Collection[str] = ()) -> list[Job]:
        """The jobs that are not done; with `only`, those of these variants, of the variants that they start from, and
        of the critics that they need."""
        chosen = {start for name in only or self.study.variants for start in self._with_starts(name)}
        runs = [self._run_job(*found) for found in self.runs.values() if found[0] in chosen]
        runs = [job for job in runs if not self.is_done(job)]
        return [*self._critic_jobs({job.variant for job in runs if not is_finished(self.folder / job.name)}), *runs]

    def _with_starts(self, name: str) -> Iterator[str]:
        """A variant, the variant that it starts from, and so on."""
        while name:
            yield name
            name = self.study.variants[name].start

    def _run_job(self, name: str, seed: int) -> Job:
        variant = self.study.variants[name]
        needs = [f"{variant.start}-{seed}"] if variant.start else []
        needs += [f"critic {variant.critic}"] if variant.critic else []
        return Job(f"{name}-{seed}", name, seed, "", tuple(needs), self.recipes[f"{name}-{seed}"].total_updates())

    def _critic_jobs(self, variants: Collection[str]) -> list[Job]:
        """Jobs for the critics that these variants use, members of ensembles first."""
        critics = self.study.critics
        asked = {self.study.variants[name].critic for name in variants} & set(critics)
        asked |= {m for name in asked for m in critics[name].members} & set(critics)
        jobs = []
        for name in sorted(asked, key=lambda name: (bool(critics[name].members), name)):
            needs = tuple(f"critic {m}" for m in critics[name].members if m in critics)
            jobs.append(Job(f"critic {name}", critic=name, needs=needs, updates=critics[name].batches))
        return [job for job in jobs if not self.is_done(job)]

    def is_done(self, job: Job) -> bool:
        """Whether nothing is left to do: the run is trained and has all its scores, the critic's files are there."""
        if job.critic:
            weights = Path(critic_weights(self.study, job.critic, self.folder))
            return (weights if self.study.critics[job.critic].members else weights.with_name("right.json")).is_file()
        run = self.folder / job.name
        if not is_finished(run) or (is_configuration(self.study, job.variant) and not self._has_selection(run)):
            return False
        return all(self._kept_score(name, run) for name in self._scored_names(job.variant))

    def execute(self, job: Job) -> None:
        """Do a job. A run that another process trains at the moment is waited for.

        Raises:
            UserError: see `trainer.train`.
        """
        if job.critic:
            self._train_critic(job.critic)
            return
        run = self.folder / job.name
        train_when_free(self.recipes[job.name], run)
        for name in self._scored_names(job.variant):
            self.score(name, run, job.seed)
        if is_configuration(self.study, job.variant):
            self._score_for_selection(run, job.seed)

    def _scored_names(self, variant: str) -> list[str]:
        """The rows that this variant's runs are used for."""
        rows = [name for name, v in self.study.variants.items() if (v.of or name) == variant]
        return [name for name in rows if not is_configuration(self.study, name)]

    # ------------------------------------------------------------------------------------------------------ scores

    def all_scores(self) -> dict[str, list[dict[str, Any]]]:
        """The scores of all finished runs, by row. Scores that are missing are computed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, variant in self.study.variants.items():
            for seed in () if is_configuration(self.study, name) else self.study.seeds_of(name):
                run = self.folder / f"{variant.of or name}-{seed}"
                if is_finished(run):
                    found.setdefault(name, []).append(self.score(name, run, seed))
        return found

    def score(self, name: str, run: Path, seed: int) -> dict[str, Any]:
        """The scores of one run in one row, kept beside the run. The run is held meanwhile."""
        with hold_when_free(run, "study: score"):
            if kept := self._kept_score(name, run):
                return kept
            steps, outcomes = self.study.variants[name].steps or None, []
            scores = toy.score(
                edit_function(run, seed, self.study.items, steps),
                toy.sample_items(self.study.items, SCENES_SEED),
                on_outcome=lambda applied, preserved: outcomes.append("01"[applied and preserved]),
            )
            rows = read_rows(run / METRICS)
            found = {
                **scores,
                "outcomes": "".join(outcomes),
                "steps": steps,
                "run": run.name,
                "seconds": sum(r.get("time/update") or 0.0 for r in rows),
                "passes": json.loads((run / "passes.json").read_text()),
                "alarms": run_alarms(run),
                "critic_right": self._critic_accuracy(run),
            }
            write_text(run / f"score-{name}.json", json.dumps(found) + "\n")
            return found

    def _kept_score(self, name: str, run: Path) -> dict[str, Any] | None:
        """The scores beside a run, if they are complete and were made with these items and steps."""
        kept = run / f"score-{name}.json"
        if not kept.is_file():
            return None
        found = json.loads(kept.read_text())
        wanted = (self.study.items, self.study.variants[name].steps or None)
        is_complete = {"critic_right", "outcomes"} <= found.keys() and (found["n"], found["steps"]) == wanted
        return found if is_complete else None

    def _score_for_selection(self, run: Path, seed: int) -> None:
        """Write the success rate on the scenes of the selection."""
        n = self._selection_items
        with hold_when_free(run, "study: score"):
            if not self._has_selection(run):
                found = toy.score(edit_function(run, seed, n, None), toy.sample_items(n, SELECTION_SEED))
                write_text(run / SELECTION, json.dumps({"n": n, "both": found["both"]}) + "\n")

    @property
    def _selection_items(self) -> int:
        return max(9, self.study.items // 2)

    def _has_selection(self, run: Path) -> bool:
        """Whether a configuration's run has its success rate on the scenes of this study's selection."""
        kept = run / SELECTION
        return kept.is_file() and json.loads(kept.read_text())["n"] == self._selection_items

    # ----------------------------------------------------------------------------------------------------- critics

    def _train_critic(self, name: str) -> None:
        critic = self.study.critics[name]
        if not critic.members:
            self._train_and_score_critic(name)
            return
        weights = [critic_weights(self.study, m, self.folder) for m in critic.members]
        with explain_write_errors(self.folder):
            (self.folder / "critics").mkdir(exist_ok=True)
        members = [{"name": "llava_onevision", "weights": w} for w in weights]
        write_text(Path(critic_weights(self.study, name, self.folder)), yaml.safe_dump(members))

    def _train_and_score_critic(self, critic: str) -> float:
        """A critic's share of right answers. A missing critic is trained first; if several processes need the same one,
        one trains it and the others wait."""
        batches = 0 if critic == EMBEDDED else self.study.critics[critic].batches
        place = Path(critic_weights(self.study, critic, self.folder)).parent
        place = self.folder / "critics" / EMBEDDED if critic == EMBEDDED else place
        with explain_write_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        with hold_when_free(place, "study: train a critic"):
            return train_graded_critic(place, batches, self.study.items)

    def _critic_accuracy(self, run: Path) -> float | None:
        """The share of right answers of a run's critic. None if the run has no critic, an ensemble, or a critic that is
        not the study's; also for the embedded critic if no table shows the share."""
        weights = (read_config(run)["critic"] or {}).get("weights")
        if weights == EMBEDDED:
            is_shown = any(table.by_critic for table in self.study.tables)
            return self._train_and_score_critic(EMBEDDED) if is_shown else None
        single = [k for k, c in self.study.critics.items() if c.batches]
        single = [k for k in single if weights == critic_weights(self.study, k, run.parent)]
        return self._train_and_score_critic(single[0]) if single else None


def is_finished(run: Path) -> bool:
    """Whether a run is trained to its end."""
    return (run / "passes.json").is_file()


def run_alarms(run: Path) -> list[str]:
    """The alarms of reward hacking of a run, in words."""
    items = read_config(run)["trainer"]["evaluate_items"]
    return [alarm.message() for alarm in reward_hacking_alarms(read_rows(run / METRICS), items)]


def edit_function(run: Path, seed: int, items: int, steps: int | None) -> toy.EditFn:
    """The function by which `toy.score` edits with a run's editor. Each item has the noise of another seed."""
    editor, noises = Editor.open(run), iter(range(seed * 1_000_003, seed * 1_000_003 + items))
    return lambda x, words: editor.edit_tensor(x, words, [next(noises) for _ in words], steps)


@contextmanager
def hold_when_free(folder: Path, work: str) -> Iterator[Lock]:
    """Hold a folder for the length of a `with` block, as `runs.lock.hold` does; first wait until no other process, such
    as one that trains other variants of the study, holds it. A wait is reported in the log once."""
    with ExitStack() as stack:
        waited = False
        while True:
            try:
                held = stack.enter_context(hold(folder, work))
                break
            except FolderHeldError as error:
                if not waited:
                    log.warning("waiting: %s", error)
                waited = True
                time.sleep(POLL_SECONDS)
        yield held


def train_when_free(recipe: Recipe, run: Path) -> None:
    """Train one run, unless it is finished. A run that another process trains is waited for. A wait is reported in the
    log once."""
    waited = False
    while not is_finished(run):
        try:
            train_and_count_passes(recipe, run)
        except FolderHeldError as error:
            if not waited:
                log.warning("waiting: %s", error)
            waited = True
            time.sleep(POLL_SECONDS)


def require_same_recipe(run: Path, recipe: Recipe) -> None:
    """Check that a run of the study was begun with this very recipe. The study's folder may have been moved
    since.

    Raises:
        UserError: the study has been edited since; a change that a resumed run may make counts too.
    """
    if changes := require_allowed_changes(run, _use_old_places(recipe, run)):
        said = "; ".join(f"{c.setting}: {c.old!r} -> {c.new!r}" for c in changes)
        raise UserError(f"expected a run of this study's recipe in {run}; got another ({said}); choose another folder")


def _use_old_places(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the paths that the run was trained with, where they are the same place in the study's folder."""
    new, old = recipe.as_dict(), read_config(run)
    for now, then, key in ((new, old, "start"), (new["critic"] or {}, old["critic"] or {}, "weights")):
        path, folder = now.get(key, ""), f"{run.parent}/"
        if path.startswith(folder) and then.get(key, "").endswith(f"/{path.removeprefix(folder)}"):
            now[key] = then[key]
    return make_recipe(new)


def train_and_count_passes(recipe: Recipe, run: Path) -> None:
    """Train one run and write its `passes.json`: pictures that went through the generator and the critic in an update,
    the mean over all updates. `passes.part.json` keeps the counts of a run that is stopped."""
    passes = {"generator": 0, "critic": 0}
    passes_before, partial_file = dict(passes), run / "passes.part.json"
    total = json.loads(partial_file.read_text()) if partial_file.is_file() else {"updates": 0, **passes}

    def build_counting_parts(recipe: Recipe) -> Parts:
        parts = build_parts(recipe)
        velocity = parts.family.velocity

        def counted_velocity(net: Any, x: Any, *rest: Any, **named: Any) -> Any:
            passes["generator"] += len(x)
            return velocity(net, x, *rest, **named)

        vars(parts.family)["velocity"] = counted_velocity
        if parts.critic is not None:
            logits, critic_count = parts.critic.logits, len(getattr(parts.critic, "members", "1"))

            def counted_logits(texts: Any, *rest: Any, **named: Any) -> Any:
                passes["critic"] += len(texts) * critic_count
                return logits(texts, *rest, **named)

            vars(parts.critic)["logits"] = counted_logits
        return parts

    def on_event(event: str, facts: Mapping[str, Any]) -> None:
        if event == "update":
            if facts["step"] > 1 and "time/look" not in facts:  # else pictures for samples and evaluation are in it
                total.update({k: total[k] + passes[k] - passes_before[k] for k in passes}, updates=total["updates"] + 1)
                write_text(partial_file, json.dumps(total) + "\n")
            passes_before.update(passes)

    trainer.train(recipe, run, on_event=on_event, parts=build_counting_parts)
    means = {k: total[k] / total["updates"] if total["updates"] else None for k in passes}
    with hold_when_free(run, "study: count passes"):
        write_text(run / "passes.json", json.dumps({"updates": recipe.total_updates(), **means}) + "\n")
