"""`npedit rehearse`: the whole run with random weights, and what it measures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from npedit.cli.rehearse import BEGUN, _begin, _require_place
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.nets.device import CPU
from npedit.recipe.config import EMBEDDED, load_recipe, make_recipe
from npedit.rehearsal.random_models import limit_depth, write_random_models
from npedit.rehearsal.random_photos import types_of_shares, write_random_photos
from npedit.rehearsal.rehearse import _phase_seconds, rehearsal_recipe
from npedit.runs.checkpoint import METRICS
from npedit.training.parts import build_source
from npedit.training.stages import stage_names, student_calls
from tests.support.command_line import run

SIDE = 32


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """A recipe of two stages whose models are local folders of tiny models."""
    place = tmp_path_factory.mktemp("real")
    Flux.tiny(0).pipe.save_pretrained(place / "base")
    LlavaOnevision.tiny(0).save(place / "critic")
    stages = [
        {"step": "reference_copy", "updates": 500, "batch_size": 2, "settings": {"steps": 2}},
        {"step": "np_edit", "updates": 900, "batch_size": 2, "settings": {"fake_updates": 2, "steps": 2}},
    ]
    recipe = {
        "name": "small",
        "family": {"name": "flux", "weights": str(place / "base"), "dtype": "bfloat16"},
        "critic": {"name": "llava_onevision", "weights": str(place / "critic"), "dtype": "bfloat16"},
        "data": {"name": "imagefolder", "path": "no-such-folder", "sizes": [[SIDE, SIDE], [16, 16]]},
        "stages": stages,
        "trainer": {"sample_items": 1, "steps": 2, "shard": "full"},
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_limit_depth_changes_numbers_of_blocks_and_nothing_else() -> None:
    config = {"num_layers": 24, "hidden_size": 1024,
              "vision_config": {"num_hidden_layers": 1, "layer_types": ["a", "b"]},
              "text_config": {"num_hidden_layers": 28, "layer_types": ["a", "b", "c"]}}  # fmt: skip
    assert limit_depth(config, 2) == {
        "num_layers": 2,
        "hidden_size": 1024,
        "vision_config": {"num_hidden_layers": 1, "layer_types": ["a", "b"]},
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
    }


def test_random_models_have_the_real_width_and_type_and_open_with_the_ordinary_loader(recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file)
    written = write_random_models(recipe, tmp_path, layers=1)
    assert written == {"family.weights": str(tmp_path / "family"), "critic.weights": str(tmp_path / "critic")}
    family, tiny = Flux.load(written["family.weights"], torch.bfloat16, CPU), Flux.tiny(0)
    assert len(family.base.transformer_blocks) == len(family.base.single_transformer_blocks) == 1
    assert family.base.x_embedder.weight.shape == tiny.base.x_embedder.weight.shape
    assert family.base.x_embedder.weight.dtype == torch.bfloat16
    assert family.base.x_embedder.weight.float().std() > 0
    assert not torch.equal(family.base.x_embedder.weight.float(), tiny.base.x_embedder.weight)
    assert LlavaOnevision.load(written["critic.weights"], torch.bfloat16, CPU).yes


def test_embedded_models_are_not_replaced(tmp_path) -> None:
    recipe = load_recipe("demo")
    assert recipe.family.weights == EMBEDDED
    assert write_random_models(recipe, tmp_path, layers=1) == {}


def test_the_rehearsal_changes_length_models_and_photos_and_nothing_else(recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file)
    short = rehearsal_recipe(recipe, {"family.weights": "F", "critic.weights": "C"}, tmp_path, (16, 48))
    raw, want = short.as_dict(), recipe.as_dict()
    want["family"]["weights"], want["critic"]["weights"] = "F", "C"
    want["data"] |= {"path": str(tmp_path), "sizes": [[16, 48]]}
    want["seed"] = short.seed
    for stage in want["stages"]:
        stage["updates"] = 2
    want["trainer"] |= {"sample_every": 0, "evaluate_every": 0, "save_every": 1, "evaluate_items": 16}
    assert raw == want


@pytest.mark.parametrize("name", ["z-image-8x80gb", "sana-24gb"])
def test_the_last_update_of_each_stage_calls_the_student_twice(name) -> None:
    short = rehearsal_recipe(load_recipe(name), {}, None, None)
    for number, stage in enumerate(short.stages):
        assert student_calls(short, number, stage.updates - 1) == 2


def test_stages_with_the_same_step_have_names_of_their_own(tmp_path) -> None:
    assert stage_names(load_recipe("demo")) == ["reference_copy", "np_edit"]
    stages = [f"stages.{i}={{step: np_edit, updates: 1, batch_size: 2}}" for i in (0, 1)]
    recipe = load_recipe("demo", [*stages, "trainer.steps=4"])
    assert stage_names(recipe) == ["np_edit (stages.0)", "np_edit (stages.1)"]
    rows = [{"step": i + 1, "stage": i, "stage_name": "np_edit", "time/update": 10.0 * (i + 1)} for i in (0, 1)]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _phase_seconds(tmp_path, stage_names(recipe)) == {
        "np_edit (stages.0): update": 10, "np_edit (stages.1): update": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "extra"),
    [("webdataset", {}), ("webdataset", {"streaming": True}), ("hub", {"streaming": True}), ("hub", {"split": "test"})],
)
def test_random_photos_take_the_place_of_every_source_of_photos(tmp_path, name, extra) -> None:
    photos = write_random_photos(tmp_path, [(SIDE, SIDE)])
    own = {"name": name, "path": "owner/photos", "sizes": [[SIDE, SIDE]], "nothing_share": 0.5, **extra}
    short = rehearsal_recipe(make_recipe(load_recipe("demo").as_dict() | {"data": own}), {}, photos, None)
    assert (short.data.name, short.data.settings.nothing_share) == ("imagefolder", 0.5)
    assert len(build_source(short).batch(0, 2)) == 2


def test_random_photos_are_a_training_set(tmp_path) -> None:
    write_random_photos(tmp_path, [(SIDE, SIDE), (16, 48)])
    changes = [f"data.path={tmp_path}", f"data.sizes=[[{SIDE}, {SIDE}], [16, 48]]", "data.held_out=0"]
    source = build_source(load_recipe("sana-24gb", changes))
    assert source.has_target_captions and source.has_source_captions and not source.bad_rows
    shapes = {tuple(source.batch(i, 2).references.shape[2:]) for i in range(8)}
    assert shapes == {(SIDE, SIDE), (16, 48)}


def test_random_photos_have_masks_where_the_keep_loss_needs_them(tmp_path) -> None:
    write_random_photos(tmp_path, [(SIDE, SIDE)], with_masks=True)
    changes = [f"data.path={tmp_path}", f"data.sizes=[[{SIDE}, {SIDE}]]", "data.held_out=0"]
    source = build_source(load_recipe("sana-24gb", changes))
    mask = source.batch(0, 2).keep_mask
    assert source.has_keep_masks and not source.bad_rows
    assert float(mask[..., : SIDE // 2 - 2].max()) == 0 and float(mask[..., SIDE // 2 + 2 :].min()) == 1


def test_random_photos_of_a_scene_recipe_are_scenes_with_other_photos(tmp_path) -> None:
    write_random_photos(tmp_path, [(SIDE, SIDE), (16, 48)], types=types_of_shares({"scene": 1.0}))
    changes = [f"data.path={tmp_path}", f"data.sizes=[[{SIDE}, {SIDE}], [16, 48]]", "data.held_out=0"]
    source = build_source(load_recipe("z-image-scene-80gb", [*changes, "data.nothing_share=0"]))
    batches = [source.batch(i, 2) for i in range(8)]
    assert {kind for b in batches for kind in b.edit_types} == {"scene"}
    for b in batches:
        assert b.other_photos is not None and not torch.equal(b.other_photos[0], b.references[0])


def test_random_photos_of_one_size_have_every_edit_type_with_a_share(tmp_path) -> None:
    """There are more edit types than `PER_SIZE`; a share of a type without rows is refused."""
    shares = {"scene": 0.3, "tone": 0.1}
    write_random_photos(tmp_path, [(SIDE, SIDE)], types=types_of_shares(shares))
    changes = [f"data.path={tmp_path}", f"data.sizes=[[{SIDE}, {SIDE}]]", "data.held_out=0", f"data.shares={shares}"]
    source = build_source(load_recipe("z-image-scene-80gb", changes))
    assert {"scene", "tone"} < {kind for i in range(8) for kind in source.batch(i, 4).edit_types}


def test_a_rehearsal_has_the_edit_types_of_the_shares() -> None:
    assert "scene" not in types_of_shares({}) and "nothing" not in types_of_shares({})
    assert types_of_shares({"scene": 0.3}) == (*types_of_shares({}), "scene")
    assert types_of_shares({"scene": 0.3, "style": 0.7, "add": 0}) == ("scene", "style")


NESTED_PARTS = """
import json, numpy as np
from npedit.nets.device import CPU
from npedit.rehearsal.phase_memory import PhaseMemory
memory = PhaseMemory(CPU)
memory.prefix = "np_edit: "
with memory.measure("outer"):
    kept = np.ones(64 * 2**20 // 8)
    with memory.measure("inner"):
        np.ones(128 * 2**20 // 8).sum()
    kept.sum()
print(json.dumps([memory.can_measure, memory.peaks]))
"""


def test_memory_of_a_part_leaves_out_the_parts_inside_it() -> None:
    """In a process of its own: memory that other tests have left would be given back in between."""
    said = subprocess.run([sys.executable, "-c", NESTED_PARTS], capture_output=True, text=True, check=True).stdout
    can_measure, peaks = json.loads(said)
    if not can_measure:
        pytest.skip("this machine cannot reset a process's peak memory")
    outer, inner = peaks["np_edit: outer"], peaks["np_edit: inner"]
    assert inner - outer == pytest.approx(0.125, abs=0.02)
    assert outer == pytest.approx(0.0625, abs=0.02)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_recipe_is_rehearsed_end_to_end(recipe_file, tmp_path, processes, capfd) -> None:
    place = tmp_path / "rehearsal"
    said = run("rehearse", recipe_file, "--layers", 1, "--processes", processes, "--out", place, "--json")
    printed = capfd.readouterr()  # by the processes that were started
    said += printed.err
    lines = (place / "rehearsal.txt").read_text().splitlines()
    assert "Saved, stopped by SIGTERM, resumed, exported, and edited one picture." in lines
    assert "Stopped after update 3 of 4" in said and "Resuming from" in said
    measured = {}
    for line in lines:
        if found := re.match(r"(\S+: .*?|samples) +(\S+) +(\S+) +(\S+)$", line):
            measured[found[1]] = [found[2], found[3], found[4]]
    for phase in ("draft", "dmd", "critic", "fake", "student"):
        assert all(float(cell) > 0 for cell in measured[f"np_edit: {phase}"][::2]), measured
    assert any("All-reduce" in line for line in lines) == (processes == 2)
    assert (place / "edited.png").is_file()
    assert sorted(p.name for p in place.iterdir()) == ["edited.png", "rehearsal.json", "rehearsal.txt"]
    values = json.loads((place / "rehearsal.json").read_text())
    if processes == 2:
        assert json.loads(printed.out) == values | {"folder": str(place)}
    update = values["updates"]["np_edit"]
    assert values["processes"] == processes and update["seconds"] == values["seconds"]["np_edit: update"] > 0
    assert update["flops"] == sum(
        v["flops"] for k, v in values["estimate"].items() if re.match("np_edit: (?!set-up)", k)
    )
    assert update["share"] == update["flops"] / update["seconds"] / values["product_flops_per_second"]


def test_a_rehearsal_that_did_not_end_is_begun_again(tmp_path) -> None:
    place = tmp_path / "rehearsal"
    with pytest.raises(RuntimeError), _begin(place):
        (place / "models").mkdir()
        (place / "models" / "large.safetensors").write_text("x")
        (place / "rehearsal.txt").write_text("a part")
        with pytest.raises(UserError, match="rehearse"), _begin(place):  # another process, while this one runs
            pass
        raise RuntimeError("out of memory")
    _require_place(place)
    with _begin(place):
        assert [path.name for path in place.iterdir()] == [BEGUN]
        (place / "rehearsal.txt").write_text("whole")
    with pytest.raises(UserError, match="new or empty"):
        _require_place(place)
    assert [path.name for path in place.iterdir()] == ["rehearsal.txt"]


def test_an_old_rehearsal_is_not_written_over(recipe_file, tmp_path) -> None:
    (tmp_path / "rehearsal.txt").write_text("old")
    said = run("rehearse", recipe_file, "--out", tmp_path, code=2)
    assert "expected a new or empty folder" in said and "--out" in said
    on_a_file = run("rehearse", recipe_file, "--out", tmp_path / "rehearsal.txt", code=2)
    assert "expected a new or empty folder" in on_a_file


def test_a_size_that_the_data_cannot_have_is_refused(tmp_path) -> None:
    said = run("rehearse", "demo", "--size", 32, 32, "--out", tmp_path / "new", code=2)
    assert "--size: expected a recipe whose data has sizes" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana-24gb", "z-image-80gb", "paper"])
def test_real_recipes_are_rehearsed_at_their_models_own_width(name, tmp_path) -> None:
    """One block of each model, small pictures, one item: some 8 GB of memory and a few minutes each. Of
    z-image-8x80gb, not even this fits 24 GiB."""
    small = ["accumulate=1", "batch_size=1"]
    changes = [f"stages.{i}.{change}" for i in (0, 1) for change in small]
    place = tmp_path / "rehearsal"
    options = ("--layers", 1, "--size", 128, 128, "--processes", 1, "--out", place)
    run("rehearse", name, *changes, "trainer.sample_items=1", "stages.1.settings.fake_updates=2", *options)
    values = json.loads((place / "rehearsal.json").read_text())
    peak, planned = max(values["peak_gib"].values()), max(v["estimate_gib"] for v in values["estimate"].values())
    assert peak == pytest.approx(planned, rel=0.25)
