"""The gradient section: does a right gradient reach the student's weights, how do critic and DMD compare, and does the
learning rate break the student?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npedit.check.findings import Section
from npedit.check.finite_differences import GradientCheck, check_question
from npedit.check.subject import Subject
from npedit.check.trial import build_step, run_update
from npedit.data import Batch, Example, collate
from npedit.generator import sample_noise, seeded_generator
from npedit.nets.master_weights import master_weight, set_weight
from npedit.questions import questions_for
from npedit.recipe.config import Stage
from npedit.training.gradient_ratio import HIGHEST, LOWEST

MOST_TYPES = 4  # edit types whose questions are differentiated
TOLERANCE = {"float32": 0.1}  # relative error of a gradient, by the number type of the recipe
ROUGH_TOLERANCE = 0.5  # for types with fewer bits, where rounding is a large part of a small change
BREAKS, LARGE = 1.0, 0.5  # relative change of the student's output by one update
LOOKED_AT = 4  # items whose output is compared


def check_gradient(subject: Subject) -> Section:
    """The gradient section of the report."""
    section, stage = Section("gradient", "Gradient"), subject.editing_stage
    student = subject.student()
    if stage is None or subject.parts.critic is None:
        section.add("no-critic", "note", "No stage of the recipe takes a gradient from a critic.")
    else:
        report_gradients(section, subject, stage, student)
        report_balance(section, subject, stage, student)
    for trained in subject.recipe.stages:
        report_learning_rate(section, subject, trained, student)
    return section


# ------------------------------------------------------------------------------------------------ finite differences


def report_gradients(section: Section, subject: Subject, stage: Stage, student: nn.Module) -> None:
    """Compare the gradient of each question of some examples with finite differences."""
    found = []
    for example in _one_of_each_type(subject.examples):
        for question in questions_for(example.edit_type, example.instruction, example.object, subject.parts.wording):
            found.append(
                check_question(subject.parts, student, example, question, subject.recipe.trainer.steps,
                               subject.recipe.seed)
            )  # fmt: skip
    rows = [(c.example.edit_type, c.question.kind, len(c.question.looks_at), c.norm, c.error) for c in found]
    head = ("edit type", "question", "pictures", "norm of d margin / d weights", "relative error")
    section.add_table("Gradient of each answer with respect to the student's weights", head, rows)
    _judge_gradients(section, found, subject.recipe.family.dtype)


def _one_of_each_type(examples: Sequence[Example]) -> list[Example]:
    """The first example of each edit type, removal first, as its question is another."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.edit_type, example)
    kinds = sorted(first, key=lambda kind: (kind != "remove", kind))
    return [first[kind] for kind in kinds[:MOST_TYPES]]


def _judge_gradients(section: Section, found: Sequence[GradientCheck], dtype: str) -> None:
    broken = [c for c in found if not math.isfinite(c.norm)]
    zero = [c for c in found if c.norm == 0]
    tolerance = TOLERANCE.get(dtype, ROUGH_TOLERANCE)
    wrong = [c for c in found if c.error is not None and not c.error <= tolerance]
    if broken:
        section.add("gradient-not-finite", "will not learn", f"{len(broken)} of {len(found)} gradients are not finite.",
                    "Such updates are skipped.", "Use dtype float32 or bfloat16 for family, VAE and critic."
                    )  # fmt: skip
    if zero:
        section.add("gradient-zero", "will not learn" if len(zero) == len(found) else "warning",
                    f"{len(zero)} of {len(found)} gradients are zero.",
                    "These questions teach the student nothing.",
                    "Critic and decoder must be differentiable: no quantised or detached part between edited image and "
                    "answer.")  # fmt: skip
    if wrong:
        worst = max(float(c.error or 0) for c in wrong)
        section.add("gradient-wrong", "will not learn" if 2 * len(wrong) > len(found) and dtype == "float32" else
                    "warning", f"{len(wrong)} of {len(found)} gradients differ from finite differences by more than "
                    f"{tolerance:.0%}; the worst by {worst:.0%}.",
                    "The student is not moved to where the answer gets better.",
                    "Compare with float32 in all parts; then look for a fault in the family's or the critic's code."
                    )  # fmt: skip
    if found and not (broken or zero or wrong):
        worst = max(float(c.error or 0) for c in found)
        section.add("gradient-right", "ok", f"{len(found)} gradients are finite, not zero, and agree with finite "
                    f"differences within {worst:.1%}.")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ balance


def report_balance(section: Section, subject: Subject, stage: Stage, student: nn.Module) -> None:
    """The norms of the critic's and of DMD's gradient at x0: as they come, and as the recipe's setting balances them.
    The student takes an update of almost no size."""
    settings: Any = stage.settings
    if not (settings.critic_weight and settings.dmd_weight):
        section.add("one-gradient", "note", "The recipe gives one of critic and distribution matching the weight 0.")
        return
    still = {"student": _with_rate(stage, 1e-12), "fake_updates": 1}
    rows, ratio = [], math.nan
    raw = {"balance": "none", "critic_weight": 1.0, "dmd_weight": 1.0}
    for name, changes in (("weights 1, not balanced", raw), ("as the recipe says", {})):
        step = build_step(subject, stage, student, still | changes)
        metrics = run_update(subject, stage, step, 0)
        critic, dmd = metrics["grad_norm/from_critic"], metrics["grad_norm/from_dmd"]
        ratio = critic / dmd if dmd else math.inf
        rows.append((name, critic, dmd, ratio))
    section.add_table("Gradient norms at x0, of the first batch", ("weights", "critic", "DMD", "critic / DMD"), rows)
    fact = f"The critic's gradient at x0 is {ratio:.3g} times that of distribution matching."
    if LOWEST <= ratio <= HIGHEST:
        section.add("balance", "ok", fact)
        return
    small, large = ("critic", "DMD") if ratio < LOWEST else ("DMD", "critic")
    section.add(
        "balance", "warning", fact, f"Training follows {large} alone; {small} has no say.",
        f"Set balance: item, or {'raise' if small == 'critic' else 'lower'} critic_weight.",
    )  # fmt: skip


def _with_rate(stage: Stage, lr: float) -> object:
    """The student's settings with another learning rate, constant from the first update on."""
    settings: Any = stage.settings
    return settings.student.model_copy(update={"lr": lr, "warmup_updates": 0, "decay": "constant", "ema": 0.0})


# ------------------------------------------------------------------------------------------------------ learning rate


def report_learning_rate(section: Section, subject: Subject, stage: Stage, student: nn.Module) -> None:
    """How much one update at the full learning rate changes the student's output. The student keeps its old weights."""
    learner = getattr(stage.settings, "student", None)
    if learner is None or learner.optimizer != "adamw":
        return
    weights = [p for p in student.parameters() if p.requires_grad]
    before = [master_weight(p).detach().float().clone() for p in weights]
    changes: dict[str, object] = {"student": _with_rate(stage, learner.lr)}
    changes |= {"fake_updates": 1} if hasattr(stage.settings, "fake_updates") else {}
    step = build_step(subject, stage, student, changes)
    batch = _first_batch(subject)
    old = _velocity(subject, student, batch)
    run_update(subject, stage, step, 0)
    new = _velocity(subject, student, batch)
    for p, kept in zip(weights, before, strict=True):
        set_weight(p, kept)
    change = float((new - old).norm() / old.norm().clamp_min(1e-12))
    fact = (
        f"{stage.step}: one update at the full learning rate {learner.lr:g}, without warm-up, changes the student's "
        f"output by {change:.0%} of its size."
    )
    _judge_learning_rate(section, fact, change)


def _first_batch(subject: Subject) -> Batch:
    size = subject.examples[0].reference.shape
    return collate([e for e in subject.examples if e.reference.shape == size][:LOOKED_AT], subject.parts.device)


@torch.no_grad()
def _velocity(subject: Subject, student: nn.Module, batch: Batch) -> Tensor:
    """The student's velocity at pure noise, float32."""
    parts = subject.parts
    references = parts.encode_images(batch.references)
    (noise,) = sample_noise(references, 1, seeded_generator(subject.recipe.seed, "check rate"))
    t = torch.ones(len(batch), device=references.device)
    return parts.family.velocity(student, noise, t, parts.encode_text(batch.instructions), (references,)).float()


def _judge_learning_rate(section: Section, fact: str, change: float) -> None:
    if change <= LARGE:
        section.add("learning-rate", "ok", fact)
        return
    section.add(
        "learning-rate", "warning" if change <= BREAKS else "will not learn", fact,
        "A single update overwrites what the base model knows.", "Lower the student's lr, and set warmup_updates.",
    )  # fmt: skip
