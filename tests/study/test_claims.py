"""Claims: each is decided by the interval of the difference, over scenes and seeds; the table that README quotes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from npedit.errors import UserError
from npedit.recipe.config import validate_settings
from npedit.scoring.seed_intervals import NO_SPREAD, SeedSpread
from npedit.study import claims
from npedit.study.file import Claim, Study
from npedit.study.page import add_seed_intervals


def row(name: str, n: int, *hits: int) -> dict:
    """A row of as many seeds as hits; which items are right is drawn at random."""
    drawn = random.Random(name)
    outcomes = ["".join(drawn.sample("1" * h + "0" * (n - h), n)) for h in hits]
    return {"outcomes": outcomes, "runs": [f"{name}-{i}" for i in range(len(hits))], "both": {}}


def judge(test: str, spread: SeedSpread = NO_SPREAD, **rows: dict) -> claims.Verdict:
    return claims.judge_claim(study_of(**{name: {} for name in rows}), Claim(test=test), rows, spread)


def study_of(**variants: dict) -> Study:
    seeds = {name: {"seeds": [0]} | keys if not keys.get("of") else keys for name, keys in variants.items()}
    return validate_settings(Study, {"name": "s", "recipe": "demo", "items": 900, "variants": seeds, "tables": []}, "")


@pytest.mark.parametrize(
    ("claim", "a", "b", "word"),
    [
        ("a > b", 60, 30, "holds"),
        ("a > b", 30, 60, "fails"),
        ("a > b", 50, 48, "undecided"),
        ("a ~ b", 50, 51, "undecided"),
        ("a ~ b", 80, 20, "fails"),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_the_difference(claim: str, a: int, b: int, word: str):
    found = judge(claim, a=row("a", 100, a), b=row("b", 100, b))
    assert found.word == word and found.difference == pytest.approx((a - b) / 100)
    assert found.ci95[0] < found.difference < found.ci95[1]


def test_equality_holds_only_with_the_whole_interval_within_a_tenth():
    assert judge("a ~ b", a=row("a", 1000, 500), b=row("b", 1000, 505)).word == "holds"


def test_a_row_that_was_not_run_is_named():
    found = judge("a > c", a=row("a", 100, 50))
    assert found.word == "not run" and found.numbers() == "c"


def test_variation_between_seeds_widens_a_claims_interval():
    rows = {"a": row("a", 900, 470, 480, 490), "b": row("b", 900, 420)}
    spread = SeedSpread(0.04**2, 0.04**2, 8)
    assert judge("a > b", **rows).word == "holds" and judge("a > b", spread, **rows).word == "undecided"
    same = {"a": rows["a"], "c": dict(rows["a"])}  # the same runs, so their seeds are paired
    assert judge("a ~ c", spread, **same).ci95 == (0.0, 0.0)


def test_rows_that_started_from_the_same_runs_are_paired_by_seed():
    """Every seed of `later` gains 36 of 900 over the run that it started from; the starts vary by much more."""
    few = row("few", 900, 400, 450, 500)
    later = {"outcomes": [o.replace("0", "1", 36) for o in few["outcomes"]], "runs": [f"later-{i}" for i in range(3)]}
    other = row("other", 900, 436, 486, 536)
    rows, spread = {"few": few, "later": later, "other": other, "twice": later}, SeedSpread(0.03**2, 0.03**2, 8)
    seeds = {"seeds": [0, 1, 2]}
    made = study_of(few=seeds, later=seeds | {"start": "few"}, other=seeds, twice={"of": "later"})
    found = {t: claims.judge_claim(made, Claim(test=t), rows, spread) for t in ("later > few", "other > few")}
    assert found["later > few"].word == "holds" and found["other > few"].word == "undecided"
    low, high = found["later > few"].ci95
    assert low == pytest.approx(0.04, abs=0.015) and high == pytest.approx(0.04, abs=0.015)
    assert claims.are_paired(made, rows, "twice", "few") and not claims.are_paired(made, rows, "later", "other")
    one = {name: {"runs": [f"{name}-0"]} for name in rows}  # a single pair does not show how pairs vary
    assert not claims.are_paired(made, one, "later", "few")
    assert not claims.are_paired(made, rows | {"few": {"runs": ["few-0", "few-1"]}}, "later", "few")


def test_a_claim_says_which_rows_lack_seeds():
    made = study_of(a={"seeds": [0, 1]}, b={})
    found = claims.judge_claim(made, Claim(test="a > b"), {"a": row("a", 900, 500), "b": row("b", 900, 400)}, NO_SPREAD)
    assert found.partial == ("a",) and found.numbers().endswith("; some seeds of a are missing")


def test_the_row_of_a_search_counts_as_runs_of_its_own_and_a_row_of_other_steps_does_not():
    rows = {"few": row("few", 900, 400, 450), "best": row("x", 900, 400, 450), "steps": row("few", 900, 300, 600)}
    made = study_of(few={}, x={}, best={"of": "x"}, steps={"of": "few"})  # x is a configuration, and so no row
    assert claims.rows_with_own_runs(made, rows) == ["few", "best"]
    assert claims.study_spread(made, rows).freedom == 2


def test_the_same_scenes_right_in_both_rows_narrow_the_interval():
    a = row("a", 900, 500)
    b = {"outcomes": [a["outcomes"][0].replace("1", "0", 30)], "runs": ["b-0"], "both": {}}
    paired, apart = judge("a > b", a=a, b=b).ci95, judge("a > b", a=a, b=row("b", 900, 470)).ci95
    assert paired[0] > 0 > apart[0] and paired[1] - paired[0] < 0.4 * (apart[1] - apart[0])


def make_study() -> Study:
    tables = [{"title": "t", "rows": ["a", "b"], "claims": [{"test": "a > b", "says": "A is better"}, "a ~ b"]}]
    made = {"name": "s", "recipe": "demo", "items": 90, "variants": {"a": {}, "b": {}}, "tables": tables}
    return validate_settings(Study, made, "")


def test_rows_get_intervals_over_scenes_and_seeds():
    scores = {"a": row("a", 90, 30, 60), "b": row("b", 90, 40)}
    spread = claims.study_spread(make_study(), scores)
    assert spread.freedom == 1 and spread.observed == pytest.approx(1 / 18)
    wide = add_seed_intervals(make_study(), scores, spread)["a"]["both"]
    narrow = add_seed_intervals(make_study(), scores, NO_SPREAD)["a"]["both"]
    assert wide["value"] == pytest.approx(0.5) and wide["ci95"][0] < narrow["ci95"][0] < 0.5 < narrow["ci95"][1]


def test_readme_quotes_the_claims_with_words_and_nothing_else(tmp_path):
    verdicts = claims.judge_all(make_study(), {"a": row("a", 90, 60), "b": row("b", 90, 30)})
    claims.write_claims(verdicts, tmp_path)
    page = tmp_path / "README.md"
    page.write_text("before\n")
    with pytest.raises(UserError, match="a page without; add them"):
        claims.quote_claims(page, tmp_path / claims.CLAIMS_FILE)
    page.write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    claims.quote_claims(page, tmp_path / claims.CLAIMS_FILE)
    quoted = page.read_text()
    table = "\n".join(claims.claim_table(verdicts))
    assert quoted == f"before\n{claims.BEGIN}\n\n{table}\n\n{claims.END}\nafter\n"
    assert (
        claims.claim_table([replace(verdicts[1], claim=Claim(test="a ~ b", says="x"))])[-1].count("(within 0.1)") == 1
    )
    assert "| A is better | **holds** | `a > b` | +0.333 [" in table and "a ~ b" not in table
    assert [v["verdict"] for v in json.loads((tmp_path / claims.CLAIMS_FILE).read_text())][0] == "holds"


def test_readme_has_the_claims_of_the_published_study_once_they_are_there(tmp_path):
    """docs/results/claims.json is written by `npedit study --publish`, README by `--quote`."""
    root = Path(__file__).parents[2]
    published, readme = root / "docs" / "results" / claims.CLAIMS_FILE, root / "README.md"
    if not published.exists():
        assert claims.BEGIN not in readme.read_text()
        return
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    claims.quote_claims(copy, published)
    assert copy.read_text() == readme.read_text()
