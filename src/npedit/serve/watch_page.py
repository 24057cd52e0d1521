"""The status page of trainings as HTML: one row for each run, with its samples and curves. It renews itself.

The pictures have addresses that change when their content changes, so the browser loads each of them once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from npedit.report.page_parts import Html, document, element, escape, join
from npedit.serve.curve_svg import HEIGHT, JUDGE_PANEL, PANELS, WIDTH, format_figure
from npedit.serve.run_figures import SUCCESS
from npedit.serve.run_state import RunState
from npedit.serve.watch import RunStatus

SECONDS_BETWEEN_LOOKS = 5
STYLE = """
body { max-width: 84rem; padding: 1.2rem 1rem 3rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
.lost { color: var(--bad); display: none } .is-lost .lost { display: block }
details.run { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .8rem 0;
  padding: .7rem 1rem }
details.run > summary { color: var(--ink); margin: 0; display: grid; gap: .3rem 1.2rem; align-items: start;
  grid-template-columns: minmax(11rem, 1.6fr) minmax(9rem, 1.4fr) repeat(4, minmax(6.2rem, 1fr)) }
summary > span, summary b, summary small { display: block } summary small { color: var(--soft); line-height: 1.35 }
summary b { overflow-wrap: anywhere; line-height: 1.35 } summary::-webkit-details-marker { display: none }
.name b::before { content: "\\25B8"; display: inline-block; width: 1em; color: var(--soft) }
details[open] > summary .name b::before { content: "\\25BE" }
.state::before { content: ""; display: inline-block; width: .6rem; height: .6rem; border-radius: 50%;
  margin-right: .4rem; background: var(--soft) }
.training .state::before { background: #2484c6; animation: pulse 2s infinite } .finished .state::before {
  background: var(--good) } .stopped .state::before { background: var(--warn) } .crashed .state::before {
  background: var(--bad) } @keyframes pulse { 50% { opacity: .25 } }
.bar { display: block; height: .45rem; border-radius: .25rem; background: var(--line); margin: .35rem 0;
  overflow: hidden }
.bar i { display: block; height: 100%; background: #2484c6 } .finished .bar i { background: var(--good) }
.stopped .bar i { background: var(--warn) } .crashed .bar i { background: var(--bad) }
.detail { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1rem; margin-top: .8rem }
.detail > :only-child { grid-column: 1 / -1 } .detail figure { margin: 0; padding: 0; border: 0 }
.samples img { width: auto; max-height: 34rem; border-radius: .3rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .4rem .8rem }
.curves img { width: 100%; height: auto; display: block }
@media (max-width: 60rem) { details.run > summary { grid-template-columns: repeat(3, 1fr) } .name {
  grid-column: span 2 } .detail {
  grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 34rem) { details.run > summary { grid-template-columns: repeat(2, 1fr) } .name, .progress {
  grid-column: 1 / -1 } }
"""
SCRIPT = """
async function renew() {
  try {
    if (document.hidden) return;
    const answer = await fetch(location.href, {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.querySelector("main"), old = document.querySelector("main");
    const shown = new Map([...old.querySelectorAll("img")].map(one => [one.getAttribute("src"), one]));
    for (const run of fresh.querySelectorAll("details.run")) {
      const before = document.getElementById(run.id);
      if (before) run.open = before.open;
    }
    for (const picture of fresh.querySelectorAll("img")) {
      const same = shown.get(picture.getAttribute("src"));
      if (same) picture.replaceWith(same);  // it is loaded already
    }
    old.replaceWith(document.adoptNode(fresh));
    document.title = page.title;
    document.body.classList.remove("is-lost");
  } catch { document.body.classList.add("is-lost"); }
  finally { setTimeout(renew, SECONDS * 1000); }
}
setTimeout(renew, SECONDS * 1000);
"""


def render_page(folder: str, runs: Sequence[RunStatus]) -> str:
    """The whole page. `folder` is shown in its title."""
    counts = [f"{n} {state}" for state in RunState if (n := sum(run.state == state for run in runs))]
    lost = element("p", "No answer from npedit: the figures are those of the time below.", kind="lost")
    as_of = element("p", f"{', '.join(counts) or 'no runs yet'} · as of {time.strftime('%H:%M:%S')}.", kind="soft")
    is_first_open = not any(run.state == RunState.TRAINING for run in runs)
    rows = [
        _render_run(run, run.state == RunState.TRAINING or (i == 0 and is_first_open)) for i, run in enumerate(runs)
    ]
    script = Html(f"<script>{SCRIPT.replace('SECONDS', str(SECONDS_BETWEEN_LOOKS))}</script>")
    head = [element("h1", f"Trainings in {folder}"), lost, element("main", as_of, *rows)]
    title = ", ".join(counts[:1]) or "no runs"
    return document(f"npedit: {title}", [*head, script], STYLE)


def _render_run(run: RunStatus, is_open: bool) -> Html:
    """One run: a row of figures, and below it the samples and the curves."""
    cells = (
        _name_cell(run),
        _progress_cell(run),
        _time_cell(run),
        _left_cell(run),
        _success_cell(run),
        _alarm_cell(run),
    )
    anchor = escape(f"run-{quote(run.name, safe='')}")
    return Html(
        f'<details class="run {run.state}" id="{anchor}"{" open" if is_open else ""}>'
        f"{element('summary', *cells)}{element('div', *_pictures(run), kind='detail')}{_alarm_box(run)}</details>"
    )


# ------------------------------------------------------------------------------------------------------------- the row


def _cell(kind: str, figure: object, *small: object) -> Html:
    """A figure, and smaller lines below."""
    return element("span", element("b", figure), *(element("small", words) for words in small if words), kind=kind)


def _name_cell(run: RunStatus) -> Html:
    state = element("span", run.state.value, kind="state")
    report = Html(f'<a href="runs/{quote(run.name, safe="")}/report">report</a>')
    return _cell("name", run.name, join([state, f" · {run.recipe} · " if run.recipe else " · ", report]))


def _progress_cell(run: RunStatus) -> Html:
    total = f" of {run.total:,}" if run.total else ""
    share = "" if run.share is None else format_figure(run.share, True)
    bar = Html(f'<span class="bar"><i style="width: {100 * (run.share or 0):.1f}%"></i></span>')
    stage = f"stage {run.stage + 1} of {run.stages}: {run.stage_name.replace('_', ' ')}" if run.stage_name else ""
    is_starting = run.state == RunState.TRAINING and not stage
    words = ", ".join(part for part in (share, stage, "starting" if is_starting else "") if part)
    lines = [element("small", line) for line in (words, *_reading_notes(run)) if line]
    return element("span", element("b", f"update {run.update:,}{total}"), bar, *lines, kind="progress")


def _reading_notes(run: RunStatus) -> Iterator[str]:
    if run.is_behind:
        yield "the log is still being read"
    if run.damaged_lines:
        yield f"{run.damaged_lines:,} damaged lines of the log"


def _time_cell(run: RunStatus) -> Html:
    figure = "–" if run.seconds_per_update is None else format_seconds(run.seconds_per_update)
    return _cell("", figure, "an update")


def _left_cell(run: RunStatus) -> Html:
    """The time to the end while a run trains; else when it ended."""
    if run.state != RunState.TRAINING:
        return _cell("", format_time(run.written_at), "last update")
    if run.seconds_left is not None:
        return _cell("", format_seconds(run.seconds_left), f"left, until {format_time(time.time() + run.seconds_left)}")
    if run.seconds_left_in_stage is not None:
        return _cell("", format_seconds(run.seconds_left_in_stage), "left in this stage")
    return _cell("", "–", "time left")


def _success_cell(run: RunStatus) -> Html:
    """The success rate, or what the held-out judge says, at the last evaluation."""
    if run.evaluated_at is None:
        return _cell("", "–", "no evaluation yet")
    at = f"at update {run.evaluated_at:,}"
    if SUCCESS in run.evaluation:
        return _cell("", format_figure(run.evaluation[SUCCESS], True), "success", at)
    found = {name: run.evaluation[key] for key, name in JUDGE_PANEL.curves.items() if key in run.evaluation}
    shares = " / ".join(format_figure(share, True) for share in found.values())
    return _cell("", shares, f"judge: {' / '.join(found)}", at)


def _alarm_cell(run: RunStatus) -> Html:
    count = element("span", len(run.alarms), kind="no") if run.alarms else "none"
    return _cell("", count, "reward-hacking alarms")


def _alarm_box(run: RunStatus) -> Html:
    """The last alarm in words; "" without one."""
    return element("p", f"Last alarm: {run.alarms[-1]}.", kind="no") if run.alarms else Html("")


def format_time(seconds: float) -> str:
    """Day and time of a number of seconds since 1970; a dash for 0 and for a time that no calendar has."""
    try:
        return time.strftime("%d %b, %H:%M", time.localtime(seconds)) if seconds else "–"
    except (OverflowError, ValueError, OSError):
        return "–"


def format_seconds(seconds: float) -> str:
    """A time in the unit that fits: 0.12 s, 34 s, 5 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


# -------------------------------------------------------------------------------------------------------- the pictures


def _pictures(run: RunStatus) -> Iterator[Html]:
    place = f"runs/{quote(run.name, safe='')}"
    if run.samples is not None:
        words = f"Samples after update {run.samples:,}: the photo, and its edit"
        small = f'<img src="{place}/samples.webp?v={run.samples_version}" alt="{words}" loading="lazy">'
        image = Html(f'<a href="{place}/samples/{run.samples}.png">{small}</a>')
        yield element("figure", image, element("figcaption", words), kind="samples")
    panels = [i for i, panel in enumerate(PANELS) if panel.keys_in(run.figures)]
    if panels:
        yield element("div", *(_curve_tag(place, i, run) for i in panels), kind="curves")


def _curve_tag(place: str, number: int, run: RunStatus) -> Html:
    source = f"{place}/curves/{number}.svg?v={run.update}-{run.written_at:.0f}"
    title = f"curve: {PANELS[number].title}"
    return Html(f'<img src="{source}" alt="{title}" width="{WIDTH}" height="{HEIGHT}" loading="lazy">')
