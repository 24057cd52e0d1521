"""Check a recipe before training: open its data and models as training does, and run the sections of the report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection

from npedit.check.base import check_base
from npedit.check.cost import check_cost
from npedit.check.critic import check_critic
from npedit.check.data import check_data
from npedit.check.findings import CheckReport, Section
from npedit.check.gradient import check_gradient
from npedit.check.subject import CheckOptions, Subject, read_examples
from npedit.errors import UserError, did_you_mean
from npedit.nets.device import device_name
from npedit.recipe.config import Recipe, find_class
from npedit.runs.start import resolve_start
from npedit.training.out_of_memory import failed_part, is_out_of_memory
from npedit.training.parts import build_parts, build_source, check_data_fits, check_recipe_fits

SECTIONS: dict[str, Callable[[Subject], Section]] = {
    "data": check_data,
    "critic": check_critic,
    "gradient": check_gradient,
    "base": check_base,
    "cost": check_cost,
}
TRAINING_SECTIONS = ("gradient", "cost")  # that run updates of the recipe's stages


def check_recipe(
    recipe: Recipe,
    options: CheckOptions = CheckOptions(),
    only: Collection[str] = (),
    report_progress: Callable[[str], None] = lambda line: None,
) -> CheckReport:
    """The report of a recipe. `only` names the sections to run, () all. `report_progress` gets a line for each.

    Raises:
        UserError: data or models cannot be opened or do not fit together; an unknown section.
    """
    for name in only:
        if name not in SECTIONS:
            known, hint = ", ".join(SECTIONS), did_you_mean(name, SECTIONS)
            raise UserError(f"--only: expected one of {known}; got {name!r}; correct it.{hint}")
    recipe = recipe.model_copy(update={"judge": None})  # it takes no part in training
    report_progress("Opening data and models")
    if recipe.start:
        resolve_start(recipe.start)
    data = build_source(recipe)
    check_data_fits(recipe, data)
    parts = build_parts(recipe)
    check_recipe_fits(recipe, data, parts)
    subject = Subject(recipe, data, parts, options, read_examples(data, options.samples))
    if not subject.examples:
        raise UserError("data: expected at least one example that is no 'do nothing' edit; got none; add rows")
    sections = []
    for name in SECTIONS:
        if not only or name in only:
            report_progress(f"Checking: {name}")
            began = time.monotonic()
            sections.append(run_section(name, subject))
            sections[-1].seconds = time.monotonic() - began
            gc.collect()  # what a section that failed for want of memory still holds
    return CheckReport(recipe.name, tuple(sections))


def why_not_trained(name: str, subject: Subject) -> Section | None:
    """The section of this name without results, where no update of the recipe can be run here; else None."""
    section = Section(name, name.capitalize())
    if subject.recipe.trainer.shard != "none":
        section.add(
            "sharded", "note", f"trainer.shard is {subject.recipe.trainer.shard}: the recipe is for several processes, "
            "and npedit check runs one, with whole models and whole batches.", "This section was left out.",
            "Run npedit rehearse on the machines that will train: it measures time and memory in all processes.",
        )  # fmt: skip
        return section
    for stage in subject.recipe.stages:
        try:
            find_class("steps", stage.step).check_parts(stage.settings, subject.parts)
        except UserError as error:
            section.add("stage-refused", "will not learn", f"{stage.step}: {error}",
                        "Training refuses this recipe, so no update can be run here.")  # fmt: skip
            return section
    return None


def run_section(name: str, subject: Subject) -> Section:
    """The section of this name. Memory that is exhausted becomes its finding, so that the other sections are reported.

    Raises:
        UserError: bad input, such as labelled edits that cannot be read.
    """
    if name in TRAINING_SECTIONS and (refusal := why_not_trained(name, subject)):
        return refusal
    try:
        return SECTIONS[name](subject)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        section = Section(name, name.capitalize())
        section.add(
            "section-out-of-memory", "warning", f"The memory of {device_name(subject.parts.device)} was exhausted"
            f"{failed_part(error)}: {str(error).splitlines()[0] if str(error) else 'no more is known'}",
            "This section has no results. Whether the recipe can train here is measured by the section cost.",
            "Save memory as docs/one-gpu.md says, or check on a device with more memory.",
        )  # fmt: skip
        return section
