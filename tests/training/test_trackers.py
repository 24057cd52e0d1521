"""What a run sends to TensorBoard and other services: its metrics and samples, once, also after a crash."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from npedit.errors import UserError
from npedit.runs import checkpoint
from npedit.training import trackers, trainer
from tests.training.test_trainer import Crash, crash_at, parts, recipe

TRAINER = {"save_every": 2, "sample_items": 2, "steps": 2, "sample_every": 3, "evaluate_every": 0}


def with_log(*names):
    return recipe(trainer={**TRAINER, "log": list(names)})


def crash_and_resume(made, run, step=3):
    """A run that ends without warning after update `step`, whose last checkpoint is older, and then resumes."""
    with pytest.raises(Crash):
        trainer.train(made, run, on_event=crash_at(step), parts=parts)
    assert checkpoint.usable_checkpoint(run)[1]["step"] == 2
    trainer.train(made, run, parts=parts)
    return checkpoint.read_rows(run / checkpoint.METRICS)


def test_tensorboard_has_every_update_once_and_the_samples_at_full_size(tmp_path):
    rows = crash_and_resume(with_log("tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("time/update", "skipped_steps"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted] == [1, 2, 3, 4]
        assert np.allclose([value for _, value in found], [value for _, value in wanted])
    pictures = events.Images("samples/1")
    assert [picture.step for picture in pictures] == [0, 3, 4]
    assert {(picture.width, picture.height) for picture in pictures} == {(64, 32)}


def test_a_service_that_cannot_forget_is_sent_each_update_once(tmp_path, monkeypatch):
    """The stand-in of the service keeps all that it is sent under one name, as Weights & Biases does."""
    sent = {}

    class Service:
        def __init__(self, recipe, run, first_step):
            self.name = trackers._tracking_id(run)

        def log(self, step, values, pictures):
            sent.setdefault(self.name, []).append((step, len(values) > 1, sorted(pictures)))

        def close(self):
            pass

    monkeypatch.setitem(trackers.KINDS, "wandb", Service)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    crash_and_resume(with_log("wandb"), tmp_path / "run")
    (steps,) = sent.values()
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 4]
    assert [step for step, _, pictures in steps if pictures == ["samples/0", "samples/1"]] == [0, 3, 4]


def test_a_missing_library_is_named_with_its_extra_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"npedit\[trackio\]"):
        trainer.train(with_log("trackio"), tmp_path / "run", parts=parts)
    assert not checkpoint.is_run(tmp_path / "run")


def test_without_services_nothing_is_written(tmp_path):
    trainer.train(recipe(), tmp_path / "run", parts=parts)
    assert not {"tensorboard", "tracking.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_other_processes_send_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.distributed, "is_main_process", lambda: False)
    trackers.Trackers(with_log("tensorboard"), tmp_path).log({"step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_run_in_the_working_folder_has_this_folders_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert trackers._tracking_id(Path(".")).startswith("mine-")
