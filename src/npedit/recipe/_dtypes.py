"""Which types of numbers a training can use."""

from __future__ import annotations

from collections.abc import Mapping

from npedit.errors import UserError


def require_trainable_dtypes(dtypes: Mapping[str, str]) -> None:
    """Refuse float16 for the parts that gradients go through, by their keys in the recipe. The smallest float16 number
    is 6e-8, and the gradient with respect to one element of a latent or of a picture is smaller: at 512 px half of an
    adapter's gradients would be exactly 0.

    Raises:
        UserError: a part is in float16.
    """
    for key, dtype in dtypes.items():
        if dtype == "float16":
            raise UserError(
                f"{key}: expected bfloat16 or float32; got float16, in which most gradients are too small to be "
                "anything but 0; use bfloat16, or float32 on a GPU without bfloat16"
            )
