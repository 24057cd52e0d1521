"""The checker that tests put on npedit's functions: beartype, on those whose annotations state shapes.

The others are left alone: beartype cannot read `Self` on single methods, and plain types are not what goes wrong here.
"""

from __future__ import annotations

from collections.abc import Callable

from beartype import beartype

SHAPED = ("Float[", "Int[", "Bool[", "Shaped[", "Num[", "Integer[", "UInt8[", "Int64[")


def shapes(function: Callable) -> Callable:
    """The function, with arguments and result checked against their stated shapes."""
    stated = [a if isinstance(a, str) else str(a) for a in getattr(function, "__annotations__", {}).values()]
    return beartype(function) if any(word in a for a in stated for word in SHAPED) else function
