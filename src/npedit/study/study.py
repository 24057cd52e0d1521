"""A study: many short runs, all scored in the same way, and claims about them tested against confidence intervals.

A study's file names a recipe, variants of it (changes to its keys, or another recipe), seeds, and tables of variants
with the claims that the tables should show. Each variant is trained once for each seed, in an ordinary run directory,
and scored on the toy benchmark's held-out scenes. A finished run is not trained again, so a study that was stopped
resumes. Critics of other quality than the embedded one are trained first, into `critics/`. `page.py` tests the claims
and writes the page.

Whoever writes into a folder holds it (`runs/lock.py`): a run while it is trained and scored, a critic's folder while
it is trained, the study's folder while its results are written. So several processes can fill one study's folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from npedit.benchmarks import toy
from npedit.editor import Editor
from npedit.errors import UserError, did_you_mean
from npedit.recipe.config import EMBEDDED, Recipe
from npedit.runs.checkpoint import (
    METRICS,
    explain_write_errors,
    read_config,
    read_rows,
    require_allowed_changes,
    write_text,
)
from npedit.runs.lock import FolderHeldError, Lock, hold
from npedit.scoring.reward_hacking import reward_hacking_alarms
from npedit.steps.base import Parts
from npedit.study.file import Study, critic_weights, quick_study, variant_recipe
from npedit.study.page import pool_seeds, write_results
from npedit.toy_models.build import train_graded_critic
from npedit.training import trainer
from npedit.training.parts import build_parts

log = logging.getLogger(__name__)
SCENES_SEED = 1  # held-out scenes of every study
POLL_SECONDS = 0.5  # between two attempts to hold a folder that another process holds
ReportProgress = Callable[[str], None]


def run_study(
    study: Study,
    folder: Path,
    find: Callable[[str], Path],
    report_progress: ReportProgress,
    quick: bool = False,
    only: Collection[str] = (),
) -> Path:
    """Train and score the runs that are missing, then write `results.md` and its plots into `folder`; returns the path
    of `results.md`.

    `quick` uses one seed, a 25th of the updates and a tenth of the items, in separate runs. A quick study shows that
    every part works; it is too short to decide a claim. With `only`, just these variants are trained, so several
    processes can fill one folder; the page shows all runs that are finished by then.

    Raises:
        UserError: a variant's recipe is wrong (all are read before the first is trained), or see `trainer.train`.
    """
    study = quick_study(study) if quick else study
    trained = [name for name, variant in study.variants.items() if not variant.of]
    for name in only:
        if name not in trained:
            raise UserError(f"expected variants that are trained; got {name!r}.{did_you_mean(name, trained)}")
    runs = {
        folder / f"{name}-{seed}": (name, seed, variant_recipe(study, name, seed, find, folder, quick))
        for name in trained
        for seed in study.seeds_of(name)
    }
    todo = {run: found for run, found in runs.items() if not _is_finished(run) and (not only or found[0] in only)}
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for run, (_, _, recipe) in runs.items():
        if _is_finished(run):
            require_same_recipe(run, recipe)
    _train_critics(study, folder, report_progress, {name for name, _, _ in todo.values()})
    for i, (run, (name, seed, recipe)) in enumerate(todo.items()):
        if _is_finished(run):  # by another process in the meantime
            continue
        report_progress(f"{i + 1} of {len(todo)}: {name}, seed {seed}, {recipe.total_updates()} updates")
        _train_and_count_passes(recipe, run)
    scores = {}
    for name, variant in study.variants.items():
        places = {seed: folder / f"{variant.of or name}-{seed}" for seed in study.seeds_of(name)}
        if done := [_score_held(study, name, run, seed) for seed, run in places.items() if _is_finished(run)]:
            scores[name] = pool_seeds(done)
    with hold_when_free(folder, "study: write results"):
        return write_results(study, folder, scores)


def _is_finished(run: Path) -> bool:
    return (run / "passes.json").is_file()


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


def _train_critics(study: Study, folder: Path, report_progress: ReportProgress, variants: Collection[str]) -> None:
    """Train the study's critics that these variants use, if they are missing, and write the files of ensembles."""
    asked = {study.variants[name].critic for name in variants} & set(study.critics)
    asked |= {m for name in asked for m in study.critics[name].members} & set(study.critics)
    for name in sorted(asked, key=lambda name: bool(study.critics[name].members)):
        critic = study.critics[name]
        if critic.members:
            members = [{"name": "llava_onevision", "weights": critic_weights(study, m, folder)} for m in critic.members]
            with explain_write_errors(folder):
                (folder / "critics").mkdir(exist_ok=True)
            write_text(Path(critic_weights(study, name, folder)), yaml.safe_dump(members))
        else:
            report_progress(f"critic {name}, {critic.batches} batches")
            _train_and_score_critic(study, name, folder)


def _train_and_score_critic(study: Study, critic: str, folder: Path) -> float:
    """A critic's share of right answers. A missing critic is trained first; if several processes need the same one, one
    trains it and the others wait."""
    batches = 0 if critic == EMBEDDED else study.critics[critic].batches
    place = folder / "critics" / EMBEDDED if critic == EMBEDDED else Path(critic_weights(study, critic, folder)).parent
    with explain_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    with hold_when_free(place, "study: train a critic"):
        return train_graded_critic(place, batches, study.items)


def _critic_accuracy(study: Study, run: Path) -> float | None:
    """The share of right answers of a run's critic. None if the run has no critic, an ensemble, or a critic that is not
    the study's; also for the embedded critic if no table shows the share."""
    weights = (read_config(run)["critic"] or {}).get("weights")
    if weights == EMBEDDED:
        return (
            _train_and_score_critic(study, EMBEDDED, run.parent)
            if any(table.by_critic for table in study.tables)
            else None
        )
    single = [
        name for name, c in study.critics.items() if c.batches and weights == critic_weights(study, name, run.parent)
    ]
    return _train_and_score_critic(study, single[0], run.parent) if single else None


def require_same_recipe(run: Path, recipe: Recipe) -> None:
    """Check that a finished run of the study was trained by this very recipe.

    Raises:
        UserError: the study has been edited since; a change that a resumed run may make counts too.
    """
    if changes := require_allowed_changes(run, recipe):
        said = "; ".join(f"{c.setting}: {c.old!r} -> {c.new!r}" for c in changes)
        raise UserError(f"expected a run of this study's recipe in {run}; got another ({said}); choose another folder")


def _train_and_count_passes(recipe: Recipe, run: Path) -> None:
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


def _score_held(study: Study, name: str, run: Path, seed: int) -> dict[str, Any]:
    """The scores of one run, which is held meanwhile: two processes of a study may want to score the same run."""
    with hold_when_free(run, "study: score"):
        return _score_run(study, name, run, seed)


def _score_run(study: Study, name: str, run: Path, seed: int) -> dict[str, Any]:
    """The scores of one run, kept beside it; with the seconds and passes that its training took."""
    kept, steps = run / f"score-{name}.json", study.variants[name].steps or None
    if kept.is_file():
        found = json.loads(kept.read_text())
        if "critic_right" in found and (found["n"], found["steps"]) == (study.items, steps):
            return found
    editor = Editor.open(run)
    noises = iter(range(seed * 1_000_003, seed * 1_000_003 + study.items))
    scores = toy.score(
        lambda x, words: editor.edit_tensor(x, words, [next(noises) for _ in words], steps),
        toy.sample_items(study.items, SCENES_SEED),
    )
    rows = read_rows(run / METRICS)
    found = {
        **scores,
        "steps": steps,
        "run": run.name,
        "seconds": sum(r.get("time/update") or 0.0 for r in rows),
        "passes": json.loads((run / "passes.json").read_text()),
        "alarms": [
            alarm.message() for alarm in reward_hacking_alarms(rows, read_config(run)["trainer"]["evaluate_items"])
        ],
        "critic_right": _critic_accuracy(study, run),
    }
    write_text(kept, json.dumps(found) + "\n")
    return found
