"""The warning when the critic's or DMD's gradient has had no say for long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.families.flux import Flux
from npedit.recipe.config import Recipe, make_recipe
from npedit.steps.base import Parts
from npedit.training import gradient_ratio, trainer
from npedit.training.gradient_ratio import UPDATES, GradientRatioCheck


def row(critic: float, dmd: float) -> dict[str, float]:
    return {
        "loss/dmd": 0.1, "critic/inverse_temperature": 1.0, "grad_norm/from_critic": critic, "grad_norm/from_dmd": dmd,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("critic", "dmd", "words"),
    [(0.005, 0.1, "raise critic_weight"), (0.0, 0.1, "raise critic_weight"), (3.0, 0.1, "lower critic_weight")],
)
def test_one_warning_after_so_many_updates_in_a_row(critic, dmd, words):
    check = GradientRatioCheck()
    found = [check.add(row(critic, dmd)) for _ in range(3 * UPDATES)]
    assert [i for i, message in enumerate(found) if message] == [UPDATES - 1] and words in found[UPDATES - 1]


def test_no_warning_within_the_limits_or_where_a_gradient_is_not_used():
    check = GradientRatioCheck()
    assert not any(check.add(row(0.05 if i % UPDATES else 0.5, 1.0)) for i in range(1, 3 * UPDATES))
    assert not any(check.add(row(0.11, 1.0)) + check.add(row(9.9, 1.0)) for _ in range(UPDATES))
    assert not any(check.add(row(float("nan"), 1.0)) for _ in range(2 * UPDATES))
    assert not any(check.add({"grad_norm/from_critic": 1.0, "grad_norm/from_dmd": 0.0}) for _ in range(2 * UPDATES))
    assert not any(check.add({"step": 1, "loss/copy": 0.1}) for _ in range(2 * UPDATES))


def small_recipe(critic_weight: float) -> Recipe:
    editing = {"fake_updates": 1, "steps": 2, "critic_weight": critic_weight}
    return make_recipe({
        "name": "small",
        "family": {"name": "flux"},
        "critic": {"name": "llava_onevision"},
        "data": {"name": "toy"},
        "stages": [{"step": "np_edit", "updates": 3, "batch_size": 2, "settings": editing}],
        "trainer": {"save_every": 0, "sample_items": 1, "steps": 2, "sample_every": 0, "evaluate_every": 0},
    })  # fmt: skip


class Stop(Exception):
    """Ends a run early: the finished editor and the report take longest."""


def test_training_prints_the_warning(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(gradient_ratio, "UPDATES", 2)
    events = []

    def note(name: str, facts: dict) -> None:
        events.append((name, facts["step"]))
        if events[-1] == ("update", 3):
            raise Stop

    with pytest.raises(Stop):
        trainer.train(
            small_recipe(1e-9), tmp_path / "run", on_event=note,
            parts=lambda _: Parts(Flux.tiny(0), LlavaOnevision.tiny(0), "short", torch.device("cpu")),
        )  # fmt: skip
    assert ("gradient_ratio", 2) in events and ("gradient_ratio", 3) not in events
    assert "WARNING for 2 updates the critic's gradient" in capsys.readouterr().out
