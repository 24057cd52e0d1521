"""Run folders as a training leaves them, without a training: metrics, samples, checkpoints, the finished editor."""

import json
import math
import random

import torch
import yaml

from npedit.runs.checkpoint import append_row
from npedit.training.samples import samples_folder, write_samples

STAGES = [{"step": "reference_copy", "updates": 20}, {"step": "np_edit", "updates": 100}]


def make_run(folder, name="toy", evaluate_items=90):
    """A run before its first update: recipe and manifest."""
    folder.mkdir(parents=True)
    recipe = {"name": name, "stages": STAGES, "trainer": {"evaluate_items": evaluate_items}}
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "manifest.json").write_text(json.dumps({"recipe": name, "no_pairs": True}))
    return folder


def make_row(step, **more):
    """The row of an update (one from 1 to 120), with figures that a training might have."""
    stage = 0 if step <= 20 else 1
    noise = random.Random(step).uniform
    figures = {"loss/copy": 0.2 * math.exp(-step / 10)} if stage == 0 else {
        "loss/critic_edit": 1.2 * math.exp(-step / 60) + noise(-0.1, 0.1), "loss/dmd": 0.5 + noise(-0.2, 0.2),
        "critic/p_edit": min(0.95, step / 100) + noise(-0.04, 0.04), "critic/p_identity": 0.9 + noise(-0.05, 0.05),
    }  # fmt: skip
    base = {"step": step, "stage": stage, "stage_name": STAGES[stage]["step"], "time/update": 0.5, "time": 1e9 + step}
    return base | figures | more


def append_rows(run, first, last, **more):
    """The rows of the updates from `first` to `last`."""
    for step in range(first, last + 1):
        append_row(run / "metrics.jsonl", make_row(step, **more))


def add_checkpoint(run, update):
    checkpoint = run / f"checkpoint-{update:06d}"
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").write_text("")


def add_final(run):
    (run / "final").mkdir()
    (run / "final" / "npedit.json").write_text("{}")


def add_samples(run, update, side=32, count=4):
    pictures = list(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(update)))
    write_samples(samples_folder(run, update), pictures, ["make it night"] * count, pictures[::-1])
