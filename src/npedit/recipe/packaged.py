"""The recipes that ship in the package, by name."""

from __future__ import annotations

import os
from pathlib import Path

from npedit.errors import UserError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_path(name: str | Path) -> Path:
    """Return the file of a recipe: the path as given, or the packaged recipe of this name.

    Raises:
        UserError: neither exists; the message gives the nearest packaged name.
    """
    if os.path.isfile(name):
        return Path(name)
    packaged = {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}
    if str(name) in packaged:
        return packaged[str(name)]
    hint = did_you_mean(str(name), packaged)
    studies = [stem for stem in packaged if stem.startswith("study-")]
    known = ", ".join(stem for stem in packaged if stem not in studies)
    raise UserError(
        f"expected a recipe file or one of: {known} (for npedit study: {', '.join(studies)}); got {str(name)!r}; check "
        f"the path.{hint}"
    )
