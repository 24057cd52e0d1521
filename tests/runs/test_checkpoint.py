"""The run directory: whole or not at all, the newest complete one, full disks, foreign folders, other recipes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError

from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs import checkpoint
from npedit.runs.final import model_card, set_base, write_final
from npedit.runs.git_revision import git_revision

CPU = torch.device("cpu")
TENSORS = {"student/net.a": torch.arange(6.0).view(2, 3), "student/step": torch.tensor(3.0)}


FACTS = {"sizes": [[32, 48]], "steps": 4, "family": "flux", "base": "embedded", "times": [1.0]}


def recipe(**changes) -> Recipe:
    return make_recipe(
        {
            "name": "small",
            "family": {"name": "flux"},
            "critic": {"name": "llava_onevision"},
            "data": {"name": "toy"},
            "stages": [{"step": "reference_copy", "updates": 4, "batch_size": 2}],
            **changes,
        }
    )


def begun(run: Path, made: Recipe) -> Path:
    with checkpoint.hold_run(run, made, True):
        checkpoint.write_run_metadata(run, made, checkpoint.make_manifest(made, "d" * 8, CPU))
    return run


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, 500, TENSORS, {"stage": 1}, keep=2)
    assert folder.name == "checkpoint-000500"
    tensors, numbers = checkpoint.load_checkpoint(folder)
    assert numbers == {"stage": 1} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in tensors)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 1_000_000):
        checkpoint.save_checkpoint(tmp_path, step, TENSORS, {"step": step}, keep=2)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["checkpoint-000010", "checkpoint-1000000"]
    assert checkpoint.latest_complete_checkpoint(tmp_path).name == "checkpoint-1000000"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000010", "checkpoint-1000000"]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.latest_complete_checkpoint(tmp_path) is None


def test_half_written_ones_do_not_count_and_are_swept(tmp_path: Path) -> None:
    good = checkpoint.save_checkpoint(tmp_path, 2, TENSORS, {}, keep=2)
    for name in ("checkpoint-000004", "checkpoint-000006.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest_complete_checkpoint(tmp_path) == good
    again = checkpoint.save_checkpoint(tmp_path, 4, TENSORS, {"whole": True}, keep=2)
    assert checkpoint.load_checkpoint(again)[1] == {"whole": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000004"]


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, 2, TENSORS, {}, keep=2)
    (folder / "state.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="got a damaged .*checkpoint-000002.*expected .* bytes; got 4"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize("where", ["checkpoint._write_state", "files.fsync_folder"])
def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    good = checkpoint.save_checkpoint(tmp_path, 2, TENSORS, {"n": 2}, keep=1)
    monkeypatch.setattr(f"npedit.runs.{where}", full_disk)
    with pytest.raises(UserError, match="free some space.*same command"):
        checkpoint.save_checkpoint(tmp_path, 4, TENSORS, {"n": 4}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert checkpoint.load_checkpoint(good)[1] == {"n": 2}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_really_full_disk_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # appended to; nothing may ever be renamed onto the device
    with pytest.raises(UserError, match="free some space"):
        checkpoint.append_row(tmp_path / "metrics.jsonl", {"step": 1})


def test_a_full_disk_as_safetensors_tells_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"), checkpoint.explain_write_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), checkpoint.explain_write_errors(tmp_path):
        raise SafetensorError("Error while serializing: invalid header")


def test_other_errors_of_the_disk_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broken"), checkpoint.explain_write_errors(tmp_path):
        raise OSError(errno.EIO, "broken")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(UserError, match="expected a place that can be written"):
            begun(run, recipe())


def test_what_a_run_is(tmp_path: Path) -> None:
    assert not checkpoint.is_run(tmp_path) and not checkpoint.is_run(tmp_path / "none")
    run = begun(tmp_path / "run", recipe())
    assert checkpoint.is_run(run) and checkpoint.require_run(run) == run
    with pytest.raises(UserError, match="expected a run"):
        checkpoint.require_run(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        begun(tmp_path, recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_at_its_birth_can_begin_again(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", recipe())
    (run / checkpoint.CONFIG).unlink()
    assert checkpoint.is_run(begun(run, recipe(seed=5)))


def test_the_resolved_recipe_is_the_recipe(tmp_path: Path) -> None:
    made = recipe(seed=3)
    assert make_recipe(checkpoint.read_config(begun(tmp_path / "run", made))) == made


def test_another_recipe_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", recipe())
    other = recipe(seed=3, stages=[{"step": "reference_copy", "updates": 9, "batch_size": 2}])
    with pytest.raises(UserError) as caught:
        begun(run, other)
    assert "seed: 0 -> 3" in str(caught.value) and f"start={run}" in str(caught.value)
    assert "updates" not in str(caught.value) and "batch_size" not in str(caught.value)
    assert checkpoint.read_config(run)["seed"] == 0


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", recipe())
    begun(run, recipe(trainer={"keep": 5, "save_every": 7}))
    assert checkpoint.read_config(run)["trainer"]["keep"] == 5


def test_other_data_are_refused(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", recipe())
    with pytest.raises(UserError, match="expected the data that .* was started with"):
        checkpoint.write_run_metadata(run, recipe(), checkpoint.make_manifest(recipe(), "eeee", CPU))


def test_an_old_run_is_refused_where_a_new_one_is_wanted(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", recipe())
    with pytest.raises(UserError, match="a run already"), checkpoint.hold_run(run, recipe(), resume=False):
        pass


def test_two_processes_cannot_have_one_run(tmp_path: Path) -> None:
    with checkpoint.hold_run(tmp_path / "run", recipe(), True):
        with pytest.raises(UserError, match="held by process"), checkpoint.hold_run(tmp_path / "run", recipe(), True):
            pass
    with checkpoint.hold_run(tmp_path / "run", recipe(), True):
        pass


def test_the_manifest(tmp_path: Path) -> None:
    found = checkpoint.read_manifest(begun(tmp_path / "run", recipe(seed=4)))
    assert found["no_pairs"] is True
    assert found["data_fingerprint"] == "d" * 8 and found["seeds"] == {"recipe": 4}
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert {"python", "diffusers", "transformers"} <= found["versions"].keys()
    assert isinstance(found["git_revision"], str)


def test_the_manifest_says_which_code_a_resumed_run_goes_on_with(tmp_path: Path) -> None:
    run, made = begun(tmp_path / "run", recipe()), recipe()
    first = checkpoint.read_manifest(run)
    for revision in ("", "b", "b", "c"):
        now = first | ({"git_revision": revision} if revision else {})
        with checkpoint.hold_run(run, made, True):
            checkpoint.write_run_metadata(run, made, now)
    found = checkpoint.read_manifest(run)
    assert found["git_revision"] == first["git_revision"]
    assert [(part["update"], part["git_revision"]) for part in found["resumed"]] == [(0, "b"), (0, "c")]
    assert found["resumed"][0]["versions"] == first["versions"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_is_read_without_writing_into_the_repository(tmp_path):
    """`git describe --dirty` rewrites the index, and a process that is killed meanwhile leaves index.lock behind."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    source = tmp_path / "source.py"
    assert git_revision(source) == ""
    source.write_text("1")
    for words in (["init", "-q"], ["add", "source.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean, index = git_revision(source), (tmp_path / ".git" / "index").read_bytes()
    assert len(clean) == 40
    os.utime(source, (1, 1))  # git would note the new time in its index
    assert git_revision(source) == clean
    assert (tmp_path / ".git" / "index").read_bytes() == index
    source.write_text("2")
    assert git_revision(source) == f"{clean}-dirty"


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.METRICS
    assert checkpoint.read_rows(path) == []
    checkpoint.append_row(path, {"step": 1, "loss": float("nan")})
    checkpoint.append_row(path, {"step": 2, "loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    assert checkpoint.read_rows(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    checkpoint.drop_metrics_after(tmp_path, 1)
    checkpoint.append_row(path, {"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_final_folder_opens_in_diffusers(tmp_path: Path) -> None:
    family = Flux.tiny(0)
    net, scheduler = family.trainable_net(), family.few_step_scheduler(6.0)
    for _ in range(2):  # the second replaces the first
        folder = write_final(tmp_path, recipe(), net, scheduler, [1, 0.9474, 0.8571, 0.6667], [(32, 48)])
    opened = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), net.parameters()))
    again = type(scheduler).from_pretrained(folder / "scheduler")
    again.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(again.sigmas[:4], torch.tensor([1, 0.9474, 0.8571, 0.6667]), atol=1e-4, rtol=0)
    facts = json.loads((folder / "npedit.json").read_text())
    assert (facts["format"], facts["family"], facts["base"], facts["steps"]) == (1, "flux", "embedded", 4)
    assert facts["sizes"] == [[32, 48]]
    assert "48x32" in (folder / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_the_model_card_names_the_photos_licences_and_sources(tmp_path: Path) -> None:
    data = recipe(data={"name": "imagefolder", "path": str(tmp_path)})
    assert "Licences" not in model_card(data, FACTS, False)
    (tmp_path / "prepare.json").write_text(json.dumps({"licences": {"CC0": 3}, "sources": {"flickr": 2, "me": 1}}))
    card = model_card(data, FACTS, False)
    assert "Licences of the training photos: CC0 (3 photos)." in card
    assert "Sources of the training photos: flickr (2 photos), me (1 photos)." in card
    (tmp_path / "prepare.json").write_text(json.dumps({"licence": "CC BY 4.0"}))  # of an imported set
    assert "Licences of the training photos: CC BY 4.0." in model_card(data, FACTS, False)
    (tmp_path / "prepare.json").write_text("broken")
    assert model_card(data, FACTS, False) == model_card(
        recipe(data={"name": "imagefolder", "path": "nowhere"}), FACTS, False
    )


def write_editor(place: Path, weights: str) -> Path:
    """The `final/` of a base model that was opened from a local folder, as a downloaded one is."""
    Flux.tiny(0).pipe.save_pretrained(place / "local base")
    family = Flux.load(place / "local base", torch.float32, CPU)
    made = recipe(
        family={"name": "flux", "weights": weights}, critic={"name": "internvl", "weights": str(place / "vlm")}
    )
    scheduler = type(family.few_step_scheduler(6.0)).from_pretrained(place / "local base" / "scheduler")
    return write_final(place, made, family.trainable_net(), scheduler, [1, 0.5], [(32, 48)])


def files_that_name(text: str, folder: Path) -> list[str]:
    return [p.name for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".md") and text in p.read_text()]


def test_an_editor_of_a_hub_model_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    final = write_editor(tmp_path, "somebody/base")
    assert files_that_name(str(tmp_path), final) == []
    assert files_that_name("somebody/base", final) == ["README.md", "npedit.json"]
    FluxTransformer2DModel.from_pretrained(final / "transformer")


def test_the_path_of_a_local_base_model_is_in_npedit_json_alone_and_can_be_replaced(tmp_path: Path) -> None:
    final = write_editor(tmp_path, str(tmp_path / "local base"))
    assert files_that_name(str(tmp_path), final) == ["npedit.json"]
    assert "started from `local base`" in (final / "README.md").read_text()
    set_base(final, "somebody/base")
    assert files_that_name(str(tmp_path), final) == []
    assert "started from `somebody/base`" in (final / "README.md").read_text()
