"""From end to end on photographs: both stages train on an imagefolder, and the edited images beside it stay shut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.families.flux import Flux
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs import checkpoint
from npedit.steps.base import Parts
from npedit.training import trainer
from tests.support.opened_files import opened_files
from tests.support.photo_sets import save, write_metadata

PHOTOS = {  # of scikit-image, all in its package: what it shows, instruction, type, object, what is wanted
    "astronaut": ("a woman in an orange suit", "make the suit blue", "recolour", "suit", "a woman in a blue suit"),
    "chelsea": ("a ginger cat", "remove the cat", "remove", "cat", "an empty place"),
    "coffee": ("a cup of coffee", "add a biscuit", "add", "biscuit", "a cup of coffee and a biscuit"),
    "camera": ("a man with a camera", "make it winter", "background", "", "a man with a camera in the snow"),
}
STEPS = 2


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that are opened during the test."""
    with opened_files() as paths:
        yield paths


def photos(folder: Path) -> Path:
    """The photographs with metadata, and beside each an edited image, which is none."""
    (folder / "edited").mkdir(parents=True)
    rows = []
    for name, (source, words, kind, thing, target) in PHOTOS.items():
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        picture.thumbnail((160, 160))
        save(folder, f"images/{name}.jpg", picture)
        (folder / "edited" / f"{name}.jpg").write_bytes(b"not an image")
        rows.append(
            {"file_name": f"images/{name}.jpg", "edited_file_name": f"edited/{name}.jpg", "instruction": words,
             "edit_type": kind, "object": thing, "source_caption": source, "target_caption": target}
        )  # fmt: skip
    return write_metadata(folder, rows)


def recipe(folder: Path) -> Recipe:
    student = {"lr": 1e-3}
    editing = {"steps": STEPS, "fake_updates": 1, "balance": "match", "student": student, "fake": student}
    copying = {"steps": STEPS, "student": student}
    return make_recipe(
        {
            "name": "photos",
            "family": {"name": "flux"},
            "critic": {"name": "llava_onevision"},
            "data": {"name": "imagefolder", "path": str(folder), "sizes": [[32, 48], [32, 32]], "nothing_share": 0.0},
            "stages": [
                {"step": "reference_copy", "updates": 2, "batch_size": 2, "settings": copying},
                {"step": "np_edit", "updates": 2, "batch_size": 2, "settings": editing},
            ],
            "trainer": {"steps": STEPS, "sample_items": 2},
        }
    )


def parts(made: Recipe) -> Parts:
    return Parts(Flux.tiny(0), LlavaOnevision.tiny(0), "plain", torch.device("cpu"))


def test_both_stages_train_on_photographs_and_open_no_edited_image(tmp_path: Path, opened: list[str]) -> None:
    folder = photos(tmp_path / "photos")
    opened.clear()
    run = trainer.train(recipe(folder), tmp_path / "run", parts=parts)

    seen = {Path(p).name for p in opened if str(folder / "images") in p}
    assert seen == {f"{name}.jpg" for name in PHOTOS}
    assert not [p for p in opened if str(folder / "edited") in p]
    (folder / "edited" / "coffee.jpg").read_bytes()
    assert [p for p in opened if str(folder / "edited") in p]  # the spy would have seen one

    rows = checkpoint.read_rows(run / checkpoint.METRICS)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert all("loss/copy" in r for r in rows[1:3])
    assert all({"loss/dmd", "loss/fake", "loss/critic_edit"} <= r.keys() for r in rows[3:])
    assert rows[-1]["skipped_steps"] == 0 and rows[-1]["data/bad_rows"] == 0
    assert checkpoint.read_manifest(run)["no_pairs"] is True
    assert (run / "report.html").stat().st_size > 1000
    assert Flux.tiny(0).open_net(run / "final" / "transformer") is not None
    assert Image.open(run / "samples" / "step-000004" / "000.png").size in {(48, 32), (32, 32)}
