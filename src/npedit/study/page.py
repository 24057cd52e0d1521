"""A study's results page: claims tested against confidence intervals, tables, plots, and a copy for publication.

A claim "a > b" holds when the whole 95 % interval of the difference of `both` lies above zero, is refuted when it lies
below, and else is left open; "a ~ b" asks for an interval within a tenth of zero. Two things are in that interval: the
scenes, by Newcombe's of Wilson's (1998, method 10), and spread in training, by the standard deviation from seed to
seed, pooled over the rows that have several (Student's t). All seeds are scored on the same scenes, so more of them
narrow the second part alone. Rows that use the same runs differ by scenes alone.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npedit.benchmarks import toy
from npedit.errors import UserError
from npedit.report.plots import plot_comparison, points_plot_png
from npedit.runs.checkpoint import explain_write_errors, write_text
from npedit.study.file import CLAIM_PATTERN, Study, Table

RUN_FILES = ("manifest.json", "config.resolved.yaml", "passes.json")  # of a run
OPTIONAL_RUN_FILES = ("score-*.json", "blame.json")  # where there are such
VERDICTS = (
    "A claim `a > b` *holds* if the whole interval of the difference of `both` is above 0, it is *refuted* if the "
    "whole interval is below 0, and otherwise it is *open*. A claim `a ~ b` says that a and b are level. It *holds* if "
    "the interval lies between -0.1 and +0.1, it is *refuted* if the interval lies outside, and otherwise it is *open*."
)
_PROGRAM_PATH = re.compile(r'(?<="command": ")[^" ]*/([^/" ]+)')  # of the program, in a manifest
# Student's t, .975, for 1, 2, ... degrees of freedom; beyond, the last is used, which is a little too wide
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
         2.1448)  # fmt: skip
Score = Mapping[str, Any]
SeedSpread = tuple[float, int]


def pool_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds' scores as one: the means of their shares, over the scenes that all were scored on."""
    n, kinds = found[0]["n"], found[0]["by_type"]
    mean = lambda values: sum(values) / len(found)  # noqa: E731
    return {
        "n": n,
        **{key: toy.wilson_interval(mean(f[key]["value"] for f in found) * n, n) for key in toy.METRICS},
        "by_type": {k: mean(f["by_type"][k]["both"]["value"] for f in found) for k in kinds},
        "copy_rate": mean(f["copy_rate"] for f in found),
        "each": [f["both"]["value"] for f in found],
        "runs": [f["run"] for f in found],
        "alarms": [f"`{f['run']}` {words}" for f in found for words in f["alarms"]],
        "minutes": mean(f["seconds"] for f in found) / 60,
        "passes": found[0]["passes"],
        "critic_right": found[0]["critic_right"],
    }


def seed_std(rows: Iterable[Sequence[float]]) -> SeedSpread:
    """The standard deviation of `both` from seed to seed, pooled over all rows with several seeds, and its degrees of
    freedom; (0, 0) if no row has. A row is what each of its seeds reached; rows must not share runs."""
    several = [each for each in rows if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    squares = sum(float(np.var(each)) * len(each) for each in several)
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def difference(a: toy.Rate, b: toy.Rate) -> tuple[float, float, float]:
    """a - b of two shares with Newcombe's 95 % interval (1998, method 10): (difference, low, high)."""
    d = a["value"] - b["value"]
    low = math.hypot(a["value"] - a["ci95"][0], b["ci95"][1] - b["value"])
    high = math.hypot(a["ci95"][1] - a["value"], b["value"] - b["ci95"][0])
    return d, d - low, d + high


def seed_margin(a: Score, b: Score, spread: SeedSpread) -> float:
    """Half the 95 % interval of the difference of two rows that is due to training seeds; 0 for the same runs."""
    if a["runs"] == b["runs"]:
        return 0.0
    return _half_interval(spread) * math.sqrt(1 / len(a["each"]) + 1 / len(b["each"]))


def _half_interval(spread: SeedSpread) -> float:
    """Half a 95 % interval of one run's `both`."""
    deviation, freedom = spread
    return _T975[min(freedom, len(_T975)) - 1] * deviation if freedom else 0.0


def judge_claim(claim: str, scores: Mapping[str, Score], spread: SeedSpread = (0.0, 0)) -> str:
    """One line on a claim: "holds", "refuted" or "open", with the difference and its interval; or "not run"."""
    matched = CLAIM_PATTERN.match(claim)
    assert matched, claim  # the study file has been checked
    first, sign, second = matched.groups()
    if missing := [name for name in (first, second) if name not in scores]:
        return f"`{claim}`: **not run** ({', '.join(missing)})"
    d, low, high = difference(scores[first]["both"], scores[second]["both"])
    apart = seed_margin(scores[first], scores[second], spread)
    low, high = d - math.hypot(d - low, apart), d + math.hypot(high - d, apart)
    if sign == ">":
        word = "holds" if low > 0 else "refuted" if high < 0 else "open"
    else:
        word = "holds" if low > -0.1 and high < 0.1 else "refuted" if low > 0.1 or high < -0.1 else "open"
    return f"`{claim}`: **{word}** (difference {d:+.3f} [{low:+.3f}, {high:+.3f}])"


def write_results(study: Study, folder: Path, scores: Mapping[str, dict[str, Any]]) -> Path:
    """Write tables, claims and plots of the finished runs into `folder`; returns the path of the page."""
    spread = seed_std(s["each"] for name, s in scores.items() if not study.variants[name].of)
    how = (
        f"Every row is scored by the oracle on the same {study.items} held-out scenes in held-out phrasings. "
        "`both` is the success rate: the share of scenes in which the edit is applied and the rest is preserved."
    )
    lines = [f"# {study.name}", "", how, "", _describe_intervals(spread), "", VERDICTS]
    lines += ["", study.words] if study.words else []
    if missing := _missing_runs(study, scores):
        lines += ["", f"Not run: {', '.join(missing)}."]
    for number, table in enumerate(study.tables, 1):
        rows = [row for row in table.rows if row in scores]
        picture = folder / f"{number}.png"
        if rows:
            with explain_write_errors(picture):
                picture.write_bytes(_plot_table(table, rows, scores))
        lines += ["", f"## {table.title}", "", *([table.words, ""] if table.words else [])]
        lines += [judge_claim(c, scores, spread) + "  " for c in table.claims]
        if rows:
            lines += ["", f"![{table.title}]({picture.name})", "", *_score_table(study, table, rows, scores)]
            lines += [
                "",
                "<details><summary><code>both</code> by edit type</summary>",
                "",
                *_edit_type_table(rows, scores),
                "",
                "</details>",
            ]
    alarm_lines = [f"- {words}" for name, s in scores.items() if not study.variants[name].of for words in s["alarms"]]
    lines += [
        "",
        "## Alarms",
        "",
        *(alarm_lines or ["None: in no run did the critic's score rise while the oracle's score fell."]),
    ]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    write_text(folder / "results.json", json.dumps(scores, indent=1) + "\n")
    return folder / "results.md"


def _describe_intervals(spread: SeedSpread) -> str:
    """The sentences at the head of the results page that say what its intervals cover."""
    deviation, freedom = spread
    if not freedom:
        return (
            "Intervals are 95 % and cover the choice of scenes only. Variation between training seeds is not included, "
            "because no row has several seeds."
        )
    apart = _half_interval(spread) * 2**0.5
    return (
        "All intervals are 95 % intervals. The intervals in tables and plots cover the choice of scenes. The intervals "
        "of differences also cover the variation between training seeds. The standard deviation of `both` between "
        f"seeds is {deviation:.3f} ({freedom} degrees of freedom). So two rows of one seed each may differ by "
        f"{apart:.3f} only because their seeds differ. The small dots in the plots are single seeds. The intervals are "
        "not corrected for the number of claims."
    )


def _missing_runs(study: Study, scores: Mapping[str, Score]) -> list[str]:
    found = []
    for name, variant in study.variants.items():
        done = scores[name]["runs"] if name in scores else []
        seeds = [s for s in study.seeds_of(name) if f"{variant.of or name}-{s}" not in done]
        if seeds:
            found.append(f"{name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if done else name)
    return found


def publish_results(results: Path, page: Path) -> Path:
    """Copy a study's results for others to read: the page, and in a folder of its name the plots, the numbers and, of
    each run that they name, manifest, recipe and scores, where the page's links find them. Returns the page.

    The copy can be used as the study's folder, runs/NAME, to resume the study. Paths on this machine are removed: the
    program is given by name only, and an absolute path of the study's folder becomes runs/NAME.

    Raises:
        UserError: the page's name does not end in .md.
    """
    if page.suffix != ".md":
        raise UserError(f"expected a page that ends in .md, beside which its folder goes; got {page}; add .md")
    study, target = results.parent, page.with_suffix("")
    runs = {run for row in json.loads((study / "results.json").read_text()).values() for run in row["runs"]}
    with explain_write_errors(target):
        files = [study / run / name for run in sorted(runs) for name in RUN_FILES]
        files += [
            path for run in sorted(runs) for found in OPTIONAL_RUN_FILES for path in sorted((study / run).glob(found))
        ]
        for path in [*study.glob("*.png"), study / "results.json", *files]:
            copy = target / path.relative_to(study)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                shutil.copyfile(path, copy)
            else:
                text = _PROGRAM_PATH.sub(r"\1", path.read_text(encoding="utf-8"))
                write_text(copy, text.replace(f"{study}/", f"runs/{study.name}/") if study.is_absolute() else text)
    write_text(page, results.read_text(encoding="utf-8").replace("](", f"]({target.name}/"))
    return page


def _plot_table(table: Table, rows: list[str], scores: Mapping[str, Score]) -> bytes:
    means = [(scores[row]["both"]["value"], tuple(scores[row]["both"]["ci95"])) for row in rows]
    seeds = [scores[row]["each"] if len(scores[row]["each"]) > 1 else [] for row in rows]
    if not table.by_critic:
        return plot_comparison(rows, [("success rate (both), 95 % interval", means)], seeds)
    right = [scores[row]["critic_right"] for row in rows]
    points = [(name, x, mean) for name, x, mean in zip(rows, right, means) if x is not None]
    return points_plot_png("critic's share of right answers (clean held-out images)", "success rate (both)", points)


def _score_table(study: Study, table: Table, rows: list[str], scores: Mapping[str, Score]) -> list[str]:
    names = ["variant", "both", "applied", "preserved", "copy rate", "each seed", "updates"]
    names += ["generator / critic passes per update", "minutes", "runs"]
    return [*_table_header(names), *(_table_row(study, name, scores[name], table.by_critic) for name in rows)]


def _edit_type_table(rows: list[str], scores: Mapping[str, Score]) -> list[str]:
    kinds = list(scores[rows[0]]["by_type"])
    cells = {name: [f"{scores[name]['by_type'][k]:.2f}" for k in kinds] for name in rows}
    return [
        *_table_header(["variant", *kinds]),
        *(f"| {' | '.join([name, *values])} |" for name, values in cells.items()),
    ]


def _table_header(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]


def _table_row(study: Study, name: str, s: Score, by_critic: bool) -> str:
    low, high = s["both"]["ci95"]
    passes = s["passes"]
    per = " / ".join("?" if passes[k] is None else f"{passes[k]:.0f}" for k in ("generator", "critic"))
    words, right = study.variants[name].words, s["critic_right"]
    judged = f" (share of right answers of the critic: {right:.3f})" if by_critic and right is not None else ""
    cells = [
        f"{name}{': ' if words else ''}{words}{judged}",
        f"**{s['both']['value']:.3f}** [{low:.3f}, {high:.3f}]",
        f"{s['applied']['value']:.3f}",
        f"{s['preserved']['value']:.3f}",
        f"{s['copy_rate']:.2f}",
        ", ".join(f"{v:.3f}" for v in s["each"]),
        str(passes["updates"]),
        per,
        f"{s['minutes']:.1f}",
        ", ".join(f"[{r}]({r}/manifest.json)" for r in s["runs"]),
    ]
    return f"| {' | '.join(cells)} |"
