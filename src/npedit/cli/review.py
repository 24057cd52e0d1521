"""`npedit prepare --review SET`: a page on which a person accepts, mends or rejects the rows of a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from npedit.cli.listening import require_page_packages
from npedit.cli.local_page import run_page
from npedit.errors import UserError

out = Console(highlight=False, soft_wrap=True)


def run_review(words: Sequence[str], others: Sequence[str], port: int) -> None:
    """Open the page until Ctrl-C, and print how far the review is. `words` are the set's folder; `others` are options
    that do not go with it.

    Raises:
        UserError: other options are given, or the folder cannot be reviewed.
    """
    if len(words) != 1 or others:
        raise UserError(
            f"--review: expected one set and no other options; got {len(words)} and {', '.join(others) or 'none'}; "
            "npedit prepare --review set"
        )
    require_page_packages()
    from npedit.serve.review_page import make_review_app
    from npedit.serve.review_set import describe_progress, open_review

    with open_review(Path(words[0])) as review:
        run_page(make_review_app(review), port, f"Reviewing {words[0]}")
        out.print(escape(f"{describe_progress(review.counts())}. Go on with the same command."))
