"""npedit: train few-step image editors without pairs, with the gradient of a vision-language model's answers.

The names in `__all__` are the public interface (docs/api.md). Every other name is internal and may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npedit.benchmarks.toy import evaluate
    from npedit.editor import Editor
    from npedit.errors import UserError
    from npedit.recipe.config import Recipe, load_recipe, make_recipe
    from npedit.report.report import write_report
    from npedit.training.estimate import estimate
    from npedit.training.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Editor",
    "Recipe",
    "UserError",
    "__version__",
    "estimate",
    "evaluate",
    "load_recipe",
    "make_recipe",
    "train",
    "write_report",
]

# Where each public name lives. A module is imported when its name is first used: importing torch takes seconds.
_MODULES = {
    "Editor": "npedit.editor",
    "Recipe": "npedit.recipe.config",
    "UserError": "npedit.errors",
    "estimate": "npedit.training.estimate",
    "evaluate": "npedit.benchmarks.toy",
    "load_recipe": "npedit.recipe.config",
    "make_recipe": "npedit.recipe.config",
    "train": "npedit.training.trainer",
    "write_report": "npedit.report.report",
}


def __getattr__(name: str) -> Any:
    """Return a public name, imported at its first use."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'npedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
