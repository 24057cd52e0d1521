"""Which settings two recipes differ in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, each with (old, new). A missing key has the value "(absent)"."""
    a, b = _flatten(old, ""), _flatten(new, "")
    return {
        k: (a.get(k, "(absent)"), b.get(k, "(absent)"))
        for k in sorted(a.keys() | b.keys())
        if a.get(k, "(absent)") != b.get(k, "(absent)")
    }


def _flatten(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= _flatten(inner, f"{path}.{key}" if path else str(key))
    return out
