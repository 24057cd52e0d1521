"""The critic section: what the critic is asked, and how right it is on edits whose answers are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from npedit.check.accuracy import Accuracy, calibration_rows, measure_accuracy
from npedit.check.answer_tokens import report_answer_tokens, unknown_words
from npedit.check.critic_answers import EDIT_KINDS, Answer, ask_critic, ask_own_questions, asked_kinds, recipe_choice
from npedit.check.findings import Cell, ReportPicture, Section, Severity
from npedit.check.grids import draw_grid
from npedit.check.known_edits import COPY, KnownEdit, make_known_edits
from npedit.check.labelled_edits import read_labelled_edits, toy_labelled_edits
from npedit.check.subject import Subject
from npedit.critics.base import Critic
from npedit.generator import seeded_generator
from npedit.questions import IDENTITY_EDIT

REVERSED, WEAK, FAIR = 0.35, 0.6, 0.75  # AUC: below these the answers are reversed, no better than chance, weak
GOOD_ACCURACY = 0.7  # of one edit type
COPIES = 0.5  # share of unedited pictures accepted as edited, from which copying is rewarded
MISCALIBRATED = 0.2
LARGEST_DROP = 0.15  # of accuracy, by what every sample of a student has
SCALES = (0.5, 0.25)  # of the sides
NOISES = (0.0, 0.1, 0.2, 0.4)  # standard deviation of noise on the latents
KINDS = (*EDIT_KINDS, "identity", "rubric", "grade")
HARDER_SHARE = 2  # edits that resolution and noise are tried on, for each of `CheckOptions.samples`
SHOWN = 10


def check_critic(subject: Subject) -> Section:
    """The critic section of the report."""
    section, critic = Section("critic", "Critic"), subject.parts.critic
    if critic is None:
        section.add("no-critic", "note", "No stage of the recipe asks a critic.")
        return section
    edits, asked = _edits_to_ask(section, subject, critic), asked_kinds(subject)
    copies = [e for e in edits if e.probe == COPY and asked != {"grade"}]  # a grade is no Yes or No
    with subject.parts.on_device("critic"):
        report_answer_tokens(section, critic, subject.parts.wording, copies)
        answers = ask_critic(critic, subject.parts.wording, edits)
        own = _ask_own_questions(section, subject, critic, edits)
    if not all(0 <= a.p <= 1 for a in [*answers, *own]):  # NaN is neither
        section.add(
            "critic-not-finite", "will not learn", "The critic's answers are not finite (NaN).",
            "No gradient of use comes from it.", "Use critic.dtype float32 or bfloat16, or other weights.",
        )  # fmt: skip
        return section
    _report_accuracy(section, [*answers, *own], asked)
    teaching = answers if "edit" in asked else own  # what asks in training whether the edit was carried out
    _report_copies(section, teaching)
    _report_own_questions(section, own)
    _report_types(section, teaching, sorted({e.edit_type for e in subject.examples}))
    _report_probes(section, answers)
    _report_harder(section, subject, critic, edits, answers, asked)
    _show_edits(section, answers)
    return section


def _edits_to_ask(section: Section, subject: Subject, critic: Critic) -> list[KnownEdit]:
    """The known edits whose texts the critic's tokenizer knows, and the labelled edits."""
    options, seed = subject.options, subject.recipe.seed
    made = make_known_edits(subject.examples, seed)
    unknown = {e.example.instruction: unknown_words(critic, e.example.instruction) for e in made}
    own = {e.instruction for e in subject.examples}
    strange = sorted(text for text in own if unknown.get(text))
    if strange:
        section.add(
            "unknown-words", "warning", f"The critic's tokenizer does not know words of {len(strange)} of {len(own)} "
            f"instructions, such as {strange[0]!r}.", "The critic cannot tell what is asked.",
            "Check that the tokenizer belongs to the critic, or reword the instructions.",
        )  # fmt: skip
    edits = [e for e in made if e.example.instruction in own or not unknown[e.example.instruction]]
    if len(edits) < len(made):
        section.add(
            "own-instructions", "ok",
            "Edits of the whole photo with instructions of this check (such as 'make the photo much darker') were left "
            "out: the critic's tokenizer does not know their words.",
        )  # fmt: skip
    if options.labelled is not None:
        return edits + read_labelled_edits(options.labelled, subject.data.sizes[0])
    data, settings = subject.recipe.data, cast(Any, subject.recipe.data.settings)
    return edits + (toy_labelled_edits(4 * options.samples, seed, settings.edit_types) if data.name == "toy" else [])


def _ask_own_questions(section: Section, subject: Subject, critic: Critic, edits: Sequence[KnownEdit]) -> list[Answer]:
    """The answers to rubrics and graded questions, where the recipe asks them."""
    choice = recipe_choice(subject)
    if choice is None:
        return []
    if choice.rubric != "off":
        _report_rubrics(section, subject)
    try:
        return ask_own_questions(critic, subject.parts.wording, edits, choice)
    except ValueError as error:
        section.add("critic-grades", "will not learn", str(error), "The critic cannot be asked for a grade.",
                    "Use another critic, or set grade to off.")  # fmt: skip
        return []


def _report_rubrics(section: Section, subject: Subject) -> None:
    """How many examples have a rubric."""
    count, with_rubric = len(subject.examples), sum(bool(e.questions) for e in subject.examples)
    fact = f"{with_rubric} of {count} examples have questions of their own (a rubric)."
    if with_rubric:
        section.add("rubrics", "ok", fact)
    else:
        section.add("rubrics", "warning", fact, "The setting rubric does nothing: all items get the usual questions.",
                    "Add the column 'questions' to the data, or set rubric to off.")  # fmt: skip


def _measure(answers: Sequence[Answer]) -> Accuracy:
    return measure_accuracy([a.p for a in answers], [a.truth for a in answers])


# ---------------------------------------------------------------------------------------------------------- accuracy


def _report_accuracy(section: Section, answers: Sequence[Answer], asked_in_training: Collection[str]) -> None:
    """The table of all kinds of questions; findings of those that training asks."""
    table: list[Sequence[Cell]] = []
    for kind in KINDS:
        asked = [a for a in answers if a.kind == kind]
        if not asked:
            continue
        found = _measure(asked)
        is_asked = kind in asked_in_training
        name = kind if is_asked else f"{kind} (not asked)"
        table.append((name, found.count, found.positive, found.share, found.auc, found.calibration_error))
        rows = calibration_rows([a.p for a in asked], [a.truth for a in asked])
        section.add_table(f"Calibration: {kind}", ("p of the wanted answer", "cases", "mean p", "share right"), rows)
        if is_asked:
            _judge_accuracy(section, kind, found)
    head = ("question", "cases", "wanted answer is right", "accuracy", "AUC", "calibration error")
    section.add_table("Accuracy on edits with known answers", head, table)


def _judge_accuracy(section: Section, kind: str, found: Accuracy) -> None:
    fact = f"Question {kind}: accuracy {found.share:.2f}, AUC {found.balanced_auc:.2f} in {found.count} cases."
    if not found.has_both:
        section.add("critic-untested", "note", f"Question {kind}: {found.count} cases with one known answer only.",
                    "How well the critic tells right edits from wrong ones is not known.",
                    "Give edits with known answers: --labelled FOLDER.")  # fmt: skip
    elif found.balanced_auc < REVERSED:
        section.add("critic-reversed", "will not learn", fact,
                    "The critic says Yes where No is right. The editor will learn the opposite of what is asked.",
                    "Look at the answer tokens in report.html. Tokenizer, template and weights must be of one model."
                    )  # fmt: skip
    elif found.balanced_auc < WEAK:
        section.add("critic-weak", "will not learn", fact,
                    "The critic's answers are hardly better than chance, so its gradient says nothing about the edit.",
                    "Use a stronger critic, a higher critic.resolution, or another wording.")  # fmt: skip
    elif found.balanced_auc < FAIR:
        section.add("critic-weak", "warning", fact, "A weak critic teaches wrong edits.",
                    "Use a stronger critic or an ensemble.")  # fmt: skip
    else:
        section.add("critic-accuracy", "ok", fact)
    if found.has_both and found.balanced_auc >= FAIR and found.calibration_error > MISCALIBRATED:
        section.add("critic-calibration", "note", f"Question {kind}: p differs from the share of right answers by "
                    f"{found.calibration_error:.2f} on average.", "Its answers are too sure or lean to one side.",
                    "Watch critic/p_* with a held-out judge; a lower ramp_from softens the answers.")  # fmt: skip


def _report_copies(section: Section, answers: Sequence[Answer]) -> None:
    """Unedited pictures that the critic takes for edited ones."""
    copies = [a for a in answers if a.edit.probe == COPY and a.kind != "identity"]
    if len(copies) < 5:
        return
    accepted = sum(a.p > 0.5 for a in copies) / len(copies)
    fact = f"The critic says of {accepted:.0%} of {len(copies)} unedited photos that the edit was carried out."
    if accepted <= COPIES:
        section.add("critic-copies", "ok", fact)
        return
    section.add(
        "critic-copies", "will not learn", fact, "Returning the photo unchanged satisfies the critic: the editor will "
        "copy.", "Use a stronger critic or another wording of the questions (critic.wording).",
    )  # fmt: skip


def _report_own_questions(section: Section, answers: Sequence[Answer]) -> None:
    """Rubrics and grades of right edits, of wrong edits and of unedited photos."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for answer in answers:
        name = "carried out" if answer.truth else "not carried out"
        groups[answer.kind, "an unedited photo" if answer.edit.probe == COPY else name].append(answer.p)
    rows = []
    for (kind, name), p in sorted(groups.items()):
        mean = sum(p) / len(p)
        rows.append((kind, name, len(p), mean, 1 + 4 * mean if kind == "grade" else None))
    if rows:
        head = ("question", "the edit is", "cases", "mean p", "mean grade of 5")
        section.add_table("Rubrics and grades on edits with known answers", head, rows)


def _report_types(section: Section, answers: Sequence[Answer], kinds: Sequence[str]) -> None:
    table, failed = list[Sequence[Cell]](), list[str]()
    for kind in kinds:
        asked = [a for a in answers if a.edit.example.edit_type == kind and a.kind != "identity"]
        if kind == IDENTITY_EDIT or not asked:
            continue
        found, copies = _measure(asked), [a for a in asked if a.edit.probe == COPY]
        rejected = sum(a.p <= 0.5 for a in copies) / len(copies) if copies else None
        verdict = _type_verdict(found, rejected)
        failed += [kind] if verdict.startswith("not good enough") else []
        table.append((kind, found.count, found.share, found.auc, rejected, verdict))
    head = ("edit type", "cases", "accuracy", "AUC", "copies rejected", "verdict")
    section.add_table("Is the critic good enough to teach this edit type?", head, table)
    if failed:
        severity: Severity = "will not learn" if len(failed) == len(table) else "warning"
        section.add(
            "critic-types", severity, f"The critic is not good enough to teach: {', '.join(failed)}.",
            "The editor will not learn these edit types from it.",
            "Use a stronger critic, or leave these types out.",
        )  # fmt: skip
    elif table:
        section.add("critic-types", "ok", f"No edit type of {len(table)} is known to be beyond the critic.")


def _type_verdict(found: Accuracy, rejected: float | None) -> str:
    if rejected is not None and rejected < COPIES:
        return "not good enough: takes copies for edits"
    if not found.has_both:
        return "rejects copies; right edits were not tested"
    good = found.balanced_auc >= FAIR and found.share >= GOOD_ACCURACY
    return "good enough" if good else "not good enough"


def _report_probes(section: Section, answers: Sequence[Answer]) -> None:
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.edit.probe, answer.kind].append(answer)
    rows = [
        (probe, kind, len(asked), _measure(asked).share, sum(a.p for a in asked) / len(asked))
        for (probe, kind), asked in sorted(groups.items())
    ]
    head = ("made by", "question", "cases", "accuracy", "mean p of the wanted answer")
    section.add_table("Accuracy by how the edit was made", head, rows)


# ------------------------------------------------------------------------------------------- resolution and noise


def _report_harder(
    section: Section,
    subject: Subject,
    critic: Critic,
    edits: Sequence[KnownEdit],
    answers: Sequence[Answer],
    asked: Collection[str],
) -> None:
    """Accuracy of the usual questions that training asks, at lower resolution, and on pictures with noise in their
    latents, as a few-step sample has."""
    stride = max(1, len(edits) // (HARDER_SHARE * subject.options.samples))
    chosen = list(edits[::stride])
    known = [a for a in _answers_of(answers, chosen) if a.kind in asked]
    if not known:
        section.add("critic-vae-not-checked", "note", "The critic was not tried at lower resolution and with noise: "
                    "this is done with the usual questions, which this recipe does not ask.")  # fmt: skip
        return
    base = _measure(known).share
    rows: list[Sequence[Cell]] = [("as they are", base, None)]
    for scale in SCALES:
        changed = [_changed(e, partial(_at_scale, scale=scale), of_both=True) for e in chosen]
        rows.append(_harder_row(f"sides x {scale:g}, both pictures", subject, critic, changed, asked))
    for noise in NOISES:
        generator = seeded_generator(subject.recipe.seed, "check", str(noise))
        add_noise = partial(_with_noise, subject, noise=noise, generator=generator)
        changed = [_changed(e, add_noise) for e in chosen]
        rows.append(
            _harder_row(f"edited picture through the VAE, latent noise {noise:g}", subject, critic, changed, asked)
        )
    section.add_table(f"Resolution and noise ({len(chosen)} edits)", ("pictures", "accuracy", "AUC"), rows)
    through_vae = rows[1 + len(SCALES)][1]
    assert isinstance(through_vae, float)
    fact = f"Accuracy is {base:.2f} on the pictures and {through_vae:.2f} after the VAE."
    if base - through_vae > LARGEST_DROP:
        section.add("critic-vae", "warning", fact, "Every edited image of the student has passed the VAE.",
                    "Use a base model with a better VAE, larger pictures, or another critic.")  # fmt: skip
    else:
        section.add("critic-vae", "ok", fact)


def _answers_of(answers: Sequence[Answer], edits: Sequence[KnownEdit]) -> list[Answer]:
    chosen = set(map(id, edits))
    return [a for a in answers if id(a.edit) in chosen]


def _harder_row(
    name: str, subject: Subject, critic: Critic, edits: Sequence[KnownEdit], asked: Collection[str]
) -> tuple[str, float, Cell]:
    with subject.parts.on_device("critic"):
        answers = ask_critic(critic, subject.parts.wording, edits)
    found = _measure([a for a in answers if a.kind in asked])
    return name, found.share, found.auc


def _changed(edit: KnownEdit, change: Callable[[Tensor], Tensor], of_both: bool = False) -> KnownEdit:
    example = edit.example
    if of_both:
        other = None if example.other_photo is None else change(example.other_photo)
        example = replace(example, reference=change(example.reference), other_photo=other)
    return replace(edit, example=example, edited=change(edit.edited))


def _at_scale(image: Tensor, scale: float) -> Tensor:
    """The image with less detail, in its own size."""
    height, width = image.shape[-2:]
    small = F.interpolate(image[None], (max(1, round(height * scale)), max(1, round(width * scale))), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0].clamp(0, 1)


@torch.no_grad()
def _with_noise(subject: Subject, image: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    parts = subject.parts
    with parts.on_device("vae"):
        latents = parts.family.encode(image[None].to(parts.device))
        latents = latents + noise * torch.randn(latents.shape, generator=generator).to(latents)
        return parts.decode_latents(latents)[0].clamp(0, 1).float().cpu()


def _show_edits(section: Section, answers: Sequence[Answer]) -> None:
    """Some edits with the critic's answers: one of each way to make them, and the surest wrong answers."""
    one_each = list({(a.edit.probe, a.kind): a for a in reversed(answers)}.values())
    wrong = sorted((a for a in answers if (a.p > 0.5) != a.truth), key=lambda a: -abs(a.p - 0.5))[:SHOWN]
    for title, shown in (("Known edits, one of each kind", one_each), ("The surest wrong answers", wrong)):
        if shown:
            rows = [
                [
                    (a.edit.example.instruction, a.edit.example.reference),
                    (f"{a.edit.probe}. {a.kind}: p = {a.p:.2f}, truth {int(a.truth)}", a.edit.edited),
                ]
                for a in shown
            ]
            section.pictures.append(
                ReportPicture(
                    f"{title}: photo and edit. p is of the wanted answer; truth 1: the wanted answer is right.",
                    draw_grid([row_a + row_b for row_a, row_b in zip(rows[::2], [*rows[1::2], []])]),
                )
            )
