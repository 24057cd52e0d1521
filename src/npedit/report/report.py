"""One HTML file about a run, finished or not: curves, pictures, tables, how it was made. It needs no other file."""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from npedit.benchmarks.toy import format_rate
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.report import plots
from npedit.runs.checkpoint import FAILURES, METRICS, is_run, read_config, read_manifest, read_rows, write_text
from npedit.runs.files import read_json_object
from npedit.scoring.reward_hacking import HELD_OUT_EDIT_KEYS, monitor_rows

log = logging.getLogger(__name__)
THUMBNAIL_SIDE = 160  # CSS pixels of a picture's longer side
ENLARGED_SIDE = 320  # pixels up to which a small picture is enlarged by whole numbers
MAX_ITEMS = 8
FAILURE_CAUSES = {
    "right": "right",
    "critic": "critic: accepts the wrong edit",
    "teacher": "teacher: cannot generate the result",
    "student": "student: other failure",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6472; --paper: #fbfbfa; --card: #ffffff; --line: #e3e5e8;
  --good: #0a7d55; --bad: #b3402f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #9aa3b2; --paper: #14171c; --card: #1c2027;
  --line: #2e343d; --good: #4cc79a; --bad: #f08a76; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; margin: 0 0 .25rem } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem }
p { margin: .4rem 0 } .soft, caption, figcaption, th { color: var(--soft) }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.1rem }
.figures b { display: block; font-size: 1.6rem; line-height: 1.25 }
figure { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
figure img { display: block; max-width: 100%; height: auto } figcaption { font-size: .9rem; margin-top: .6rem }
.wide { overflow-x: auto } table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line) }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; font-size: .85rem } th:first-child, td:first-child { text-align: left }
tr.all td { font-weight: 700 } td.words { white-space: normal; max-width: 15rem; text-align: left }
.pictures td, .pictures th { text-align: center } .pictures img { display: block; margin: 0 auto; border-radius: .3rem;
  image-rendering: pixelated }
.alarm { border: 2px solid var(--bad); border-radius: .6rem; padding: .8rem 1.1rem; margin: 1.4rem 0 }
.yes { color: var(--good) } .no { color: var(--bad) }
pre { padding: 1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  font-size: .85rem }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0 }
"""


def write_report(run: str | Path) -> Path:
    """Write `report.html` in a run's folder from what lies there, and return its path.

    Raises:
        UserError: the folder is not a run, or the file cannot be written.
    """
    path = Path(run) / "report.html"
    write_text(path, make_report(run))
    return path


def make_report(run: str | Path) -> str:
    """The HTML of a run's report, from what lies in its folder.

    Raises:
        UserError: the folder is not a run.
    """
    run = Path(run)
    if not is_run(run):
        raise UserError(f"expected a run to report on; {run} is not one; give a folder that 'npedit train' made")
    rows = [row for row in read_rows(run / METRICS) if isinstance(row.get("step"), int)]
    manifest, config = read_manifest(run), read_config(run)
    items = int(config["trainer"]["evaluate_items"])
    scores = _read_scores(run)
    name = str(manifest.get("recipe", run.name))
    parts = [
        f"<h1>{_escape(name)}: an image editor trained {_data_kind(manifest)}</h1>",
        f'<p class="soft">{_escape(_summary(rows))} {_pairs_sentence(manifest)}</p>',
        _alarm_box(rows, items),
        _headline(rows, scores),
        _scores_table(scores),
        _failure_table(run),
        _progress_pictures(run),
        _curves_section(rows, items),
        _benchmark_pictures(run),
        "<h2>Recipe and manifest</h2>",
        f"<details><summary>Recipe</summary><pre>{_escape(yaml.safe_dump(config, sort_keys=False))}</pre></details>",
        f"<details open><summary>Manifest</summary><pre>{_escape(json.dumps(manifest, indent=2))}</pre></details>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>npedit: {_escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _escape(words: object) -> str:
    return html.escape(str(words))


def _data_kind(manifest: dict[str, Any]) -> str:
    return "without edited images" if manifest["no_pairs"] else "with edited images"


def _pairs_sentence(manifest: dict[str, Any]) -> str:
    return (
        "No edited image was used in training."
        if manifest["no_pairs"]
        else "This run, or the run that it starts from, was trained with edited images: a baseline."
    )


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "No update has been made yet."
    seconds = sum(r.get("time/update") or 0.0 for r in rows)
    stages = dict.fromkeys(r["stage_name"] for r in rows if "stage_name" in r)
    names = ", then ".join(s.replace("_", " ") for s in stages)
    return f"{rows[-1]['step']} updates ({names}) in {seconds / 60:.1f} minutes of training."


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file, or a damaged one, which is reported in the log."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        log.warning("%s is left out of the report: %s", path, error)
        return {}


def _read_scores(run: Path) -> dict[str, Any]:
    """The final table {"before", "after"} that `npedit demo` leaves; {} if there is none."""
    return _read_object(run / "evaluation.json")


def _alarm_box(rows: Sequence[dict[str, Any]], evaluate_items: int) -> str:
    """The reward-hacking alarms; "" for a run without a critic's and a held-out score."""
    monitor = monitor_rows(rows, evaluate_items)
    left_out = f" {monitor.non_finite_message()}" if monitor.non_finite else ""
    if found := sorted(monitor.alarms, key=lambda alarm: alarm.step):
        lines = "".join(f"<li>{_escape(a.message()[0].upper() + a.message()[1:])}.</li>" for a in found)
        return (
            f'<div class="alarm"><b class="no">Alarm: reward hacking</b><ul>{lines}</ul><p>Check the pictures. Then '
            "lower the critic's weight, raise that of distribution matching, or use a stronger critic or an ensemble."
            f"{left_out}</p></div>"
        )
    both = any("critic/p_edit" in r for r in rows) and any(k in r for r in rows for k in HELD_OUT_EDIT_KEYS)
    return (
        f'<p class="soft">No reward hacking found: see <i>Critic and held-out scores</i>.{left_out}</p>' if both else ""
    )


def _headline(rows: Sequence[dict[str, Any]], scores: dict[str, Any]) -> str:
    if scores:
        before, after = (format_rate(scores[k]["both"]) for k in ("before", "after"))
        found = [("success before training", before), ("success after training", after)]
        found.append(("held-out scenes", str(scores["after"]["n"])))
    else:
        evaluated = [r for r in rows if r.get("eval/both") is not None]
        if not evaluated:
            return ""
        first, last = evaluated[0], evaluated[-1]
        found = [(f"success at update {r['step']}", f"{100 * r['eval/both']:.1f} %") for r in (first, last)]
    return '<div class="figures">' + "".join(f"<div><b>{_escape(v)}</b>{_escape(k)}</div>" for k, v in found) + "</div>"


def _scores_table(scores: dict[str, Any]) -> str:
    if not scores:
        return ""
    before, after = scores["before"], scores["after"]
    lines = []
    for kind, row in [*after["by_type"].items(), ("all", after)]:
        earlier = before if kind == "all" else before["by_type"].get(kind)
        cells = [kind, row["n"], format_rate(earlier["both"]) if earlier else "-"]
        cells += [f"{100 * row[m]['value']:.1f} %" for m in ("applied", "preserved")] + [format_rate(row["both"])]
        inside = "".join(f"<td>{_escape(c)}</td>" for c in cells)
        lines.append(f'<tr class="{"all" if kind == "all" else ""}">{inside}</tr>')
    head = ("edit type", "n", "both, before", "applied", "preserved", "both, after")
    return (
        "<h2>Success on held-out scenes</h2><p>Scored by the toy world's exact oracle, which is not used in training. "
        "<i>Both</i>: the edit is applied and the rest is preserved. Intervals are 95 % Wilson intervals.</p>"
        f'<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{"".join(lines)}</table></div>'
        f'<p class="soft">Copy rate (result equals the reference): {100 * after["copy_rate"]:.1f} %. '
        f"Mean pixel change outside the edit: {after['outside_change']:.3f} of the full range.</p>"
    )


def _failure_table(run: Path) -> str:
    """A table of the causes of failed edits; "" for a run without this measurement."""
    counts = _read_object(run / FAILURES)
    if not counts:
        return ""
    counts["all"] = {k: sum(row[k] for row in counts.values()) for k in next(iter(counts.values()))}
    lines = []
    for kind, row in counts.items():
        faults = "".join(f"<td>{row[k]} ({100 * row[k] / row['n']:.0f} %)</td>" for k in FAILURE_CAUSES)
        lines.append(
            f'<tr class="{"all" if kind == "all" else ""}"><td>{_escape(kind)}</td><td>{row["n"]}</td>{faults}</tr>'
        )
    heads = ("edit type", "n", *FAILURE_CAUSES.values())
    return (
        "<h2>Causes of failed edits</h2><p>The edits of the last evaluation. A failed edit is counted under "
        "<i>critic</i> if the critic accepts it; otherwise under <i>teacher</i> if the base model generates a wrong "
        "picture from the caption of the wanted result (one try each); otherwise under <i>student</i>.</p>"
        f'<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>{"".join(lines)}'
        "</table></div>"
    )


def _curves_section(rows: Sequence[dict[str, Any]], evaluate_items: int) -> str:
    figures = plots.draw_figures(rows, evaluate_items)
    if not figures:
        return ""
    blocks = []
    for title, caption, light, dark in figures:
        picture = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
            f'<img src="{_data_uri(light)}" alt="{_escape(title)}"></picture>'
        )
        blocks.append(f"<figure>{picture}<figcaption>{_escape(caption)}</figcaption></figure>")
    return f"<h2>Curves</h2>{''.join(blocks)}"


# --------------------------------------------------------------------------------------------------------- pictures


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _img_tag(path: Path, alt: str) -> str:
    """An <img> with the picture inside; small ones are enlarged in whole pixel blocks."""
    try:
        picture = read_photo(path)
    except BadImage as error:
        log.warning("%s is left out of the report: %s", path, error)
        return f"{_escape(alt)}: {_escape(error)}"
    factor = max(1, ENLARGED_SIDE // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if max(picture.size) > 2 * ENLARGED_SIDE:
        picture.thumbnail((2 * ENLARGED_SIDE, 2 * ENLARGED_SIDE))
    scale = THUMBNAIL_SIDE / max(picture.size)
    w, h = round(picture.width * scale), round(picture.height * scale)
    return f'<img src="{_data_uri(plots.encode_png(picture))}" width="{w}" height="{h}" alt="{_escape(alt)}">'


def _read_items(folder: Path) -> list[dict[str, Any]]:
    path = folder / "items.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _progress_pictures(run: Path) -> str:
    """A table of the same references with the first, a middle and the last samples."""
    folders = sorted(p for p in run.glob("samples/step-*") if _read_items(p))
    if not folders:
        return ""
    chosen = list(dict.fromkeys([folders[0], folders[len(folders) // 2], folders[-1]]))
    heads = ["reference", "instruction", *(f"update {int(p.name.removeprefix('step-'))}" for p in chosen)]
    lines = []
    for i, item in enumerate(_read_items(chosen[0])[:MAX_ITEMS]):
        cells = [f"<td>{_img_tag(chosen[0] / item['reference'], 'reference')}</td>"]
        cells.append(f'<td class="words">{_escape(item["instruction"])}</td>')
        for folder in chosen:
            cells.append(f"<td>{_img_tag(folder / _read_items(folder)[i]['file'], item['instruction'])}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h2>Samples during training</h2><p>The same references at three updates.</p>"
        f'<div class="wide"><table class="pictures"><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>'
        f"{''.join(lines)}</table></div>"
    )


def _benchmark_pictures(run: Path) -> str:
    """Pictures of the final evaluation with the oracle's verdict, two items of each edit type."""
    items = _read_items(run / "evaluation")
    if not items:
        return ""
    lines = []
    for kind in dict.fromkeys(i["edit_type"] for i in items):
        cells = [f"<td>{_escape(kind)}</td>"]
        for item in [i for i in items if i["edit_type"] == kind][:2]:
            verdict = ", ".join(_verdict_span(name, item[name]) for name in ("applied", "preserved"))
            cells.append(f"<td>{_img_tag(run / 'evaluation' / item['reference'], 'reference')}</td>")
            cells.append(f'<td class="words">{_escape(item["instruction"])}<br>{verdict}</td>')
            cells.append(f"<td>{_img_tag(run / 'evaluation' / item['file'], item['instruction'])}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "<th></th>" + "<th>reference</th><th>instruction, verdict</th><th>edited</th>" * 2
    return (
        "<h2>The finished editor on held-out scenes</h2><p>The first two scenes of each edit type, not selected.</p>"
        f'<div class="wide"><table class="pictures"><tr>{head}</tr>{"".join(lines)}</table></div>'
    )


def _verdict_span(name: str, fine: bool) -> str:
    return f'<span class="{"yes" if fine else "no"}">{"" if fine else "not "}{name}</span>'


def draw_toy_sheet(seed: int = 0) -> Image.Image:
    """A picture for looking at the toy world: for each edit type a scene, its instruction and the true result."""
    import random

    from npedit.benchmarks.toy import to_pil
    from npedit.toy.edits import EDIT_TYPES, sample_edit
    from npedit.toy.world import render

    edits = [sample_edit(random.Random(f"sheet/{seed}/{kind}"), kind) for kind in EDIT_TYPES]
    pairs = [render([e.reference, e.target]) for e in edits]
    return _draw_pairs(
        [(to_pil(before), to_pil(after), e.instruction, e.edit_type) for (before, after), e in zip(pairs, edits)]
    )


def draw_results_sheet(folder: Path) -> Image.Image:
    """What `benchmarks.toy.score` left in a folder: reference, result, instruction and the oracle's verdict."""
    rows = []
    for item in _read_items(folder):
        verdict = f"{'applied' if item['applied'] else 'not applied'}, {'' if item['preserved'] else 'not '}preserved"
        both = tuple(read_photo(folder / item[k]) for k in ("reference", "file"))
        rows.append((*both, item["instruction"], f"{item['edit_type']}: {verdict}"))
    return _draw_pairs(rows)


def _draw_pairs(rows: Sequence[tuple[Image.Image, Image.Image, str, str]]) -> Image.Image:
    """Pairs of pictures with two lines of words each, three pairs in a row."""
    from PIL import ImageDraw, ImageFont

    side, gap, line = 160, 12, 44
    width, height = 2 * side + 3 * gap, side + line + gap
    page = Image.new("RGB", (3 * width, gap + -(-len(rows) // 3) * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (*pictures, first, second) in enumerate(rows):
        left, top = i % 3 * width + gap, gap + i // 3 * height
        for k, picture in enumerate(pictures):
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + k * (side + gap), top))
        draw.text((left, top + side + 4), first, fill="#1c2330", font=font)
        draw.text((left, top + side + 22), second, fill="#8a919c", font=font)
    return page
