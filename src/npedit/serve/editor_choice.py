"""Which editor a request of the HTTP interface names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npedit.errors import UserError
from npedit.provenance import editor_name
from npedit.serve.limits import BadRequest
from npedit.serve.runs import Runs


@dataclass(frozen=True)
class EditorChoice:
    """The editors of a server: the one of its start (`name`, in the metadata of results `editor`), and those of `runs`,
    if it serves a folder of runs."""

    name: str
    editor: str
    runs: Runs | None = None

    def names(self) -> list[str]:
        """What requests may name."""
        return [name for _, name in self.runs.choices()] if self.runs else [self.name]

    def describe(self) -> dict[str, Any]:
        """The names, as OpenAI's clients ask for them."""
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "npedit"} for n in self.names()]}

    def find(self, name: str, param: str) -> tuple[str, str]:
        """The `run` of an `EditRequest`, and the editor's name in the metadata of its result, for the name in the field
        `param` of a request. "" names the editor of the server's start.

        Raises:
            BadRequest: there is none of this name (status 404; the message has the names).
        """
        if not name or (name == self.name and self.runs is None):
            return "", self.editor
        if self.runs is None:
            raise BadRequest(f"expected {self.name!r}, the only editor here; got {name[:80]!r}", param, 404)
        try:
            return name, editor_name(name, self.runs.find(name))
        except UserError as error:
            raise BadRequest(str(error), param, 404) from None
