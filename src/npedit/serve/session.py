"""The edits of one visitor of the page: which there are, which one is shown, and undo. Pictures are files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from npedit.serve.verdict import Verdict

MOST_TURNS = 50  # that a session keeps; the oldest are forgotten


@dataclass(frozen=True)
class Result:
    """An edited picture's PNG file, its seed, and what the critic says of it, if the critic was asked."""

    file: str
    seed: int
    verdict: Verdict | None = None

    @property
    def caption(self) -> str:
        """The seed, and the critic's answers."""
        return f"seed {self.seed}" + (f" · {self.verdict}" if self.verdict else "")


@dataclass(frozen=True)
class Turn:
    """One edit: the PNG file of the picture before it, the instruction, and a result for each seed."""

    before: str
    instruction: str
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Session:
    """The turns, oldest first; the number of the turn that is shown, and of its result that is shown."""

    turns: tuple[Turn, ...] = ()
    turn: int = 0
    result: int = 0

    @property
    def shown(self) -> tuple[Turn, Result] | None:
        """The turn and the result that are shown; None if there is no edit yet."""
        if not self.turns:
            return None
        turn = self.turns[self.turn]
        return turn, turn.results[self.result]

    def with_turn(self, turn: Turn) -> Self:
        """The session after one more edit, which is shown."""
        turns = (*self.turns, turn)[-MOST_TURNS:]
        return replace(self, turns=turns, turn=len(turns) - 1, result=0)

    def without_last_turn(self) -> Self:
        """The session before its last edit; the edit before it is shown."""
        turns = self.turns[:-1]
        return replace(self, turns=turns, turn=max(0, len(turns) - 1), result=0)

    def showing(self, turn: int, result: int) -> Self:
        """The session with another turn and result shown; unchanged if there are none of these numbers."""
        if 0 <= turn < len(self.turns) and 0 <= result < len(self.turns[turn].results):
            return replace(self, turn=turn, result=result)
        return self
