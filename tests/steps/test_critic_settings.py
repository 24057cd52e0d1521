"""The settings of how the critic is asked: the same gradient for the student from less memory or fewer operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from npedit.critics.internvl import InternVL
from npedit.recipe.config import MemorySettings
from npedit.steps.base import Parts
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, parts


@pytest.fixture(scope="module")
def shared() -> Parts:
    return replace(parts(critic=False), critic=InternVL.tiny(0))


def critic_gradient(shared: Parts, **memory: bool) -> tuple[Tensor, dict[str, float], int]:
    """The critic's gradient at x0 of four items, one of them a removal; what is logged; operations."""
    these = replace(shared, memory=MemorySettings(**memory))
    step = Step(NpEditSettings(dmd_weight=0.0, ramp_updates=0), these, these.create_trainable("student", 0), 1, 0)
    items = batch(0, 1, 2, 3)
    with FlopCounterMode(display=False) as counter:
        gradient, _, logged = step.critic_gradient(items, these.encode_images(items.references), 0)
    return gradient, logged, counter.get_total_flops()


def test_checkpointing_changes_no_answer_and_computes_the_layers_again(shared):
    plain, again = critic_gradient(shared), critic_gradient(shared, critic_checkpointing=True)
    assert plain[1] == again[1] and again[2] > 1.1 * plain[2]
    torch.testing.assert_close(again[0], plain[0], atol=1e-4 * float(plain[0].abs().max()), rtol=0)


def test_packed_questions_change_answers_by_rounding_and_take_fewer_operations(shared):
    plain, packed = critic_gradient(shared), critic_gradient(shared, packed_questions=True)
    assert packed[1] == pytest.approx(plain[1], abs=1e-5) and packed[2] < 0.97 * plain[2]
    torch.testing.assert_close(packed[0], plain[0], atol=1e-4 * float(plain[0].abs().max()), rtol=0)
