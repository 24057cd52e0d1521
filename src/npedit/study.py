"""A study: many short runs beside each other, scored alike, each claim held against the intervals.

A study's file names a recipe, variants of it (changes to its keys, or another recipe), seeds, and tables of variants
with the claims that the tables should show. Each variant is trained once for each seed, in an ordinary run directory,
and scored on the toy benchmark's held-out scenes. A run that is there is not trained again, so a study that was stopped
goes on where it was. Critics of other qualities than the embedded one are taught first, into `critics/`.

A claim "a > b" holds when the whole 95 % interval of the difference of `both` (Newcombe's, from Wilson's, 1998) lies
above zero, is refuted when it lies below, and else is left open. Seeds are pooled: the interval covers the scenes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
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
from npedit.plots import against, comparison
from npedit.steps.base import Parts
from npedit.study_file import CLAIM, QUICK, Comparison, Study, recipe_of, weights_of
from npedit.toy.models import graded_critic

_PLACE = re.compile(r'(?<="command": ")[^" ]*/([^/" ]+)')  # of the program, in a manifest
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
    if quick:
        study = study.model_copy(
            update={"name": f"{study.name}-quick", "seeds": study.seeds[:1], "items": max(9, 2 * study.items // QUICK)}
        )
    seeds = study.seeds
    trained = [name for name, variant in study.variants.items() if not variant.of]
    for name in only:
        if name not in trained:
            raise UserError(f"expected variants that are trained; got {name!r}.{nearest(name, trained)}")
    recipes = {(name, seed): recipe_of(study, name, seed, find, folder, quick) for name in trained for seed in seeds}
    wanted = {name for name in trained if not only or name in only or _finished(folder, name, seeds)}
    todo = {key: recipe for key, recipe in recipes.items() if key[0] in wanted}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    right = _critics(study, folder, told, quick, _needed(study, wanted))
    for i, ((name, seed), recipe) in enumerate(todo.items()):
        told(f"{i + 1} of {len(todo)}: {name}, seed {seed}, {recipe.total_updates()} updates")
        _train(recipe, folder / f"{name}-{seed}")
    scores = {
        name: _pooled([_scored(study, name, folder / f"{v.of or name}-{seed}", seed) for seed in seeds])
        for name, v in study.variants.items()
        if _finished(folder, v.of or name, seeds)
    }
    for name, score in scores.items():
        score["critic_right"] = right.get(study.variants[study.variants[name].of or name].critic)
    return write_results(study, folder, scores, seeds)


def _finished(folder: Path, name: str, seeds: list[int]) -> bool:
    return all((folder / f"{name}-{seed}" / "passes.json").is_file() for seed in seeds)


def _needed(study: Study, trained: Collection[str]) -> set[str]:
    """The study's own critics that these variants ask, members of ensembles too."""
    asked = {study.variants[name].critic for name in trained} & set(study.critics)
    return asked.union(*(set(study.critics[name].members) & set(study.critics) for name in asked))


def _critics(study: Study, folder: Path, told: Event, quick: bool, needed: Collection[str]) -> dict[str, float]:
    """Teach the `needed` critics that are missing and write down the ensembles. Returns the share of questions that
    each single one answers right ("": the embedded one's), where a table asks for it or it was taught."""
    right = {}
    for name, critic in study.critics.items():
        if name not in needed:
            continue
        if critic.members:
            members = [{"name": "llava_onevision", "weights": weights_of(study, m, folder)} for m in critic.members]
            with writing(folder):
                (folder / "critics").mkdir(exist_ok=True)
            write_text(folder / "critics" / f"{name}.yaml", yaml.safe_dump(members))
        else:
            batches = max(1, critic.batches // (QUICK if quick else 1))
            told(f"critic {name}, {batches} batches")
            right[name] = graded_critic(folder / "critics" / name, batches, study.items)
    if any(table.by_critic for table in study.tables):
        right[""] = graded_critic(folder / "critics" / EMBEDDED, 0, study.items)
    return right


def _train(recipe: Recipe, run: Path) -> None:
    """Train one run and leave `passes.json` beside it: how many pictures each net has seen in an update."""
    if (run / "passes.json").is_file():
        same_recipe(run, recipe)
        return
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
        if (found["n"], found["steps"]) == (study.items, steps):
            return found
    editor = Editor.open(run)
    noises = iter(range(seed * 1_000_003, seed * 1_000_003 + study.items))
    scores = toy.score(
        lambda x, words: editor.edit_tensor(x, words, [next(noises) for _ in words], steps),
        toy.items(study.items, SCENES_SEED),
    )
    passes = json.loads((run / "passes.json").read_text())
    rows = read_rows(run / METRICS)
    seconds = sum(r.get("time/update") or 0.0 for r in rows)
    told = [alarm.words() for alarm in alarms(rows, read_config(run)["trainer"]["evaluate_items"])]
    whole = {**scores, "steps": steps, "run": run.name, "seconds": seconds, "passes": passes, "alarms": told}
    write_text(kept, json.dumps(whole) + "\n")
    return whole


def _pooled(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds' scores as one: their hits added up, their values kept side by side."""
    n = sum(f["n"] for f in found)
    kinds = found[0]["by_type"]
    share = lambda rows, key: toy.wilson(sum(round(r[key]["value"] * r["n"]) for r in rows), sum(r["n"] for r in rows))  # noqa: E731
    return {
        "n": n,
        **{key: share(found, key) for key in toy.MEASURES},
        "by_type": {k: share([f["by_type"][k] for f in found], "both")["value"] for k in kinds},
        "copy_rate": sum(f["copy_rate"] for f in found) / len(found),
        "each": [f["both"]["value"] for f in found],
        "runs": [f["run"] for f in found],
        "alarms": [f"`{f['run']}` {words}" for f in found for words in f["alarms"]],
        "minutes": sum(f["seconds"] for f in found) / len(found) / 60,
        "passes": found[0]["passes"],
    }


def difference(a: toy.Rate, b: toy.Rate) -> tuple[float, float, float]:
    """a - b of two shares with Newcombe's 95 % interval (1998, method 10): (difference, low, high)."""
    d = a["value"] - b["value"]
    low = math.hypot(a["value"] - a["ci95"][0], b["ci95"][1] - b["value"])
    high = math.hypot(a["ci95"][1] - a["value"], b["value"] - b["ci95"][0])
    return d, d - low, d + high


def verdict(claim: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """One line on a claim: "holds", "refuted" or "open", with the difference that says so; or "not run"."""
    first, sign, second = CLAIM.match(claim).groups()
    if missing := [name for name in (first, second) if name not in scores]:
        return f"`{claim}`: **not run** ({', '.join(missing)})"
    d, low, high = difference(scores[first]["both"], scores[second]["both"])
    if sign == ">":
        word = "holds" if low > 0 else "refuted" if high < 0 else "open"
    else:
        word = "holds" if low > -0.1 and high < 0.1 else "refuted" if low > 0.1 or high < -0.1 else "open"
    return f"`{claim}`: **{word}** (difference {d:+.3f} [{low:+.3f}, {high:+.3f}])"


def write_results(study: Study, folder: Path, scores: Mapping[str, dict[str, Any]], seeds: list[int]) -> Path:
    """Tables, verdicts and plots of a study that has been run."""
    how = f"{study.items} items a run, {len(seeds)} seed{'s' if len(seeds) > 1 else ''} a row; 95 % intervals."
    lines = [f"# {study.name}", "", f"Held-out scenes and phrasings, the oracle's judgement, {how}"]
    lines += ["", study.words] if study.words else []
    if missing := [name for name in study.variants if name not in scores]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    kinds = list(next(iter(scores.values()))["by_type"])
    for number, table in enumerate(study.tables, 1):
        rows = [row for row in table.rows if row in scores]
        picture = folder / f"{number}.png"
        if rows:
            with writing(picture):
                picture.write_bytes(_picture(table, rows, scores))
        lines += ["", f"## {table.title}", "", *([table.words, ""] if table.words else [])]
        lines += [verdict(c, scores) + "  " for c in table.claims]
        lines += ["", f"![{table.title}]({picture.name})", "", _head(kinds)] if rows else []
        lines += [_line(study, name, scores[name], kinds) for name in rows]
    said = [f"- {words}" for name, s in scores.items() if not study.variants[name].of for words in s["alarms"]]
    lines += ["", "## Alarms", "", *(said or ["None: in no run did the critic's score rise while the oracle's fell."])]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    write_text(folder / "results.json", json.dumps(scores, indent=1) + "\n")
    return folder / "results.md"


def publish(results: Path, page: Path) -> Path:
    """Copy a study's results for others to read: the page, and in a folder of its name the plots, the numbers and the
    manifest of each run that they name, where the page's links find them; of the program's place on this machine only
    its name is told. Returns the page."""
    study, target = results.parent, page.with_suffix("")
    runs = {run for row in json.loads((study / "results.json").read_text()).values() for run in row["runs"]}
    with writing(target):
        manifests = [study / run / "manifest.json" for run in sorted(runs)]
        for path in [*study.glob("*.png"), study / "results.json", *manifests]:
            copy = target / path.relative_to(study)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                shutil.copyfile(path, copy)
            else:
                write_text(copy, _PLACE.sub(r"\1", path.read_text(encoding="utf-8")))
    write_text(page, results.read_text(encoding="utf-8").replace("](", f"]({target.name}/"))
    return page


def _picture(table: Comparison, rows: list[str], scores: Mapping[str, Mapping[str, Any]]) -> bytes:
    means = [_mean(scores[row]) for row in rows]
    if not table.by_critic:
        return comparison(rows, [(table.title, means)])
    right = [scores[row]["critic_right"] for row in rows]
    points = [(name, x, mean) for name, x, mean in zip(rows, right, means) if x is not None]
    return against("the critic's share of right answers, clean held-out images", "both", points)


def _mean(score: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    return score["both"]["value"], tuple(score["both"]["ci95"])


def _head(kinds: list[str]) -> str:
    names = ["variant", "both", "applied", "preserved", "copies", "each seed", *kinds]
    names += ["updates", "generator / critic passes an update", "minutes", "runs"]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"


def _line(study: Study, name: str, s: Mapping[str, Any], kinds: list[str]) -> str:
    low, high = s["both"]["ci95"]
    passes = s["passes"]
    per = " / ".join("?" if passes[k] is None else f"{passes[k]:.0f}" for k in ("generator", "critic"))
    words, right = study.variants[name].words, s["critic_right"]
    judged = "" if right is None else f" (the critic answers {right:.3f} right)"
    cells = [
        f"{name}{': ' if words else ''}{words}{judged}",
        f"**{s['both']['value']:.3f}** [{low:.3f}, {high:.3f}]",
        f"{s['applied']['value']:.3f}",
        f"{s['preserved']['value']:.3f}",
        f"{s['copy_rate']:.2f}",
        ", ".join(f"{v:.3f}" for v in s["each"]),
        *[f"{s['by_type'][k]:.2f}" for k in kinds],
        str(passes["updates"]),
        per,
        f"{s['minutes']:.1f}",
        ", ".join(f"[{r}]({r}/manifest.json)" for r in s["runs"]),
    ]
    return f"| {' | '.join(cells)} |"
