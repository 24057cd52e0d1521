"""npedit: train few-step image editors without pairs, with the gradient of a vision-language model's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npedit.editor import Editor as Editor

__version__ = "0.1.0"
__all__ = ["Editor", "__version__"]


def __getattr__(name: str) -> Any:
    """`npedit.Editor`, imported when it is first asked for: torch is slow to import and not every command needs it."""
    if name == "Editor":
        from npedit.editor import Editor

        return Editor
    raise AttributeError(f"module 'npedit' has no attribute {name!r}")
