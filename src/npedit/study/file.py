"""The content of a study's file: a recipe, variants of it, critics, and tables with claims. `study.py` runs a study."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from npedit.errors import UserError, did_you_mean
from npedit.recipe.config import EMBEDDED, Recipe, Settings, load_recipe, make_recipe, validate_settings
from npedit.recipe.yaml_file import parse_yaml

CLAIM_PATTERN = re.compile(r"^(\S+) (>|~) (\S+)$")
QUICK_FACTOR = 25  # how many times shorter a quick study is


class Variant(Settings):
    """One line of a study: what it changes."""

    recipe: str = ""  # another recipe than the study's
    set: list[str] = []  # KEY=VALUE, after the study's own
    of: str = ""  # not trained: uses the runs of this variant, for example with another number of steps
    start: str = ""  # an earlier variant; training starts from its finished run of the same seed
    critic: str = ""  # a name in `critics`; "" is the recipe's critic
    steps: int = Field(0, ge=0, le=64)  # of the editor when it is scored; 0: as trained
    seeds: list[int] = []  # in place of the study's
    words: str = ""  # a description for the tables


class CriticVariant(Settings):
    """A critic that is trained for so many batches, or an ensemble of others ("embedded" is one of them)."""

    batches: int = Field(0, ge=0)
    members: list[str] = []

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if bool(self.batches) == bool(self.members):
            raise ValueError("expected a critic with batches (trained) or members (an ensemble); give one of them")
        return self


class Claim(Settings):
    """One comparison of two rows. In a study's file also the test alone."""

    test: str  # "a > b": a is better; "a ~ b": they differ by less than 0.1
    says: str = ""  # the paper's claim, in words; such comparisons are the lines of the claim table

    @model_validator(mode="before")
    @classmethod
    def _accept_test_alone(cls, value: Any) -> Any:
        return {"test": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if not CLAIM_PATTERN.match(self.test):
            raise ValueError(f"expected a claim such as 'full > dmd_only'; got {self.test!r}")
        return self

    def parts(self) -> tuple[str, str, str]:
        """(first row, sign, second row)."""
        first, sign, second = self.test.split()
        return first, sign, second


class Table(Settings):
    """One table: the variants in its rows, and claims about them."""

    title: str
    words: str = ""
    rows: list[str]
    claims: list[Claim] = []
    by_critic: bool = False  # draw `both` over the share of questions that each row's critic answers right


class Search(Settings):
    """A search over settings of one recipe in three stages (`search.py`). Its name can be a row: the best
    configuration."""

    recipe: str = ""  # of all configurations; another recipe than the study's
    start: str = ""  # a variant; training starts from its finished run of the same seed
    budget: str  # a trained variant: no configuration makes more generator passes or critic passes than it does
    set: list[str] = []  # KEY=VALUE of all configurations, after the study's own
    configurations: dict[str, list[str]] = Field(min_length=2)  # KEY=VALUE, after `set`
    short: float = Field(0.25, gt=0, le=1)  # part of the budget that every configuration gets at first
    keep: int = Field(3, ge=1)  # configurations that then get the whole budget
    seeds: list[int] = Field([0, 1, 2], min_length=1)  # of the best; the others are trained with the first only
    row: str = ""  # a description of the best configuration for the tables
    words: str = ""  # text at the top of the search's section


class Study(Settings):
    """A whole study file."""

    name: str
    words: str = ""  # text at the top of the results page
    recipe: str
    set: list[str] = []
    seeds: list[int] = Field([0], min_length=1)
    items: int = Field(450, ge=9)
    critics: dict[str, CriticVariant] = {}
    variants: dict[str, Variant]
    search: dict[str, Search] = {}
    tables: list[Table]

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        """Refuse tables, claims and variants that name a row that is not there."""
        named = [(r, f"table {t.title!r}") for t in self.tables for r in t.rows]
        named += [(v.of, f"variant {k!r}") for k, v in self.variants.items() if v.of]
        for table in self.tables:
            named += [(name, f"claim {c.test!r}") for c in table.claims for name in c.parts()[::2]]
        rows = [*self.variants, *self.search]
        for name, place in named:
            if name not in rows:
                raise ValueError(f"{place} names {name!r}, which is no variant.{did_you_mean(name, rows)}")
        return self

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        """Refuse critics, starts and searches that name a critic or a variant that is not there."""
        taught = [EMBEDDED, *(k for k, c in self.critics.items() if c.batches)]
        asked = [(m, taught, f"critic {k!r}") for k, c in self.critics.items() for m in c.members]
        asked += [(v.critic, list(self.critics), f"variant {k!r}") for k, v in self.variants.items() if v.critic]
        trained: list[str] = []
        for name, variant in self.variants.items():
            asked += [(variant.start, list(trained), f"start of variant {name!r}")] if variant.start else []
            trained += [] if variant.of else [name]
        asked += [(n, trained, f"search {k!r}") for k, s in self.search.items() for n in (s.start, s.budget) if n]
        for name, known, place in asked:
            if name not in known:
                raise ValueError(
                    f"{place}: expected one of {', '.join(known)}; got {name!r}.{did_you_mean(name, known)}"
                )
        return self

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        """Refuse variants whose keys contradict each other."""
        for name, variant in self.variants.items():
            own = variant.set or variant.recipe or variant.start or variant.critic or variant.seeds
            if "." in name and not is_configuration(self, name):
                raise ValueError(f"expected names of variants without dots; got {name!r}")
            if variant.of and (own or self.variants[variant.of].of):
                raise ValueError(
                    f"variant {name!r} uses another's runs, so it has no recipe, set, start, critic or seeds"
                )
            if variant.start and not set(self.seeds_of(name)) <= set(self.seeds_of(variant.start)):
                there = f"{variant.start!r}: expected seeds among {self.seeds_of(variant.start)}"
                raise ValueError(f"variant {name!r} starts from {there}; got {self.seeds_of(name)}")
        return self

    @model_validator(mode="after")
    def _check_search_seeds(self) -> Self:
        """Refuse searches with a seed that their start is not trained with."""
        for name, search in self.search.items():
            there = self.seeds_of(search.start) if search.start else search.seeds
            if not set(search.seeds) <= set(there):
                raise ValueError(
                    f"search {name!r} starts from {search.start!r}: expected seeds among {there}; got {search.seeds}"
                )
        return self

    def seeds_of(self, name: str) -> list[int]:
        """The seeds that a variant is trained with."""
        variant = self.variants[name]
        return self.variants[variant.of or name].seeds or self.seeds


def load_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: it cannot be read, or a line of it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a study's YAML file; got {path}: {error}; correct it") from None
    return validate_settings(Study, parse_yaml(text, str(path)), "")


def quick_study(study: Study) -> Study:
    """A short form of a study, to check that every part works: one seed for each variant, a tenth of the items, critics
    with a 25th of their batches. `variant_recipe` shortens the recipes."""
    critics = {
        k: c.model_copy(update={"batches": max(1, c.batches // QUICK_FACTOR) if c.batches else 0})
        for k, c in study.critics.items()
    }
    return study.model_copy(
        update={
            "name": f"{study.name}-quick",
            "words": f"A quick study: 1/{QUICK_FACTOR} of the updates and of the critics' batches, whatever a row's "
            "description says. It shows that every part runs. It is too short to decide any claim.",
            "seeds": study.seeds[:1],
            "items": max(9, study.items // 10),
            "critics": critics,
            "variants": {k: v.model_copy(update={"seeds": []}) for k, v in study.variants.items()},
            "search": {k: s.model_copy(update={"seeds": study.seeds[:1]}) for k, s in study.search.items()},
        }
    )


def variant_recipe(
    study: Study, name: str, seed: int, find: Callable[[str], Path], folder: Path, quick: bool = False
) -> Recipe:
    """The recipe of a variant for one seed; `find` turns a recipe's name into its file, and `folder` is the study's.
    `quick`: a 25th of the updates, evaluated on a 25th of the items."""
    variant = study.variants[name]
    path = find(variant.recipe or study.recipe)
    lines = [*study.set, *variant.set, f"seed={seed}", f"name={study.name}-{name}-{seed}"]
    if variant.start:
        lines += [f"start={json.dumps(str(folder / f'{variant.start}-{seed}'))}"]
    if variant.critic:
        weights = critic_weights(study, variant.critic, folder)
        lines += ["critic.name=ensemble"] if study.critics[variant.critic].members else []
        lines += [f"critic.weights={json.dumps(weights)}"]
    recipe = load_recipe(path, lines)
    if not quick:
        return recipe
    whole = recipe.as_dict()
    whole["trainer"]["evaluate_items"] = max(1, whole["trainer"]["evaluate_items"] // QUICK_FACTOR)
    return make_recipe(
        {**whole, "stages": [{**s, "updates": max(1, s["updates"] // QUICK_FACTOR)} for s in whole["stages"]]}
    )


def is_configuration(study: Study, variant: str) -> bool:
    """Whether a variant is a configuration of one of the study's searches."""
    search, dot, _ = variant.partition(".")
    return bool(dot) and search in study.search


def critic_weights(study: Study, critic: str, folder: Path) -> str:
    """The path of one of the study's critics, for a recipe. The path contains the critic's settings: after a change of
    these, runs with the old critic do not match the recipe any more and are refused."""
    if critic == EMBEDDED:
        return EMBEDDED
    members = study.critics[critic].members
    one = lambda name: f"{name}-{study.critics[name].batches}" if name in study.critics else name  # noqa: E731
    return str(folder / "critics" / (f"{'+'.join(map(one, members))}.yaml" if members else f"{one(critic)}/critic"))
