"""float16 is refused where gradients would be too small for it."""

from __future__ import annotations

import pytest
import torch

from npedit.errors import UserError
from npedit.recipe.config import load_recipe


@pytest.mark.parametrize("key", ["family.dtype", "family.vae_dtype", "critic.dtype"])
def test_training_through_float16_is_refused_with_a_reason(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected bfloat16 or float32; got float16, in which most gradients"):
        load_recipe("toy", [f"{key}=float16"])


def test_what_has_no_gradient_may_be_float16() -> None:
    made = load_recipe("toy", ["family.text_dtype=float16", "family.dtype=bfloat16"])
    assert made.family.dtypes()["default"] == torch.float16


def test_the_reason_is_true() -> None:
    """The surrogate loss gives a latent's element a gradient of about 1 / number of elements, divided by the rows."""
    gradients = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) / (16 * 64 * 64)
    through_a_layer = gradients / 1024
    assert (through_a_layer.half() == 0).float().mean() > 0.3
    assert (through_a_layer.bfloat16() == 0).sum() == 0
