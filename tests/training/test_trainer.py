"""The training loop: the same bits after any stop, what a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs import checkpoint
from npedit.steps.base import Parts
from npedit.toy.dataset import write_dataset
from npedit.training import trainer
from npedit.training.parts import build_parts, build_source
from npedit.training.signals import STOP_SIGNALS

STUDENT = {"lr": 0.001, "warmup_updates": 2}


class Crash(Exception):
    """Ends a run without warning."""


def recipe(**changes) -> Recipe:
    copying = {"step": "reference_copy", "updates": 2, "batch_size": 2, "settings": {"student": STUDENT, "steps": 2}}
    editing = {"student": STUDENT, "fake": STUDENT, "fake_updates": 1, "steps": 2}
    raw = {
        "name": "small",
        "family": {"name": "flux"},
        "critic": {"name": "llava_onevision"},
        "data": {"name": "toy"},
        "stages": [copying, {"step": "np_edit", "updates": 2, "batch_size": 2, "accumulate": 2, "settings": editing}],
        "trainer": {"save_every": 1, "sample_items": 2, "steps": 2, "sample_every": 0, "evaluate_every": 0},
    }
    return make_recipe(raw | changes)


def parts(made: Recipe) -> Parts:
    return Parts(Flux.tiny(0), LlavaOnevision.tiny(0), "short", torch.device("cpu"))


def crash_at(step: int, event: str = "update"):
    def on_event(name: str, facts: dict) -> None:
        if name == event and facts["step"] == step:
            raise Crash

    return on_event


def train_to_last_checkpoint(run: Path, made: Recipe | None = None, **more) -> None:
    """Train to the checkpoint of update 4. The finished editor and the report are left out: they take longest."""
    with pytest.raises(Crash):
        trainer.train(made or recipe(), run, parts=parts, on_event=crash_at(4), **more)


def end_state(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / "checkpoint-000004")[0]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(run: Path) -> list[dict]:
    """The rows without what a clock or the machine says."""
    rows = checkpoint.read_rows(run / checkpoint.METRICS)
    return [{k: v for k, v in r.items() if not k.startswith(("time", "mem/"))} for r in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return trainer.train(recipe(), tmp_path_factory.mktemp("whole") / "run", parts=parts)


def test_what_a_run_leaves_behind(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert {"config.resolved.yaml", "manifest.json", "metrics.jsonl", "samples", "final", "report.html"} <= names
    assert {"checkpoint-000003", "checkpoint-000004"} == {n for n in names if n.startswith("checkpoint")}
    assert checkpoint.read_manifest(whole)["no_pairs"] is True
    rows = checkpoint.read_rows(whole / checkpoint.METRICS)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["stage"] for r in rows[1:]] == [0, 0, 1, 1]
    assert "loss/copy" in rows[1] and "loss/dmd" in rows[3] and rows[4]["skipped_steps"] == 0
    for folder in ("step-000000", "step-000004"):
        pictures = {p.name for p in (whole / "samples" / folder).iterdir()}
        assert pictures == {"000.png", "001.png", "reference-000.png", "reference-001.png", "grid.png", "items.json"}
    assert Image.open(whole / "samples" / "step-000000" / "000.png").size == (32, 32)
    assert not list(whole.rglob("*.tmp"))


def test_the_final_editor_holds_the_ema_weights(whole: Path) -> None:
    net, state = Flux.tiny(0).open_net(whole / "final" / "transformer"), end_state(whole)
    assert all(torch.equal(p, state[f"student/ema.{n}"]) for n, p in net.named_parameters())
    assert any(not torch.equal(p, state[f"student/net.{n}"]) for n, p in net.named_parameters())


def test_the_second_stage_starts_from_the_ema_weights_of_the_first(tmp_path: Path) -> None:
    seen = {}

    def on_event(name: str, facts: dict) -> None:
        if name == "save" and facts["step"] == 2:
            seen.update(checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint-000002")[0])
        crash_at(4)(name, facts)

    made = recipe()
    slow = [s.model_dump() for s in made.stages]
    slow[1]["settings"]["student"] |= {"lr": 1e-12}  # so that it stays where it starts
    with pytest.raises(Crash):
        trainer.train(recipe(stages=slow), tmp_path / "run", parts=parts, on_event=on_event)
    end = end_state(tmp_path / "run")
    names = [k.removeprefix("student/ema.") for k in seen if k.startswith("student/ema.")]
    assert names
    for name in names:
        torch.testing.assert_close(end[f"student/net.{name}"], seen[f"student/ema.{name}"], rtol=0, atol=1e-6)
    assert any(not torch.equal(seen[f"student/net.{n}"], seen[f"student/ema.{n}"]) for n in names)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(whole: Path, tmp_path: Path, at: int) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trainer.train(recipe(), run, parts=parts, on_event=crash_at(at))
    assert checkpoint.latest_complete_checkpoint(run).name == f"checkpoint-{at:06d}" and not (run / "final").exists()
    train_to_last_checkpoint(run)
    assert same_bits(end_state(run), end_state(whole))
    assert logged(run) == logged(whole)


def test_updates_after_the_last_checkpoint_are_repeated(whole: Path, tmp_path: Path) -> None:
    run, seldom = tmp_path / "run", recipe().trainer.model_dump() | {"save_every": 2}
    with pytest.raises(Crash):
        trainer.train(recipe(trainer=seldom), run, parts=parts, on_event=crash_at(3))
    assert [r["step"] for r in logged(run)] == [0, 1, 2, 3] and checkpoint.latest_complete_checkpoint(
        run
    ).name.endswith("2")
    train_to_last_checkpoint(run, recipe(trainer=seldom))
    assert same_bits(end_state(run), end_state(whole))
    assert logged(run) == logged(whole)


def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trainer.train(recipe(), run, parts=parts, on_event=crash_at(0, "sample"))
    train_to_last_checkpoint(run)
    assert same_bits(end_state(run), end_state(whole)) and logged(run) == logged(whole)


def test_a_half_written_checkpoint_is_skipped(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trainer.train(recipe(), run, parts=parts, on_event=crash_at(2))
    for name in ("checkpoint-000003", "checkpoint-000003.tmp"):
        (run / name).mkdir()
        (run / name / "state.safetensors").write_bytes(b"half")
    train_to_last_checkpoint(run)
    assert same_bits(end_state(run), end_state(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_and_prints_the_command_to_resume(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, never = tmp_path / "run", recipe().trainer.model_dump() | {"save_every": 0}
    monkeypatch.setattr(sys, "argv", ["/somewhere/npedit", "train", "my recipe.yaml"])

    def on_event(name: str, facts: dict) -> None:
        if name == "update" and facts["step"] == 3:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in STOP_SIGNALS]
    with pytest.raises(SystemExit) as caught:
        trainer.train(recipe(trainer=never), run, parts=parts, on_event=on_event)
    assert caught.value.code == {signal.SIGINT: 130}.get(number, 75)
    assert "npedit train 'my recipe.yaml'" in capsys.readouterr().out
    assert handlers == [signal.getsignal(s) for s in STOP_SIGNALS]
    assert checkpoint.latest_complete_checkpoint(run).name == "checkpoint-000003"
    train_to_last_checkpoint(run, recipe(trainer=never))
    assert same_bits(end_state(run), end_state(whole))


def test_a_finished_run_is_not_trained_again(whole: Path) -> None:
    before, updates = end_state(whole), []
    trainer.train(recipe(), whole, parts=parts, on_event=lambda name, facts: updates.append(name))
    assert "update" not in updates and "end" in updates
    assert same_bits(end_state(whole), before)


def test_another_recipe_is_refused_before_anything_is_loaded(whole: Path) -> None:
    def never(made: Recipe) -> Parts:
        raise AssertionError("loaded")

    with pytest.raises(UserError, match="seed: 0 -> 1"):
        trainer.train(recipe(seed=1), whole, parts=never)


def test_a_full_disk_ends_in_a_message_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    run, write = tmp_path / "run", checkpoint._write_state

    def full(run: Path, folder: Path, *rest) -> None:
        if folder.name == "checkpoint-000003.tmp":
            (folder / "state.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(run, folder, *rest)

    monkeypatch.setattr(checkpoint, "_write_state", full)
    with pytest.raises(UserError, match="free some space"):
        trainer.train(recipe(), run, parts=parts)
    assert checkpoint.latest_complete_checkpoint(run).name == "checkpoint-000002" and not list(run.glob("*.tmp"))
    monkeypatch.setattr(checkpoint, "_write_state", write)
    train_to_last_checkpoint(run)
    assert same_bits(end_state(run), end_state(whole))


def test_gradients_that_stay_not_finite_stop_the_run(tmp_path: Path) -> None:
    def broken(made: Recipe) -> Parts:
        found = parts(made)
        found.critic.model.lm_head.weight.fill_(float("nan"))  # the pictures stay finite, the gradients do not
        return found

    settings = {"student": {"max_skipped": 1}, "dmd_weight": 0.0, "steps": 2}
    stages = [{"step": "np_edit", "updates": 9, "batch_size": 2, "settings": settings}]
    with pytest.raises(UserError, match="2 updates in a row"):
        trainer.train(recipe(stages=stages), tmp_path / "run", parts=broken)
    assert checkpoint.latest_complete_checkpoint(tmp_path / "run").name == "checkpoint-000001"
    assert logged(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_evaluation_and_samples_keep_to_their_interval(tmp_path: Path) -> None:
    stages = [{"step": "reference_copy", "updates": 3, "batch_size": 1, "settings": {"steps": 1}}]
    rhythm = {
        "sample_every": 2,
        "evaluate_every": 2,
        "evaluate_items": 9,
        "benchmark": "toy",
        "steps": 1,
        "sample_items": 1,
    }
    trainer.train(recipe(stages=stages, trainer=rhythm), tmp_path / "run", parts=parts)
    rows = checkpoint.read_rows(tmp_path / "run" / checkpoint.METRICS)
    assert [r["step"] for r in rows if "eval/both" in r] == [0, 2, 3]
    assert {"eval/applied", "eval/preserved", "eval/copy_rate", "eval/by_type/add"} <= rows[0].keys()
    drawn = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert drawn == ["step-000000", "step-000002", "step-000003"]


def test_samples_do_not_change_training(whole: Path, tmp_path: Path) -> None:
    busy = recipe().trainer.model_dump() | {"sample_every": 1}
    train_to_last_checkpoint(tmp_path / "run", recipe(trainer=busy))
    assert same_bits(end_state(tmp_path / "run"), end_state(whole))


def test_a_checkpoint_is_saved_after_save_seconds(tmp_path: Path) -> None:
    saved = []
    often = recipe().trainer.model_dump() | {"save_every": 0, "save_seconds": 1e-9}
    stages = [{"step": "reference_copy", "updates": 2, "batch_size": 1, "settings": {"steps": 2}}]
    trainer.train(
        recipe(stages=stages, trainer=often), tmp_path / "run", parts=parts,
        on_event=lambda name, facts: saved.append(facts["step"]) if name == "save" else None,
    )  # fmt: skip
    assert saved == [1, 2]


def test_a_resumed_run_does_not_list_a_bad_row_twice(tmp_path: Path) -> None:
    class Source(build_source(recipe()).__class__):
        bad_rows = ({"row": 3, "why": "truncated"},)

    def source(made: Recipe) -> Source:
        return Source(made.data.settings, made.seed)

    run = tmp_path / "run"
    with pytest.raises(Crash):
        trainer.train(recipe(), run, parts=parts, source=source, on_event=crash_at(2))
    train_to_last_checkpoint(run, source=source)
    assert checkpoint.read_rows(run / checkpoint.BAD_ROWS) == [{"row": 3, "why": "truncated"}]
    assert logged(run)[-1]["data/bad_rows"] == 1


@pytest.mark.parametrize("good", [2, 38])
def test_too_many_bad_rows_are_listed_and_a_run_resumes_once_they_are_repaired(tmp_path: Path, good: int) -> None:
    folder, run = write_dataset(tmp_path / "photos", 40, 0), tmp_path / "run"
    photos = sorted((folder / "images").iterdir())
    whole = [p.read_bytes() for p in photos]
    for photo in photos[good:]:
        photo.write_bytes(b"")
    made = recipe(data={"name": "imagefolder", "path": str(folder), "sizes": [[32, 32]], "max_bad_share": 0.02})
    with pytest.raises(UserError, match=r"bad rows; got .*bad_rows\.jsonl"):
        trainer.train(made, run, parts=parts)
    listed = checkpoint.read_rows(run / checkpoint.BAD_ROWS)
    assert [row["file"] for row in listed] == [f"images/{p.name}" for p in photos[good:]]
    photos[-1].write_bytes(whole[-1])
    (folder / "images" / "000000.png").write_bytes(b"")
    with pytest.raises(UserError, match="bad rows; got"):
        trainer.train(made, run, parts=parts)
    again = [row["file"] for row in checkpoint.read_rows(run / checkpoint.BAD_ROWS)]
    assert again == ["images/000000.png", *(row["file"] for row in listed[:-1])]  # what was mended is not listed
    for photo, content in zip(photos, whole, strict=True):
        photo.write_bytes(content)
    train_to_last_checkpoint(run, made)
    assert checkpoint.read_rows(run / checkpoint.BAD_ROWS) == []


def test_data_that_do_not_fit_the_recipe_are_refused_before_training(tmp_path: Path) -> None:
    class NoCaptions(build_source(recipe()).__class__):
        has_target_captions = False

    class Odd(build_source(recipe()).__class__):
        sizes = ((30, 32),)

    for kind, said in ((NoCaptions, "stages.1: .*target_caption"), (Odd, "multiples of 8; got 32x30")):
        with pytest.raises(UserError, match=said):
            trainer.train(recipe(), tmp_path / "run", parts=parts, source=lambda r, k=kind: k(r.data.settings, r.seed))
        assert not checkpoint.is_run(tmp_path / "run")


def test_weights_that_do_not_open_are_named(tmp_path: Path) -> None:
    made = recipe(family={"name": "flux", "weights": str(tmp_path)})
    with pytest.raises(UserError, match=r"family\.weights: .*model_index\.json"):
        build_parts(made)


def test_what_no_stage_needs_is_not_loaded(tmp_path: Path) -> None:
    """With the critic's weight at zero, a critic that cannot be opened does no harm."""
    Flux.tiny(0).pipe.save_pretrained(tmp_path / "base")
    chosen = {"family": {"name": "flux", "weights": str(tmp_path / "base")},
              "critic": {"name": "llava_onevision", "weights": str(tmp_path / "none")}}  # fmt: skip
    for weight in (0.0, 1.0):
        stages = [{"step": "np_edit", "updates": 1, "batch_size": 1, "settings": {"critic_weight": weight, "steps": 2}}]
        made = recipe(stages=stages, **chosen)
        if weight:
            with pytest.raises(UserError, match=r"critic\.weights"):
                build_parts(made)
        else:
            assert build_parts(made).critic is None


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from npedit.training import trainer
from npedit.recipe.config import make_recipe
from tests.training.test_trainer import parts, recipe
stages = [{"step": "reference_copy", "updates": 40, "batch_size": 2, "settings": {"steps": 1}}]
pace = {"save_every": 1, "sample_items": 1, "steps": 1}
trainer.train(recipe(stages=stages, trainer=pace), Path(sys.argv[1]), parts=parts)
"""


@pytest.mark.slow
def test_a_run_killed_four_times_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed four times wherever it happens to be, then left alone: the same bits as a run without kills."""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    quiet = {"env": env, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, str(tmp_path / "calm")], check=True, **quiet)
    run = tmp_path / "killed"
    for goal in (1, 8, 15, 22):
        process = subprocess.Popen([*command, str(run)], **quiet)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            newest = checkpoint.latest_complete_checkpoint(run)
            if newest and int(newest.name[11:]) >= goal:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        assert not (run / "final").exists()
    subprocess.run([*command, str(run)], check=True, **quiet)
    a, b = (checkpoint.load_checkpoint(r / "checkpoint-000040")[0] for r in (run, tmp_path / "calm"))
    assert same_bits(a, b)
    assert logged(run) == logged(tmp_path / "calm")
    assert json.loads((run / "final" / "npedit.json").read_text())["recipe"] == "small"
