"""`keep_weight`: where the data say which region must stay, the edit is held to the reference there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tests.support.side_by_side as two
from npedit.data import Batch
from npedit.errors import UserError
from npedit.generator import seeded_generator
from npedit.steps.base import Timers
from npedit.steps.np_edit import NpEditSettings, Step, kept_latents
from npedit.training.parts import build_source, check_recipe_fits
from tests.support.parts import batch, parts

WEIGHT = 0.7


@pytest.fixture(scope="module")
def frozen():
    return parts(critic=False)


def gradient(frozen, given: Batch, x0: Tensor, references: Tensor, **settings) -> tuple[Tensor, dict[str, float]]:
    chosen = NpEditSettings(**{"critic_weight": 0.0, "dmd_weight": 0.0, "keep_weight": WEIGHT, **settings})
    step = Step(chosen, frozen, frozen.create_trainable("student", 0), 1, 0)
    return step._gradient_at_x0(given, references, x0, 0, seeded_generator("g"), Timers())


def masked(given: Batch, mask: Tensor) -> Batch:
    return replace(given, keep_mask=mask.expand(len(given), 1, 16, 16).clone())


@pytest.fixture
def left() -> Tensor:
    """The left half must stay, and one pixel column more."""
    mask = torch.zeros(16, 16)
    mask[:, :9] = 1
    return mask


def test_the_gradient_is_that_of_the_squared_difference_in_the_region(frozen, left):
    given = masked(batch(0, 1), left)
    references = frozen.family.encode(given.references)
    x0 = (references + torch.randn(references.shape, generator=seeded_generator("x"))).requires_grad_(True)
    found, metrics = gradient(frozen, given, x0.detach(), references)
    half = references.shape[-1] // 2
    loss = WEIGHT * (x0 - references)[..., :half].square().sum() / x0.numel()
    (wanted,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(found, wanted)
    assert found[..., :half].all() and not found[..., half:].any()
    assert metrics["loss/keep"] == pytest.approx(float((x0.detach() - references)[..., :half].square().mean()))


def test_it_vanishes_at_the_reference_and_without_weight_or_mask(frozen, left):
    given = masked(batch(0, 1), left)
    references = frozen.family.encode(given.references)
    at_reference, metrics = gradient(frozen, given, references, references)
    assert not at_reference.any() and metrics["loss/keep"] == 0
    for other, settings in ((given, {"keep_weight": 0.0}), (replace(given, keep_mask=None), {}),
                            (masked(given, torch.zeros(16, 16)), {})):  # fmt: skip
        none, metrics = gradient(frozen, other, references + 1, references, **settings)
        assert not none.any() and "loss/keep" not in metrics


def test_an_item_without_a_mask_is_free(frozen, left):
    given = masked(batch(0, 1), left)
    given.keep_mask[1] = 0
    references = frozen.family.encode(given.references)
    found, _ = gradient(frozen, given, references + 1, references)
    assert found[0].any() and not found[1].any()


def test_a_cell_of_latents_stays_only_if_all_its_pixels_must():
    mask = torch.ones(1, 1, 16, 16)
    mask[..., 5, 9] = 0
    mask[..., 0, 0] = 0.25
    wanted = torch.ones(1, 1, 4, 4)
    wanted[..., 1, 2], wanted[..., 0, 0] = 0, 0.25
    torch.testing.assert_close(kept_latents(mask, (4, 4)), wanted)


def test_the_student_feels_it(frozen, left):
    """One update with the keep loss alone moves the student."""
    chosen = NpEditSettings(critic_weight=0.0, dmd_weight=0.0, keep_weight=WEIGHT)
    step = Step(chosen, frozen, frozen.family.trainable_net(), 1, 0)
    assert step.step([masked(batch(0, 1), left)], 0)["grad_norm/student"] > 0


def test_data_without_masks_are_refused(frozen):
    stages = [{"step": "np_edit", "updates": 1, "batch_size": 4, "settings": {"steps": 2, "keep_weight": 1.0}}]
    made = two.recipe(stages=stages)
    with pytest.raises(UserError, match="stages.0.settings.keep_weight: expected data with masks"):
        check_recipe_fits(made, build_source(made), frozen)
    with_masks = two.recipe(stages=stages, data={"name": "toy", "masks": True})
    check_recipe_fits(with_masks, build_source(with_masks), frozen)
