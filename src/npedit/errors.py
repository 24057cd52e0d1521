"""The one error meant for users, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message says what was expected, what came, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option most like `name`, or "" if none is like it."""
    found = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
