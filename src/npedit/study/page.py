"""A study's results page: the claim table, tables, plots, and a copy for publication.

`claims.py` tests the claims. `results.json` holds the scores of every row with the outcome of each item, `claims.json`
the verdicts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npedit.benchmarks import toy
from npedit.errors import UserError
from npedit.report.plots import plot_comparison, points_plot_png
from npedit.runs.checkpoint import METRICS, explain_write_errors, write_text
from npedit.runs.files import read_json_object
from npedit.scoring.seed_intervals import SeedSpread, mean_interval
from npedit.scoring.tables import format_interval, markdown_table
from npedit.study.claims import (
    CLAIMS_FILE,
    Score,
    Verdict,
    claim_table,
    item_types,
    judge_all,
    outcome_matrix,
    rows_with_own_runs,
    study_spread,
    write_claims,
)
from npedit.study.file import Study, Table, is_configuration
from npedit.study.search_page import search_alarms, search_section

RUN_FILES = ("manifest.json", "config.resolved.yaml", "passes.json")  # of a run
OPTIONAL_RUN_FILES = ("score-*.json", "selection.json", "blame.json")  # where there are such
VERDICTS = (
    "A claim `a > b` *holds* if the whole interval of the difference of `both` is above 0, it *fails* if the whole "
    "interval is below 0, and otherwise it is *undecided*. A claim `a ~ b` says that a and b are level. It *holds* if "
    "the interval lies between -0.1 and +0.1, it *fails* if the interval lies outside, and otherwise it is *undecided*."
)
ALARMS = (
    "An alarm says that since an earlier evaluation in training the critic's score rose and the oracle's score fell, "
    "both by more than chance. The oracle's score here is the mean of the shares *applied* and *preserved*, so an edit "
    "that only copies the photo has about .5; the success rate may still rise."
)
_PICTURE = re.compile(r"\]\(([^)/]+\.png)\)")
_PROGRAM_PATH = re.compile(r'(?<="command": ")[^" ]*/([^/" ]+)')  # of the program, in a manifest


def pool_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds' scores as one: the means of their shares, over the scenes that all were scored on. Its intervals
    cover the scenes only."""
    n, kinds = found[0]["n"], found[0]["by_type"]
    mean = lambda values: sum(values) / len(found)  # noqa: E731
    return {
        "n": n,
        **{key: toy.wilson_interval(mean(f[key]["value"] for f in found) * n, n) for key in toy.METRICS},
        "by_type": {k: mean(f["by_type"][k]["both"]["value"] for f in found) for k in kinds},
        "copy_rate": mean(f["copy_rate"] for f in found),
        "each": [f["both"]["value"] for f in found],
        "outcomes": [f["outcomes"] for f in found],
        "runs": [f["run"] for f in found],
        "alarms": [f"`{f['run']}` {words}" for f in found for words in f["alarms"]],
        "minutes": mean(f["seconds"] for f in found) / 60,
        "passes": found[0]["passes"],
        "critic_right": found[0]["critic_right"],
    }


def add_seed_intervals(study: Study, scores: Mapping[str, dict[str, Any]], spread: SeedSpread) -> dict[str, Any]:
    """The scores with intervals of `both` that cover scenes and training seeds."""
    types, found = item_types(study.items), {}
    for name, score in scores.items():
        value, low, high = mean_interval(outcome_matrix(score), types, spread)
        found[name] = score | {"both": {"value": value, "ci95": [low, high]}}
    return found


def write_results(study: Study, folder: Path, scores: Mapping[str, dict[str, Any]]) -> Path:
    """Write tables, claims and plots of the finished runs into `folder`; returns the path of the page."""
    spread = study_spread(study, scores)
    scores = add_seed_intervals(study, scores, spread)
    verdicts = judge_all(study, scores)
    lines = [f"# {study.name}", "", _describe_scores(study), "", _describe_intervals(spread), "", VERDICTS]
    lines += ["", study.words] if study.words else []
    lines += ["", _describe_code(folder, scores)]
    if missing := _missing_runs(study, scores):
        lines += ["", f"Not run: {', '.join(missing)}."]
    if any(v.claim.says for v in verdicts):
        lines += ["", "## The paper's claims", "", *claim_table(verdicts)]
    for number, table in enumerate(study.tables, 1):
        lines += _table_section(study, table, scores, verdicts, folder / f"{number}.png")
    for name in study.search:
        lines += search_section(study, name, folder)
    alarms = [words for name in rows_with_own_runs(study, scores) for words in scores[name]["alarms"]]
    alarms += [words for name in study.search for words in search_alarms(study, name, folder)]
    lines += ["", "## Alarms", "", ALARMS, "", *([f"- {words}" for words in alarms] or ["No run has an alarm."])]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    write_text(folder / "results.json", json.dumps(scores, indent=1) + "\n")
    write_claims(verdicts, folder)
    return folder / "results.md"


def _table_section(
    study: Study, table: Table, scores: Mapping[str, Score], verdicts: list[Verdict], picture: Path
) -> list[str]:
    """The lines of one table with its claims and its plot, which is written to `picture`."""
    rows = [row for row in table.rows if row in scores]
    lines = ["", f"## {table.title}", "", *([table.words, ""] if table.words else [])]
    own = [v for v in verdicts if v.claim in table.claims]
    lines += [f"`{v.claim.test}`: **{v.word}** ({v.numbers()})  " for v in own]
    if not rows:
        return lines
    with explain_write_errors(picture):
        picture.write_bytes(_plot_table(table, rows, scores))
    lines += ["", f"![{table.title}]({picture.name})", "", *_score_table(study, table, rows, scores)]
    summary = "<details><summary><code>both</code> by edit type</summary>"
    return [*lines, "", summary, "", *_edit_type_table(rows, scores), "", "</details>"]


def _describe_scores(study: Study) -> str:
    return (
        f"Every row is scored by the oracle on the same {study.items} held-out scenes in held-out phrasings. "
        "`both` is the success rate: the share of scenes in which the edit is applied and the rest is preserved."
    )


def _describe_intervals(spread: SeedSpread) -> str:
    """The paragraph at the head of the results page that says how its intervals are made."""
    if not spread.freedom:
        return (
            "Intervals are 95 % and cover the choice of scenes only. Variation between training seeds is not included, "
            "because no row has several seeds."
        )
    return (
        "Intervals of `both` and of its differences are 95 % intervals over scenes and training seeds together. The "
        "variance of a row has two parts. The first is the variance of each scene's mean over the seeds, within the "
        "edit types; for a difference of two rows it is the variance of the paired differences on the same scenes. The "
        "second is the variance between seeds, less what different scenes add to it, divided by the number of the "
        "row's seeds. It is pooled over all rows that have several seeds, because few seeds of one row say little; so "
        "it supposes that the seeds of all rows vary alike. Two rows that use the same runs, or whose runs started "
        "from the same runs, are paired by seed as well, and then the second part is that of their own differences. "
        "The interval is Student's t times the root of the sum, with the degrees of freedom of Satterthwaite (1946); "
        "for a single row the scenes' part is that of Wilson's interval. In this study the standard deviation of "
        f"`both` between seeds is {spread.observed**0.5:.3f} ({spread.variance**0.5:.3f} without the scenes' part; "
        f"{spread.freedom} degrees of freedom). Rows of one seed borrow it from the others. The small dots in the "
        "plots are single seeds. Intervals are not corrected for the number of claims."
    )


def _describe_code(folder: Path, scores: Mapping[str, Score]) -> str:
    """Which revisions of the code trained the runs."""
    counts: Counter[str] = Counter()
    for run in {run for score in scores.values() for run in score["runs"]}:
        manifest = folder / run / "manifest.json"
        counts[" and ".join(_revisions(read_json_object(manifest))) if manifest.is_file() else "unknown"] += 1
    found = ", ".join(f"{revision} ({n} run{'s' if n > 1 else ''})" for revision, n in sorted(counts.items()))
    return f"Revisions of the code that trained the runs: {found or 'none'}."


def _revisions(manifest: Mapping[str, Any]) -> list[str]:
    used = [manifest, *manifest.get("resumed", [])]
    return [f"`{part['git_revision'][:8]}`" if part.get("git_revision") else "unknown" for part in used]


def _missing_runs(study: Study, scores: Mapping[str, Score]) -> list[str]:
    found = []
    for name, variant in study.variants.items():
        if is_configuration(study, name):
            continue
        done = scores[name]["runs"] if name in scores else []
        seeds = [s for s in study.seeds_of(name) if f"{variant.of or name}-{s}" not in done]
        if seeds:
            found.append(f"{name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if done else name)
    return found + [name for name in study.search if name not in study.variants]


def require_page_name(page: Path) -> None:
    """Check the name of a page to publish.

    Raises:
        UserError: it does not end in .md.
    """
    if page.suffix != ".md":
        raise UserError(f"expected a page that ends in .md, beside which its folder goes; got {page}; add .md")


def publish_results(results: Path, page: Path) -> Path:
    """Copy a study's results for others to read: the page, and in a folder of its name the plots, the numbers and, of
    each run that they name, manifest, recipe and scores, where the page's links find them. Of the configurations of
    searches also the metrics, from which the page has rewards and alarms. Returns the page.

    The copy can be used as the study's folder, runs/NAME, to resume the study. Paths on this machine are removed: the
    program is given by name only, and an absolute path of the study's folder becomes runs/NAME.

    Raises:
        UserError: the page's name does not end in .md.
    """
    require_page_name(page)
    study, target = results.parent, page.with_suffix("")
    runs = {run for row in json.loads((study / "results.json").read_text()).values() for run in row["runs"]}
    configurations = {path.parent.name for path in study.glob("*.*.*-*/passes.json")}
    runs |= configurations
    with explain_write_errors(target):
        files = [study / run / name for run in sorted(runs) for name in RUN_FILES]
        files += [
            path for run in sorted(runs) for found in OPTIONAL_RUN_FILES for path in sorted((study / run).glob(found))
        ]
        files += [study / run / METRICS for run in sorted(configurations)]
        numbers = [study / "results.json", study / CLAIMS_FILE]
        shown = [study / name for name in _PICTURE.findall(results.read_text(encoding="utf-8"))]
        for path in [*shown, *numbers, *files]:
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
    return markdown_table(names, [_score_cells(study, name, scores[name], table.by_critic) for name in rows])


def _edit_type_table(rows: list[str], scores: Mapping[str, Score]) -> list[str]:
    kinds = list(scores[rows[0]]["by_type"])
    rows_of_shares = [[name, *(f"{scores[name]['by_type'][k]:.2f}" for k in kinds)] for name in rows]
    return markdown_table(["variant", *kinds], rows_of_shares)


def _score_cells(study: Study, name: str, s: Score, by_critic: bool) -> list[str]:
    passes = s["passes"]
    per = " / ".join("?" if passes[k] is None else f"{passes[k]:.0f}" for k in ("generator", "critic"))
    words, right = study.variants[name].words, s["critic_right"]
    judged = f" (share of right answers of the critic: {right:.3f})" if by_critic and right is not None else ""
    return [
        f"{name}{': ' if words else ''}{words}{judged}",
        f"**{s['both']['value']:.3f}** {format_interval(s['both']['ci95'], digits=3)}",
        f"{s['applied']['value']:.3f}",
        f"{s['preserved']['value']:.3f}",
        f"{s['copy_rate']:.2f}",
        ", ".join(f"{v:.3f}" for v in s["each"]),
        str(passes["updates"]),
        per,
        f"{s['minutes']:.1f}",
        ", ".join(f"[{r}]({r}/manifest.json)" for r in s["runs"]),
    ]
