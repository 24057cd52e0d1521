"""A study: many short runs beside each other, scored alike, each claim held against the intervals.

A study's file names a recipe, variants of it (changes to its keys, or another recipe), seeds, and tables of variants
with the claims that the tables should show. Each variant is trained once for each seed, in an ordinary run directory,
and scored on the toy benchmark's held-out scenes. A run that is there is not trained again, so a study that was stopped
goes on where it was. Critics of other qualities than the embedded one are taught first, into `critics/`.
`study_page.py` holds the claims against intervals and writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from npedit import trainer
from npedit.benchmarks import toy
from npedit.checkpoint import METRICS, read_config, read_rows, same_recipe, write_text, writing
from npedit.config import EMBEDDED, Recipe
from npedit.editor import Editor
from npedit.errors import UserError, nearest
from npedit.hacking import alarms
from npedit.parts import build_parts
from npedit.steps.base import Parts
from npedit.study_file import Study, recipe_of, shortened, weights_of
from npedit.study_page import pooled, write_results
from npedit.toy.models import graded_critic

SCENES_SEED = 1  # held-out scenes of every study
Event = Callable[[str], None]


def run_study(
    study: Study,
    folder: Path,
    find: Callable[[str], Path],
    told: Event,
    quick: bool = False,
    only: Collection[str] = (),
) -> Path:
    """Train and score what is missing, then write `results.md` and its plots into `folder`; returns its path.

    `quick` takes the first seed alone, a twentieth of the updates and a tenth of the items, into runs of their own. It
    shows that all runs through and what comes out, and is too short to tell who is right. With `only` just these
    variants are trained, so that several processes can fill one folder; the page shows all that are finished by then.

    Raises:
        UserError: a variant's recipe is wrong (all are read before the first is trained), or see `trainer.train`.
    """
    study = shortened(study) if quick else study
    trained = [name for name, variant in study.variants.items() if not variant.of]
    for name in only:
        if name not in trained:
            raise UserError(f"expected variants that are trained; got {name!r}.{nearest(name, trained)}")
    runs = {
        folder / f"{name}-{seed}": (name, seed, recipe_of(study, name, seed, find, folder, quick))
        for name in trained
        for seed in study.seeds_of(name)
    }
    todo = {run: found for run, found in runs.items() if not _finished(run) and (not only or found[0] in only)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for run, (_, _, recipe) in runs.items():
        if _finished(run):
            same_recipe(run, recipe)
    _teach_critics(study, folder, told, {name for name, _, _ in todo.values()})
    for i, (run, (name, seed, recipe)) in enumerate(todo.items()):
        told(f"{i + 1} of {len(todo)}: {name}, seed {seed}, {recipe.total_updates()} updates")
        _train(recipe, run)
    scores = {}
    for name, variant in study.variants.items():
        places = {seed: folder / f"{variant.of or name}-{seed}" for seed in study.seeds_of(name)}
        if done := [_scored(study, name, run, seed) for seed, run in places.items() if _finished(run)]:
            scores[name] = pooled(done)
    return write_results(study, folder, scores)


def _finished(run: Path) -> bool:
    return (run / "passes.json").is_file()


def _teach_critics(study: Study, folder: Path, told: Event, variants: Collection[str]) -> None:
    """Teach the study's own critics that these variants ask, if they are missing, and write down the ensembles."""
    asked = {study.variants[name].critic for name in variants} & set(study.critics)
    asked |= {m for name in asked for m in study.critics[name].members} & set(study.critics)
    for name in sorted(asked, key=lambda name: bool(study.critics[name].members)):
        critic = study.critics[name]
        if critic.members:
            members = [{"name": "llava_onevision", "weights": weights_of(study, m, folder)} for m in critic.members]
            with writing(folder):
                (folder / "critics").mkdir(exist_ok=True)
            write_text(folder / "critics" / f"{name}.yaml", yaml.safe_dump(members))
        else:
            told(f"critic {name}, {critic.batches} batches")
            graded_critic(folder / "critics" / name, critic.batches, study.items)


def _critic_right(study: Study, variant: str, folder: Path) -> float | None:
    """The share of questions that this variant's critic answers right; None of an ensemble, and of the embedded one
    where no table asks for it."""
    name = study.variants[study.variants[variant].of or variant].critic
    if name and study.critics[name].members or not name and not any(table.by_critic for table in study.tables):
        return None
    batches = study.critics[name].batches if name else 0
    return graded_critic(folder / "critics" / (name or EMBEDDED), batches, study.items)


def _train(recipe: Recipe, run: Path) -> None:
    """Train one run and leave `passes.json` beside it: how many pictures each net has seen in an update."""
    seen = {"generator": 0, "critic": 0}
    at_last = dict(seen)
    each: list[dict[str, int]] = []

    def counted(recipe: Recipe) -> Parts:
        parts = build_parts(recipe)
        velocity = parts.family.velocity

        def counting(net: Any, x: Any, *rest: Any, **named: Any) -> Any:
            seen["generator"] += len(x)
            return velocity(net, x, *rest, **named)

        parts.family.velocity = counting
        if parts.critic is not None:
            logits = parts.critic.logits

            def asking(texts: Any, *rest: Any, **named: Any) -> Any:
                seen["critic"] += len(texts)
                return logits(texts, *rest, **named)

            parts.critic.logits = asking
        return parts

    def on_event(event: str, facts: Mapping[str, Any]) -> None:
        if event == "update":
            if facts["step"] > 1 and "time/look" not in facts:  # else pictures for samples and evaluation are in it
                each.append({k: seen[k] - at_last[k] for k in seen})
            at_last.update(seen)

    trainer.train(recipe, run, on_event=on_event, parts=counted)
    means = {k: sum(e[k] for e in each) / len(each) if each else None for k in seen}
    write_text(run / "passes.json", json.dumps({"updates": recipe.total_updates(), **means}) + "\n")


def _scored(study: Study, name: str, run: Path, seed: int) -> dict[str, Any]:
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
        toy.items(study.items, SCENES_SEED),
    )
    rows = read_rows(run / METRICS)
    whole = {
        **scores,
        "steps": steps,
        "run": run.name,
        "seconds": sum(r.get("time/update") or 0.0 for r in rows),
        "passes": json.loads((run / "passes.json").read_text()),
        "alarms": [alarm.words() for alarm in alarms(rows, read_config(run)["trainer"]["evaluate_items"])],
        "critic_right": _critic_right(study, name, run.parent),
    }
    write_text(kept, json.dumps(whole) + "\n")
    return whole
