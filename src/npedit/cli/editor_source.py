"""Open the editor that a command scores, and print which weights it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from npedit.cli.console import out
from npedit.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from npedit.editor import Editor
    from npedit.runs.resolve import EditorSource


def open_editor(model: str, base: str = "", console: Console | None = None) -> Editor:
    """Open an editor for a command that scores it; `model` and `base` are those of `Editor.open`. Which weights are
    used is printed on `console`, standard output if not given.

    Raises:
        UserError: see `Editor.open`.
    """
    from npedit.editor import Editor

    editor = Editor.open(model, base=base)
    message = weights_message(model) + (f"; base model: {base}" if base else "")
    (console or out).print(escape(message))
    return editor


def weights_message(model: str) -> str:
    """One line that names the folder an editor is opened from, what kind of folder this is, and whether its weights
    are an exponential moving average (EMA).

    Raises:
        UserError: see `resolve_editor`.
    """
    from npedit.runs.resolve import resolve_editor

    source = resolve_editor(model)
    if model == "embedded":
        return "Editor: embedded (the toy editor in this package)"
    if source.run is None:
        return f"Editor: {source.folder} (exported weights)"
    kind = f"checkpoint after update {_update_of(source)}" if source.is_checkpoint else "finished run"
    return f"Editor: {source.folder} ({kind}; {_ema_message(source)})"


def _update_of(source: EditorSource) -> int:
    return int(source.folder.name.removeprefix("checkpoint-"))


def _ema_message(source: EditorSource) -> str:
    """Whether the student's weights are averaged in the stage that an editor comes from."""
    from npedit.runs.editor_weights import read_recipe

    try:
        stages = read_recipe(source).stages
    except UserError:
        return "EMA unknown: the run's recipe cannot be read"
    settings, end = stages[-1].settings, 0
    for stage in stages if source.is_checkpoint else ():
        end += stage.updates
        if _update_of(source) <= end:
            settings = stage.settings
            break
    ema = getattr(getattr(settings, "student", None), "ema", 0)
    return f"EMA weights, decay {ema:g}" if ema else "latest weights, no EMA: the recipe has ema: 0"
