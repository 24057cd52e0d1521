"""The claims of a study, tested against intervals, and the table that says which claims of the paper hold.

A claim "a > b" holds if the whole 95 % interval of the difference of the success rates is above zero, fails if it is
below, and is undecided otherwise. "a ~ b" holds if the interval lies within a tenth of zero, fails if it lies outside.
The intervals cover the choice of items and the training seeds together (`scoring/seed_intervals.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npedit.errors import UserError
from npedit.runs.checkpoint import write_text
from npedit.scoring.seed_intervals import SeedSpread, difference_interval, pool_seed_spread
from npedit.scoring.tables import markdown_table
from npedit.study.file import Claim, Study
from npedit.toy.edits import EDIT_TYPES

Score = Mapping[str, Any]
LEVEL = 0.1  # rows that differ by less are level
CLAIMS_FILE = "claims.json"
BEGIN, END = "<!-- claims of the study: begin -->", "<!-- claims of the study: end -->"


@dataclass(frozen=True)
class Verdict:
    """A claim with its verdict: "holds", "fails", "undecided" or "not run". `missing` are rows that were not run,
    `partial` rows of which not all seeds were."""

    claim: Claim
    word: str
    difference: float = 0.0
    ci95: tuple[float, float] = (0.0, 0.0)
    missing: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()

    def numbers(self) -> str:
        """The difference with its interval, or which rows were not run."""
        if self.missing:
            return ", ".join(self.missing)
        found = f"difference {self.difference:+.3f} [{self.ci95[0]:+.3f}, {self.ci95[1]:+.3f}]"
        return found + (f"; some seeds of {', '.join(self.partial)} are missing" if self.partial else "")

    def facts(self) -> dict[str, Any]:
        """The verdict for JSON."""
        found = {"says": self.claim.says, "test": self.claim.test, "verdict": self.word}
        numbers = {"difference": self.difference, "ci95": list(self.ci95), "partial": list(self.partial)}
        return found | ({} if self.missing else numbers)


def outcome_matrix(score: Score) -> np.ndarray:
    """The outcomes of a row, (seeds, items) of 0 and 1."""
    return np.array([[float(c) for c in outcomes] for outcomes in score["outcomes"]])


def item_types(n: int) -> list[str]:
    """The edit types of a study's items, which take turns."""
    return [EDIT_TYPES[i % len(EDIT_TYPES)] for i in range(n)]


def rows_with_own_runs(study: Study, scores: Mapping[str, Score]) -> list[str]:
    """The rows without those that use the runs of another row."""
    return [name for name in scores if study.variants[name].of not in scores]


def study_spread(study: Study, scores: Mapping[str, Score]) -> SeedSpread:
    """The variance from seed to seed, pooled over the rows that have several seeds. Rows that use another's runs are
    left out."""
    rows = [outcome_matrix(scores[name]) for name in rows_with_own_runs(study, scores)]
    return pool_seed_spread(rows, item_types(study.items))


def are_paired(study: Study, scores: Mapping[str, Score], first: str, second: str) -> bool:
    """Whether each seed's runs in two rows are related: they are the same run, one was trained from the other, or both
    were trained from the same run. One seed alone does not show how much such a pair varies."""
    a, b = ([run.rsplit("-", 1)[1] for run in scores[name]["runs"]] for name in (first, second))
    is_related = bool(_lineage(study, first) & _lineage(study, second))
    return scores[first]["runs"] == scores[second]["runs"] or (is_related and a == b and len(a) > 1)


def _lineage(study: Study, name: str) -> set[str]:
    """The trained variants behind a row: its own, the one that it started from, and so on."""
    found, name = set(), study.variants[name].of or name
    while name:
        found.add(name)
        name = study.variants[name].start
    return found


def judge_claim(study: Study, claim: Claim, scores: Mapping[str, Score], spread: SeedSpread) -> Verdict:
    """The verdict on one claim."""
    first, sign, second = claim.parts()
    if missing := tuple(name for name in (first, second) if name not in scores):
        return Verdict(claim, "not run", missing=missing)
    outcomes = outcome_matrix(scores[first]), outcome_matrix(scores[second])
    types = item_types(outcomes[0].shape[1])
    d, low, high = difference_interval(*outcomes, types, spread, are_paired(study, scores, first, second))
    if sign == ">":
        word = "holds" if low > 0 else "fails" if high < 0 else "undecided"
    else:
        is_level, is_apart = low > -LEVEL and high < LEVEL, low > LEVEL or high < -LEVEL
        word = "holds" if is_level else "fails" if is_apart else "undecided"
    partial = [name for name in (first, second) if len(scores[name]["runs"]) < len(study.seeds_of(name))]
    return Verdict(claim, word, d, (low, high), partial=tuple(partial))


def judge_all(study: Study, scores: Mapping[str, Score]) -> list[Verdict]:
    """The verdicts on all claims of a study, in the order of its tables."""
    spread = study_spread(study, scores)
    return [judge_claim(study, claim, scores, spread) for table in study.tables for claim in table.claims]


def claim_table(verdicts: Sequence[Verdict]) -> list[str]:
    """The lines of the table of the paper's claims: those with words."""
    rows = []
    for verdict in verdicts:
        if verdict.claim.says:
            numbers = "" if verdict.missing else verdict.numbers().removeprefix("difference ")
            test = f"`{verdict.claim.test}`" + (f" (within {LEVEL:g})" if "~" in verdict.claim.test else "")
            rows.append([verdict.claim.says, f"**{verdict.word}**", test, numbers])
    return markdown_table(["the paper's claim", "on the toy", "rows compared", "difference of the success rate"], rows)


def write_claims(verdicts: Sequence[Verdict], folder: Path) -> None:
    """Write all verdicts into `claims.json`."""
    write_text(folder / CLAIMS_FILE, json.dumps([v.facts() for v in verdicts], indent=1) + "\n")


def read_quoting_page(page: Path) -> tuple[str, str]:
    """The text before the line `BEGIN` and the text after the line `END` of a page.

    Raises:
        UserError: the page cannot be read, or does not have the two lines.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"expected a page to quote the claims in; got {page}: {error}; correct its name") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"expected the lines {BEGIN} and {END} in {page}; got a page without; add them")
    return before, after


def quote_claims(page: Path, claims: Path) -> None:
    """Write the claim table of a `claims.json` into another page, between the lines `BEGIN` and `END`.

    Raises:
        UserError: the page does not have the two lines, or a file cannot be read.
    """
    before, after = read_quoting_page(page)
    try:
        found = json.loads(claims.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected a study's {CLAIMS_FILE}; got {claims}: {error}; run the study again") from None
    table = "\n".join(claim_table([_read_verdict(facts) for facts in found]))
    write_text(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def _read_verdict(facts: Mapping[str, Any]) -> Verdict:
    claim = Claim(test=facts["test"], says=facts["says"])
    if "ci95" not in facts:
        return Verdict(claim, facts["verdict"], missing=claim.parts()[::2])
    partial = tuple(facts.get("partial", ()))
    return Verdict(claim, facts["verdict"], facts["difference"], tuple(facts["ci95"]), partial=partial)
