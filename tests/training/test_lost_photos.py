"""`npedit train` on photos that change after the start of a run: what resumes, what is named, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from npedit.runs import checkpoint
from npedit.toy.dataset import write_dataset
from tests.support.command_line import run as npedit

PHOTOS = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "photos", PHOTOS, 0)


def write_recipe(path: Path, photos: Path, **data) -> Path:
    """The warm-up alone, on the embedded base model, so that the command needs nothing but the photos."""
    raw = {
        "name": "photos",
        "family": {"name": "flux"},
        "data": {"name": "imagefolder", "path": str(photos), "sizes": [[32, 32]], **data},
        "stages": [{"step": "reference_copy", "updates": 1, "batch_size": 2, "settings": {"steps": 1}}],
        "trainer": {"sample_items": 4, "steps": 1},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_photo_lost_after_the_start_is_named_and_the_run_goes_on(tmp_path: Path, photos: Path) -> None:
    made, run = write_recipe(tmp_path / "recipe.yaml", photos, held_out=4), tmp_path / "run"
    npedit("train", made, "--out", run)
    held_out = checkpoint.read_held_out(run)
    listed = yaml.safe_load((run / "samples" / "step-000001" / "items.json").read_text())
    lines = (photos / "metadata.jsonl").read_text().splitlines()
    assert [item["instruction"] for item in listed] == [json.loads(lines[n])["instruction"] for n in held_out]
    lost = photos / "images" / f"{next(n for n in range(PHOTOS) if n not in held_out):06d}.png"
    lost.unlink()
    output = npedit("train", made, "stages.0.updates=2", "--out", run)
    assert f"Changed after update 1: data: as recorded before -> missing or unreadable: images/{lost.name}" in output
    assert [row["step"] for row in checkpoint.read_rows(run / checkpoint.METRICS)] == [0, 1, 2]
    (row,) = checkpoint.read_rows(run / checkpoint.BAD_ROWS)
    assert row["file"] == f"images/{lost.name}" and row["reason"] == "no such file"
    assert [c["setting"] for c in checkpoint.read_manifest(run)["changes"]] == ["stages.0.updates", "data"]
    assert checkpoint.read_held_out(run) == held_out


def test_another_photo_under_the_same_name_is_refused_by_name(tmp_path: Path, photos: Path) -> None:
    made, run = write_recipe(tmp_path / "recipe.yaml", photos), tmp_path / "run"
    npedit("train", made, "--out", run)
    (photos / "images" / "000003.png").write_bytes((photos / "images" / "000004.png").read_bytes() + b"\0")
    output = npedit("train", made, "stages.0.updates=2", "--out", run, code=2)
    assert "of another size in bytes: images/000003.png" in output and "start=" in output
    output = npedit("train", made, "data.held_out=2", "--out", run, code=2)
    assert "data.held_out: 0 -> 2" in output
