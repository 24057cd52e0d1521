"""How often the teacher runs: without its prompt only for items whose guidance is not 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.support.side_by_side as two
from npedit.nets import distributed
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, parts


def teacher_rows(guidance: float, by_type: dict[str, float], *numbers: int) -> list[int]:
    """The batch sizes of the teacher's passes in one update on these items."""
    made = parts(critic=False)
    chosen = NpEditSettings(critic_weight=0, fake_updates=1, guidance=guidance, guidance_by_type=by_type)
    step = Step(chosen, made, made.create_trainable("student", 0), 10, 0)
    rows: list[int] = []
    made.family.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    step.step([batch(*numbers)], 0)
    return rows


@pytest.mark.parametrize(
    ("guidance", "by_type", "wanted"),
    [
        (3.5, {}, [3, 3]),
        (1.0, {}, [3]),
        (3.5, {"recolour": 1.0}, [3, 2]),
        (1.0, {"remove": 2.0}, [3, 1]),
        (0.0, {}, [3, 3]),
    ],
)
def test_the_unconditional_pass_is_made_for_guided_items_only(
    guidance: float, by_type: dict[str, float], wanted: list[int]
) -> None:
    """The items are a recolouring, a removal and an addition."""
    assert teacher_rows(guidance, by_type, 0, 1, 2) == wanted


def gradient(guidance: float, by_type: dict[str, float]) -> Tensor:
    made = parts(critic=False)
    chosen = NpEditSettings(critic_weight=0, guidance=guidance, guidance_by_type=by_type)
    step = Step(chosen, made, made.create_trainable("student", 0), 10, 0)
    x0 = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return step.distribution_matching(batch(0, 1, 2), x0, 1.0, torch.Generator().manual_seed(6))


def test_each_item_has_the_gradient_of_its_own_guidance() -> None:
    mixed, strong, plain = gradient(3.5, {"recolour": 1.0}), gradient(3.5, {}), gradient(1.0, {})
    torch.testing.assert_close(mixed, torch.cat([plain[:1], strong[1:]]), atol=1e-4, rtol=1e-4)
    assert (strong[0] - plain[0]).abs().max() > 1e-2


def passes_of_a_process() -> list[int]:
    """The first process has a recolouring, the second a removal."""
    with distributed.process_group():
        return teacher_rows(1.0, {"remove": 2.0}, distributed.rank())


def test_a_process_without_guided_items_makes_the_pass_too(tmp_path: Path) -> None:
    """A sharded teacher is gathered by all processes at once: else the other would wait for ever."""
    ends = two.together(tmp_path, passes_of_a_process)
    assert [end.get("value") for end in ends] == [[1, 1], [1, 1]], ends
