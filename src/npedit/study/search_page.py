"""The section of a results page about a search: its configurations, what each reached, and its curves."""

from __future__ import annotations

import json
from pathlib import Path

from npedit.report.reward_curves import plot_reward_curves, reward_ends
from npedit.runs.checkpoint import METRICS, explain_write_errors, read_rows
from npedit.scoring.tables import markdown_table
from npedit.study.file import Study
from npedit.study.jobs import is_finished, run_alarms
from npedit.study.search import describe_configuration, selection_rates

HOW = (
    "No configuration computes more than the row `{budget}`, in pictures through the generator and in pictures through "
    "the critic. Every configuration first gets {short:.0%} of that. The best {keep} get all of it, from the same "
    "start. The best of these is trained with the seeds {seeds} and is the row `{name}`; the run of the first of these "
    "seeds, by which it was selected, is part of the row. Configurations are compared by their success rate on other "
    "held-out scenes than those of the tables. A pass counts the same with and without a gradient. Rewards are means "
    "over the first and the last tenth of the updates."
)


def search_section(study: Study, name: str, folder: Path) -> list[str]:
    """The lines about one search; a plot of rewards and success rates is written into `folder`."""
    search = study.search[name]
    facts = search.model_dump() | {"name": name, "seeds": ", ".join(map(str, search.seeds))}
    lines = ["", f"## Search: {name}", "", *([search.words, ""] if search.words else []), HOW.format(**facts), ""]
    runs = {c: _longest_run(study, name, c, folder) for c in search.configurations}
    done = {c: run for c, run in runs.items() if run}
    if not done:
        return [*lines, "No configuration has been trained yet."]
    if name not in study.variants:
        lines += ["The search is not finished, so there is no best configuration yet.", ""]
    picture = folder / f"{name}.png"
    with explain_write_errors(picture):
        picture.write_bytes(plot_reward_curves({c: read_rows(run / METRICS) for c, run in done.items()}))
    lines += [f"![Rewards and success rates of {name}]({picture.name})", ""]
    return lines + _configuration_table(study, name, folder, runs)


def search_alarms(study: Study, name: str, folder: Path) -> list[str]:
    """The alarms of reward hacking of the configurations' finished runs, but for the run that the search's row uses."""
    used = study.variants[name].of if name in study.variants else ""
    variants = [f"{name}.{stage}.{c}" for c in study.search[name].configurations for stage in ("short", "long")]
    runs = [folder / f"{variant}-{study.search[name].seeds[0]}" for variant in variants if variant != used]
    return [f"`{run.name}` {words}" for run in runs if is_finished(run) for words in run_alarms(run)]


def _configuration_table(study: Study, name: str, folder: Path, runs: dict[str, Path | None]) -> list[str]:
    rates = {stage: selection_rates(study, folder, name, stage) for stage in ("short", "long")}
    cells = ["configuration", "settings", "short: success rate", "long: success rate", "updates", "reward: first, last"]
    rows = []
    for configuration, run in runs.items():
        shown = [f"{rates[s][configuration]:.3f}" if configuration in rates[s] else "" for s in rates]
        words = describe_configuration(study.search[name], configuration)
        rows.append([configuration, words, *shown, *(_length_and_reward(run) if run else ("not finished", ""))])
    return markdown_table(cells, rows)


def _length_and_reward(run: Path) -> tuple[str, str]:
    """The updates of a finished run, and its reward in its first and its last updates."""
    ends = reward_ends(read_rows(run / METRICS))
    updates = json.loads((run / "passes.json").read_text())["updates"]
    return str(updates), f"{ends[0]:.3f}, {ends[1]:.3f}" if ends else ""


def _longest_run(study: Study, name: str, configuration: str, folder: Path) -> Path | None:
    """The finished run of a configuration: the long one, else the short one; None if there is none."""
    seed = study.search[name].seeds[0]
    runs = [folder / f"{name}.{stage}.{configuration}-{seed}" for stage in ("long", "short")]
    return next((run for run in runs if is_finished(run)), None)
