"""Changes to a recipe from the command line: "stages.1.settings.lr=1e-4"; a list is indexed by number."""

from __future__ import annotations

from typing import Any

from npedit.errors import UserError
from npedit.recipe.yaml_file import parse_yaml


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change plain values (as from YAML) in place.

    Raises:
        UserError: the override is not KEY=VALUE, the value is not YAML, or there is no such key.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"expected KEY=VALUE such as stages.0.updates=100; got {override!r}; write it that way")
    try:
        value = parse_yaml(text, f"the value in {override!r}")
    except UserError as error:
        raise UserError(f"expected a YAML value after '='; got {override!r} ({error}); put quotes around it") from None
    place: Any = raw
    for depth, key in enumerate(keys):
        here, last = ".".join(keys[: depth + 1]), depth + 1 == len(keys)
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise UserError(
                    f"{here}: expected a number from 0 to {len(place) - 1}; got {key!r}; change the override"
                )
            if last:
                place[int(key)] = value
            else:
                place = place[int(key)]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            raise UserError(f"{here}: expected a key inside a mapping; got {place!r} above it; change the override")
