"""The runs of a folder, for the page: which have an editor, their editors on demand, their critics and reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.recipe.config import EMBEDDED
from npedit.report.report import make_report
from npedit.runs.checkpoint import is_run
from npedit.runs.editor_facts import FACTS_FILE
from npedit.runs.resolve import EditorSource, resolve_editor
from npedit.serve.verdict import CriticQueue, find_critic, find_recipe, trains_scenes

MOST_EDITORS = 2  # in memory


def find_runs(folder: str | Path) -> dict[str, EditorSource]:
    """The runs in a folder that have an editor, by name: finished ones, and others with their newest checkpoint. The
    run with the newest editor comes first. Empty if `folder` is no folder of runs."""
    found: dict[str, EditorSource] = {}
    folder = Path(folder)
    if str(folder) == EMBEDDED or not folder.is_dir() or is_run(folder) or (folder / FACTS_FILE).is_file():
        return found
    for run in folder.iterdir():
        try:
            if is_run(run):
                found[run.name] = resolve_editor(run)
        except UserError:  # no editor yet
            continue
    return dict(sorted(found.items(), key=lambda item: _time(item[1]), reverse=True))


def _time(source: EditorSource) -> float:
    try:
        return source.folder.stat().st_mtime
    except OSError:  # a checkpoint that was deleted just now
        return 0.0


class Runs:
    """The runs of `folder`. `open_editor` opens an editor's folder. At most `most_editors` (2 or more) are in memory:
    the first that was opened, and those that were asked for last."""

    def __init__(
        self,
        folder: str | Path,
        open_editor: Callable[[str], Editor],
        with_critic: bool = False,
        most_editors: int = MOST_EDITORS,
    ) -> None:
        self.folder, self._open_editor, self._with_critic = Path(folder), open_editor, with_critic
        self.most_editors = most_editors
        self._opened: dict[EditorSource, Editor] = {}
        self._critic: tuple[str, CriticQueue | None] = ("", None)
        self._drawing = threading.Lock()
        self.sizes: dict[str, Sequence[tuple[int, int]]] = {}  # of the editors that were opened, by the run's name

    def choices(self) -> list[tuple[str, str]]:
        """(what a person reads, the run's name) of each run."""
        found = find_runs(self.folder)
        return [(f"{name} ({s.folder.name})" if s.is_checkpoint else name, name) for name, s in found.items()]

    def find(self, name: object) -> EditorSource:
        """The editor of the run of this name, the newest that there is.

        Raises:
            UserError: there is none.
        """
        found = find_runs(self.folder)
        if name not in found:
            raise UserError(f"expected one of the runs {', '.join(found) or '(none)'}; got {str(name)[:80]!r}")
        return found[str(name)]

    def open(self, name: str) -> Editor:
        """The editor of a run. Only one thread may call this.

        Raises:
            UserError: it cannot be opened.
        """
        source = self.find(name)
        if source not in self._opened:
            self._make_room()
            self._opened[source] = self._open_editor(str(source.folder))
        elif source != next(iter(self._opened)):
            self._opened[source] = self._opened.pop(source)  # asked for last
        editor = self._opened[source]
        self.sizes[name] = editor.sizes
        return editor

    def _make_room(self) -> None:
        """Forget the editor that was not asked for the longest, so that its memory is free before the next is opened.
        The first one stays."""
        if len(self._opened) >= self.most_editors:
            del self._opened[list(self._opened)[1]]

    def critic(self, name: str) -> CriticQueue | None:
        """The critic of a run's recipe, as `find_critic` finds it; None if the recipe has none."""
        recipe = find_recipe(str(self.folder / name))
        if recipe is None or recipe.critic is None:
            return None
        key = repr((recipe.critic, trains_scenes(recipe)))
        if self._critic[0] != key:
            self._critic = key, find_critic(name, recipe, self._with_critic)
        return self._critic[1]

    def report(self, name: str) -> str:
        """The run's report as HTML, as of now.

        Raises:
            UserError: there is no such run.
        """
        self.find(name)
        with self._drawing:
            return make_report(self.folder / name)
