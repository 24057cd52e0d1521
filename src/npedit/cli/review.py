"""`npedit review`: a page on which a person accepts, mends or rejects the rows of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.listening import require_page_packages
from npedit.cli.local_page import PagePortOption, run_page


def review(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="The folder of a set.")], port: PagePortOption = 7861
) -> None:
    """Open a page on which a person accepts, mends or rejects the rows of a set. Ctrl-C ends, the same command resumes.

    npedit review set/
    """
    require_page_packages()
    from npedit.serve.review_page import make_review_app
    from npedit.serve.review_set import describe_progress, open_review

    with open_review(folder) as rows:
        run_page(make_review_app(rows), port, f"Reviewing {folder}")
        out.print(escape(f"{describe_progress(rows.counts())}. Go on with the same command."))
