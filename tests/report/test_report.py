"""The report is one self-contained file with every part that the run has, and works on runs that have little."""

import base64
import io
import json
import random
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from npedit.benchmarks import toy
from npedit.cli.main import app
from npedit.errors import UserError
from npedit.report import curves, plots, report
from npedit.report.report import write_report
from npedit.report.toy_sheets import draw_toy_sheet
from npedit.runs.checkpoint import CONFIG, MANIFEST, METRICS, append_row
from npedit.toy.edits import EDIT_TYPES
from npedit.toy.world import render
from npedit.training.samples import write_samples


def make_run(run, updates=60):
    """A run directory as the trainer leaves it, with invented numbers."""
    rng = random.Random(0)
    run.mkdir(parents=True)
    (run / CONFIG).write_text(yaml.safe_dump({"name": "demo", "trainer": {"evaluate_items": 90}}))
    (run / MANIFEST).write_text(
        json.dumps({"format": 1, "no_pairs": True, "recipe": "demo <&>", "versions": {"torch": "2"}})
    )
    append_row(run / METRICS, {"step": 0, "time": 0.0, **looks(0.02)})
    for n in range(1, updates + 1):
        p = n / updates
        row = {
            "step": n,
            "stage": int(p > 0.2),
            "stage_name": "np_edit" if p > 0.2 else "reference_copy",
            "time/update": 2.0,
        }
        row |= {"loss/copy": 0.2 / n + 0.01 * rng.random(), "grad_norm/student": 0.5 + rng.random()}
        if p > 0.2:
            row |= {
                "loss/critic_edit": 3 * (1 - p) + rng.random(), "loss/critic_identity": 1.5 - p + rng.random() / 2,
                "loss/dmd": 0.3 + 0.1 * rng.random(), "loss/fake": 0.7 - 0.2 * p + 0.05 * rng.random(),
                "grad_norm/fake": 0.4 * rng.random(), "grad_norm/from_critic": 2e-3 * rng.random(),
                "grad_norm/from_dmd": 1e-2 * rng.random(),
                **{f"critic/p_yes/{t}": p * (0.5 + 0.03 * i) + 0.2 * rng.random() for i, t in enumerate(EDIT_TYPES)},
            }  # fmt: skip
        if n % (updates // 6) == 0:
            row |= looks(0.6 * p)
        append_row(run / METRICS, row)


def looks(both):
    by_type = {f"eval/by_type/{t}": min(1.0, both * (0.7 + 0.07 * i)) for i, t in enumerate(EDIT_TYPES)}
    return {"eval/both": both, "eval/applied": both + 0.1, "eval/preserved": 0.4 + both / 2, **by_type}


def add_pictures(run, updates=60):
    edits = toy.sample_items(18, seed=3)
    references, targets = (render([getattr(e, k) for e in edits]) for k in ("reference", "target"))
    for step in (0, updates // 2, updates):
        mixed = torch.lerp(references, targets, step / updates)
        write_samples(run / "samples" / f"step-{step:06d}", references, [e.instruction for e in edits], mixed)
    before = toy.score(lambda r, _: r, edits)
    half = iter(torch.cat([targets[:9], references[9:]]))
    after = toy.score(lambda r, w: torch.stack([next(half) for _ in w]), edits, save_to=run / "evaluation")
    (run / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))


@pytest.fixture(autouse=True)
def small_figures(request, monkeypatch):
    """Figures with few pixels, which are drawn quickly, unless a test asks for `real_figures`."""
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr(plots, "DPI", 20)


@pytest.fixture
def real_figures():
    """Figures in the size that people see."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    make_run(run)
    add_pictures(run)
    assert write_report(run) == run / "report.html"
    return (run / "report.html").read_text()


def test_the_report_has_every_part_and_needs_no_other_file(page):
    for words in ("Success on held-out scenes", "Curves", "Losses", "wanted answer", "Recipe", "Manifest", "update 30"):
        assert words in page
    assert "demo &lt;&amp;&gt;" in page and "demo <&>" not in page
    assert all(f"<td>{t}</td>" in page for t in EDIT_TYPES)
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert len(sources) > 40 and all(s.startswith("data:image/png;base64,") for s in sources)


def test_report_table_and_verdicts_equal_the_scores(page):
    assert "50.0 % [29.0, 71.0]" in page  # 9 of 18
    assert "0.0 % [0.0, 17.6]" in page  # 0 of 18
    assert page.count('<span class="no">not applied</span>') == 9 == page.count('<span class="yes">applied</span>')


def test_small_pictures_are_enlarged_in_blocks(page):
    found = re.search(r'<td><img src="data:image/png;base64,([^"]+)"', page)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))
    reference = (render([toy.sample_items(18, seed=3)[0].reference])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert picture.shape == (320, 320, 3)
    assert (picture[5::10, 5::10] == reference).all() and (picture[::10, ::10] == reference).all()


def test_figures_are_drawn_for_light_and_dark(tmp_path, real_figures):
    make_run(tmp_path / "r")
    from npedit.runs.checkpoint import read_rows

    figures = plots.draw_figures(read_rows(tmp_path / "r" / METRICS), 90)
    titles = ["Success on held-out scenes", "The critic's probability of the wanted answer", "Losses", "Gradient norms"]
    assert [f[0] for f in figures] == titles
    for _, caption, light, dark in figures:
        assert caption and light != dark
        assert Image.open(io.BytesIO(light)).width > 1000


def test_report_has_the_alarm_at_the_top_and_a_table_of_failure_causes(tmp_path):
    run = tmp_path / "r"
    make_run(run)
    page = write_report(run).read_text()
    assert "Alarm" not in page and "Causes of failed" not in page  # it logs no p_edit to compare with
    for n in range(61, 121):
        row = {"step": n, "stage": 1, "stage_name": "np_edit", "critic/p_edit": n / 120, "critic/p_identity": 0.9}
        if n in (70, 120):
            row |= {"eval/both": 0.0, "eval/applied": 0.3 - 0.002 * n, "eval/preserved": 1.3 - 0.01 * n}
        append_row(run / METRICS, row)
    counts = {t: {"n": 10, "right": 4, "critic": 3, "teacher": 2, "student": 1} for t in EDIT_TYPES}
    (run / "blame.json").write_text(json.dumps(counts))
    page = write_report(run).read_text()
    assert "Alarm: reward hacking" in page and "At update 120: since update 60 the critic" in page
    assert page.index("Alarm") < page.index("Curves") and "Critic and held-out scores" in page
    assert page.count("<td>3 (30 %)</td>") == 9 and "<td>27 (30 %)</td>" in page


def test_a_run_without_updates_has_a_report(tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    (run / CONFIG).write_text(yaml.safe_dump({"name": "demo", "trainer": {"evaluate_items": 90}}))
    (run / MANIFEST).write_text('{"recipe": "demo", "no_pairs": true}')
    assert "No update has been made yet" in write_report(run).read_text()
    append_row(
        run / METRICS, {"step": 1, "stage": 0, "stage_name": "np_edit", "loss/dmd": float("nan"), "loss/fake": 0.4}
    )
    page = write_report(run).read_text()
    assert "Losses" in page and "Success" not in page


def test_report_refuses_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not one"):
        write_report(tmp_path)


def test_running_mean():
    assert plots.running_mean(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    values = np.arange(100.0)
    assert plots.running_mean(values)[2:-2] == pytest.approx(values[2:-2])  # a straight line stays one
    assert plots.running_mean(np.array([1.0, 4.0])) == pytest.approx(np.array([2.5, 2.5]))
    assert plots.running_mean(np.random.default_rng(0).normal(size=400)).std() < 0.4


def test_the_sheet_shows_every_edit_type(tmp_path):
    page = draw_toy_sheet(1)
    assert page.size == (3 * 356, 12 + 3 * 216)
    assert page.tobytes() == draw_toy_sheet(1).tobytes() != draw_toy_sheet(2).tobytes()


def test_report_command(tmp_path):
    make_run(tmp_path / "r", updates=12)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "r")])
    assert done.exit_code == 0 and "report.html" in done.output and (tmp_path / "r" / "report.html").is_file()
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


# ---- several runs over each other


def test_curves_plots_several_runs_in_the_same_axes(tmp_path, real_figures):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    other = tmp_path / "b" / METRICS  # a run without distribution matching, and half as long
    rows = [json.loads(line) for line in other.read_text().splitlines()][:31]
    other.write_text("".join(json.dumps({k: v for k, v in r.items() if "dmd" not in k}) + "\n" for r in rows))
    out = tmp_path / "c.png"
    done = CliRunner().invoke(app, ["curves", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    picture = np.array(Image.open(out).convert("RGB")).astype(int)
    for colour in ((0x24, 0x84, 0xC6), (0xE6, 0x9F, 0x00)):  # a line for each run
        assert (np.abs(picture - colour).max(-1) < 8).sum() > 500
    make_run(tmp_path / "new")
    (tmp_path / "new" / METRICS).unlink()
    nowhere = CliRunner().invoke(app, ["curves", str(tmp_path / "a"), "-o", str(tmp_path)])
    assert nowhere.exit_code == 2 and "is a folder" in nowhere.output
    deep = CliRunner().invoke(app, ["curves", str(tmp_path / "a"), "-o", str(tmp_path / "not" / "yet" / "c.png")])
    assert deep.exit_code == 0 and (tmp_path / "not" / "yet" / "c.png").is_file()
    refused = CliRunner().invoke(app, ["curves", str(tmp_path / "a"), str(tmp_path / "new")])
    assert refused.exit_code == 2 and "got new" in refused.output


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 1e300])
def test_non_finite_metrics_are_left_out_of_figures(tmp_path, bad):
    """Each figure's numbers are bad from the third row on, or in every row: report and curves are made all the same."""
    keys = [*plots.LOSSES, *plots.NORMS, *plots.OVERLAID, "eval/applied", "eval/preserved", "eval/by_type/remove"]
    keys += ["critic/p_yes/remove", "critic/p_edit", "critic/p_identity"]
    for always in (False, True):
        rows = [{"step": n, "stage": 0, "stage_name": "np_edit"} | dict.fromkeys(keys, bad if always or n > 2 else 0.5)
                for n in range(1, 6)]  # fmt: skip
        figures = plots.draw_figures(rows, 9)
        assert bool(figures) is not always and all(f[2][:4] == b"\x89PNG" for f in figures)
        if always:
            with pytest.raises(UserError, match="finite metrics"):
                plots.plot_runs({"a": rows})
        else:
            assert plots.plot_runs({"a": rows, "b": rows})[:4] == b"\x89PNG"


def test_a_damaged_sample_is_named_in_the_report_and_does_not_end_it(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(b"\x89PNG no picture")
    assert "a red circle: " in report._read_thumbnail(tmp_path / "a.png", "a red circle") and "a.png" in caplog.text


def test_long_curves_are_thinned_out_and_keep_their_extremes():
    values = np.random.default_rng(0).normal(size=100_000)
    x, y = curves.thin_out(np.arange(len(values)), values)
    assert len(x) <= curves.MAX_POINTS and (np.diff(x) > 0).all() and (y == values[x]).all()
    for low in range(0, len(values), 1000):
        part = (x >= low) & (x < low + 1000)
        assert y[part].max() == values[low : low + 1000].max() and y[part].min() == values[low : low + 1000].min()
    short = curves.thin_out(np.arange(10), values[:10])
    assert (short[1] == values[:10]).all()


def test_each_row_of_metrics_is_visited_once_for_all_figures(monkeypatch):
    visits = []

    class CountingRow(dict):
        def items(self):
            visits.append(self["step"])
            return super().items()

    keys = [*plots.LOSSES, *plots.NORMS, "eval/both", "eval/applied", "critic/p_yes/remove"]
    plots.draw_figures([CountingRow(step=n, stage=0, **dict.fromkeys(keys, 0.5)) for n in range(20)], 9)
    assert visits == list(range(20))
