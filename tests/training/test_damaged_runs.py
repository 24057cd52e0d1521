"""Runs whose own files are damaged, out of memory, weights that are not finite, stops before an evaluation."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tests.training.test_trainer as usual
from npedit import generator
from npedit.errors import UserError
from npedit.recipe.config import Recipe
from npedit.report.report import write_report
from npedit.runs import checkpoint
from npedit.steps import np_edit
from npedit.steps.np_edit import NpEditSettings
from npedit.training import evaluation, trainer
from npedit.training.out_of_memory import Progress, explain_out_of_memory, is_out_of_memory
from tests.support.parts import batch as step_batch
from tests.support.parts import parts as step_parts

STAGES = [{"step": "reference_copy", "updates": 3, "batch_size": 2, "settings": {"steps": 1}}]
PACE = {"save_every": 1, "sample_items": 1, "sample_every": 0, "evaluate_every": 0, "steps": 1}
NEWEST = "checkpoint-000002"
FILES = [
    checkpoint.CONFIG, checkpoint.MANIFEST, checkpoint.METRICS, f"{NEWEST}/state.json", f"{NEWEST}/state.safetensors",
    f"{NEWEST}/{checkpoint.CONFIG}", f"{NEWEST}/{checkpoint.MANIFEST}", f"{NEWEST}/COMPLETE", checkpoint.BAD_ROWS,
]  # fmt: skip


def recipe(**changes) -> Recipe:
    return usual.recipe(**({"stages": STAGES, "trainer": PACE} | changes))


def train(run: Path, made: Recipe | None = None, **more) -> Path:
    return trainer.train(made or recipe(), run, parts=more.pop("parts", usual.parts), **more)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


HARMS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": cut,
    "NUL": zero,
    "another type": lambda path: path.write_text("[1, 2]\n"),
}
SAMPLE = [
    (checkpoint.MANIFEST, "truncated"), (checkpoint.CONFIG, "empty"), (checkpoint.METRICS, "NUL"),
    (f"{NEWEST}/state.json", "another type"), (f"{NEWEST}/state.safetensors", "missing"),
]  # fmt: skip
ALL = [(file, harm) for file in FILES for harm in HARMS]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates that ended after the second."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(usual.Crash):
        train(run, on_event=usual.crash_at(2))
    (run / checkpoint.BAD_ROWS).write_text('{"row": 1}\n')
    return run


@pytest.mark.parametrize(
    ("file", "harm"), [pytest.param(*pair, marks=[] if pair in SAMPLE else [pytest.mark.slow]) for pair in ALL]
)
def test_a_run_with_a_damaged_file_resumes_or_is_named(stopped: Path, tmp_path: Path, file: str, harm: str) -> None:
    """The report and the training end well, or with a message that names the run."""
    run = shutil.copytree(stopped, tmp_path / "run")
    HARMS[harm](run / file)
    try:
        write_report(run)
    except UserError as error:
        assert str(run) in str(error)
    train(run)
    assert [r["step"] for r in checkpoint.read_rows(run / checkpoint.METRICS)][-1] == 3
    assert checkpoint.latest_complete_checkpoint(run).name == "checkpoint-000003" and (run / "final").is_dir()
    assert checkpoint.read_manifest(run)["no_pairs"] is True


@pytest.mark.parametrize("line", [b"", b"\0\0\0", b'{"step": 1, "lo', b"\xff\xfe", b"[1]"])
def test_a_damaged_line_anywhere_is_skipped_and_counted(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / checkpoint.METRICS
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    assert [row["step"] for row in checkpoint.read_rows(path)] == [0, 1]
    assert "1 damaged lines of 3" in caplog.text
    checkpoint.drop_metrics_after(tmp_path, 1)
    caplog.clear()
    assert len(checkpoint.read_rows(path)) == 2 and not caplog.text


def test_a_run_without_a_good_checkpoint_does_not_restart_by_itself(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    for state in run.glob("checkpoint-*/state.json"):
        state.unlink()
    with pytest.raises(UserError, match=r"damaged .*no other checkpoint.*--fresh"):
        train(run)
    assert (run / NEWEST / "COMPLETE").exists()


# ----------------------------------------------------------------------------------------------------- not finite


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    wild = [STAGES[0] | {"settings": {"steps": 1, "student": {"lr": 1e20}}}]
    with pytest.raises(UserError, match=r"expected finite (weights|losses|pixels)"):
        train(tmp_path / "run", recipe(stages=wild))
    assert not (tmp_path / "run" / "final").exists()
    for folder in checkpoint.complete_checkpoints(tmp_path / "run"):
        tensors = checkpoint.load_checkpoint(folder)[0]
        assert all(t.isfinite().all() for k, t in tensors.items() if "/net." in k)


# -------------------------------------------------------------------------------------------------- out of memory


def test_out_of_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npedit.steps.reference_copy import Step

    step = Step.step

    def exhausted(self, batches, update: int):
        if update == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return step(self, batches, update)

    monkeypatch.setattr(Step, "step", exhausted)
    short = [STAGES[0] | {"updates": 2}]
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", recipe(stages=short))
    message = str(caught.value)
    for words in ("update 2 (reference_copy)", "largest part is", "memory.gradient_checkpointing=true", "lora="):
        assert words in message
    assert "stages.0.batch_size=1 stages.0.accumulate=2" in message
    monkeypatch.undo()
    smaller = [short[0] | {"batch_size": 1, "accumulate": 2}]
    train(tmp_path / "run", recipe(stages=smaller, memory={"gradient_checkpointing": True}))
    assert [c["setting"] for c in checkpoint.read_manifest(tmp_path / "run")["changes"]] == [
        "stages.0.accumulate", "stages.0.batch_size"]  # fmt: skip


NOT_ESTIMATED = {"judge": {"name": "llava_onevision", "weights": "another"}}  # so the message comes without an estimate


@pytest.mark.parametrize(
    ("function", "part"),
    [("np_edit.generate_few_step", "draft"), ("np_edit.dmd.dmd_gradient", "dmd"),
     ("_critic_gradient.answer_loss", "critic"), ("np_edit.dmd.fake_score_loss", "fake"),
     ("np_edit.Learner.update", "student")],
)  # fmt: skip
def test_out_of_memory_names_the_part_of_the_update(monkeypatch: pytest.MonkeyPatch, function: str, part: str) -> None:
    frozen = step_parts()
    settings = NpEditSettings(steps=2, fake_updates=1)
    step = np_edit.Step(settings, frozen, frozen.create_trainable("student", 0), updates=2, seed=0)

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"npedit.steps.{function}", exhausted)
    progress = Progress()
    progress.phase = "update 1 (np_edit)"
    made = recipe(**NOT_ESTIMATED)
    with pytest.raises(UserError, match=rf"for update 1 \(np_edit\), part '{part}' \(.*; got: memory exhausted"):
        with explain_out_of_memory(made, Path("run"), progress):
            step.step([step_batch(0, 1)], 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    with pytest.raises(UserError, match="expected enough memory for loading the models; got: "):
        with explain_out_of_memory(recipe(**NOT_ESTIMATED), Path("run"), Progress()):
            raise error


def test_other_errors_are_not_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(OSError("out of memory"))


# ---------------------------------------------------------------------------------------------------------- stops


def test_a_stop_does_not_wait_for_an_evaluation_and_the_resumed_run_repeats_it(tmp_path: Path, monkeypatch) -> None:
    looking = recipe(trainer=PACE | {"benchmark": "toy", "evaluate_items": 9, "evaluate_every": 2})
    whole = train(tmp_path / "whole", looking)
    from npedit.steps.reference_copy import Step

    step = Step.step

    def stopped(self, batches, update: int):
        if update == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batches, update)

    monkeypatch.setattr(Step, "step", stopped)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", looking)
    assert caught.value.code == os.EX_TEMPFAIL == 75
    assert "eval/both" not in usual.logged(tmp_path / "run")[-1]
    assert json.loads((tmp_path / "run" / NEWEST / "state.json").read_text())["is_evaluation_due"] is True
    monkeypatch.undo()
    train(tmp_path / "run", looking)
    assert usual.logged(tmp_path / "run") == usual.logged(whole)


def test_a_stop_ends_an_evaluation_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the first of three batches of samples is made; the resumed run makes the samples."""
    made = recipe(
        stages=[STAGES[0] | {"updates": 2}],
        trainer=PACE | {"sample_items": 2 * generator.BATCH_ITEMS + 1, "sample_every": 1},
    )
    edit_images, calls = evaluation.edit_images, []

    def edit_and_signal(*given, **named):
        calls.append(None)
        if len(calls) == 3 + 1:  # of the samples after update 1; those before training are done
            os.kill(os.getpid(), signal.SIGTERM)
        return edit_images(*given, **named)

    monkeypatch.setattr(evaluation, "edit_images", edit_and_signal)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        train(run, made)
    assert caught.value.code == os.EX_TEMPFAIL and len(calls) == 4
    assert checkpoint.read_state(run / "checkpoint-000001")["is_evaluation_due"] is True
    assert not (run / "samples" / "step-000001").exists()
    monkeypatch.undo()
    train(run, made)
    assert {p.name for p in (run / "samples").iterdir()} == {"step-000000", "step-000001", "step-000002"}
    assert [r["step"] for r in usual.logged(run)] == [0, 1, 2]


@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_ends_the_first_evaluation_and_a_late_one(tmp_path: Path, monkeypatch, number: int) -> None:
    """A stop before training, and then (number 2) once more while that evaluation is repeated."""
    made = recipe(stages=[STAGES[0] | {"updates": 1}], trainer=PACE | {"sample_items": generator.BATCH_ITEMS + 1})
    edit_images = evaluation.edit_images

    def edit_and_signal(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return edit_images(*given, **named)

    monkeypatch.setattr(evaluation, "edit_images", edit_and_signal)
    run = tmp_path / "run"
    for _ in range(number):
        with pytest.raises(SystemExit):
            train(run, made)
        assert checkpoint.latest_complete_checkpoint(run).name == "checkpoint-000000"
        assert not (run / "samples").exists()
    monkeypatch.undo()
    train(run, made)
    assert {p.name for p in (run / "samples").iterdir()} == {"step-000000", "step-000001"}
    assert [r["step"] for r in usual.logged(run)] == [0, 1]
