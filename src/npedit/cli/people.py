"""`npedit compare --people A B`: a page on which people compare two editors blindly, and what their answers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.listening import require_page_packages
from npedit.cli.local_page import run_page
from npedit.errors import UserError
from npedit.scoring.tables import rich_table

if TYPE_CHECKING:
    from npedit.scoring.results import Results

AnswersOption = Annotated[Path, typer.Option("--answers", help="With --people A B: the file of people's answers.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="With --people A B or --page: the evaluated data, if the results do not name their place."
    ),
]


def rate_results(
    folders: Sequence[Path], results: Sequence[Results], data: Path | None, answers: Path, port: int, seed: int
) -> dict[str, Any]:
    """Open the page until Ctrl-C, then print and return what people say ({} before the first answer).

    Raises:
        UserError: other than two folders, or folders without pictures.
    """
    if len(folders) != 2:
        raise UserError(f"--people: expected two folders of results; got {len(folders)}; compare two editors at a time")
    require_page_packages()
    from npedit.runs.files import read_rows
    from npedit.serve.people import Comparison, answers_about, hold_answers, preferences, summarise
    from npedit.serve.people_page import make_people_app
    from npedit.serve.people_pairs import read_pairs

    names = results[0].name, results[1].name
    pairs, missing = read_pairs(folders, results, data)
    if missing:
        out.print(f"[yellow]note[/] {missing} items lack a picture in one of the results and are left out")
    with hold_answers(answers):
        words = f"Comparing {len(pairs)} items, answers in {answers},"
        comparison = Comparison(names, pairs, answers, seed)
        print_ignored(comparison.ignored, answers)
        run_page(make_people_app(comparison), port, words)
        rows, _ = answers_about(read_rows(answers), pairs, names)
    if not preferences(rows, names):
        return {}
    found = summarise(results, rows, seed)
    print_summary(found)
    return found


def read_answers(
    folders: Sequence[Path], results: Sequence[Results], data: Path | None, answers: Path, seed: int
) -> dict[str, Any]:
    """What the answers in a file say about two editors, which is printed too.

    Raises:
        UserError: other than two editors, pictures that are not there, or no answer about them.
    """
    from npedit.runs.files import read_rows
    from npedit.serve.people import answers_about, summarise
    from npedit.serve.people_pairs import read_pairs

    if len(results) != 2:
        raise UserError(
            f"--people: expected two folders of results with the answers of {answers}; got {len(results)}; compare the "
            "two that people have seen"
        )
    pairs, _ = read_pairs(folders, results, data)
    rows, ignored = answers_about(read_rows(answers), pairs, (results[0].name, results[1].name))
    print_ignored(ignored, answers)
    found = summarise(results, rows, seed)
    print_summary(found)
    return found


def print_ignored(count: int, answers: Path) -> None:
    """Say how many answers do not count."""
    if count:
        out.print(
            f"[yellow]note[/] {count} answers in {escape(str(answers))} are ignored: they are about other pictures of "
            "editors with these names"
        )


def print_summary(found: Mapping[str, Any]) -> None:
    """Print the win rate, and how well each metric agrees with people."""
    from npedit.report.comparison import preference_sentence, preference_table

    out.print(escape(preference_sentence(found)))
    if found["left_share"] is not None:
        out.print(f"The left result was preferred in {found['left_share']:.1%} of the answers that are no tie.")
    out.print(rich_table(preference_table(found)))
