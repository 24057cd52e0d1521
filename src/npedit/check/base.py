"""The base section: can the text-to-image model draw what the captions say, with many steps and with few?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npedit.check.captions import content_words
from npedit.check.findings import Cell, ReportPicture, Section
from npedit.check.grids import draw_grid
from npedit.check.subject import Subject
from npedit.critics.base import Critic
from npedit.data import Example
from npedit.families._published import sampling_guidance
from npedit.flow import few_step_times
from npedit.generator import generate_images, items_per_pass, seeded_generator
from npedit.questions import questions_for
from npedit.training.evaluation import TEACHER_STEPS

MOST_CAPTIONS = 32
SHOWN = 6
LEAST_CASES = 8
DEAF, HARD_OF_HEARING = 0.2, 0.5  # of the way from other photos' agreement to that of photos that show the object


@dataclass(frozen=True)
class CaptionedObject:
    """A caption, and an object that a picture of this caption shows."""

    example: Example
    caption: str
    object: str
    is_source: bool  # the caption describes the photo, so the photo shows the object


def check_base(subject: Subject) -> Section:
    """The base section of the report."""
    section = Section("base", "Base model")
    cases = captioned_objects(subject.examples)[:MOST_CAPTIONS]
    size = tuple(subject.examples[0].reference.shape[-2:])
    cases = [c for c in cases if tuple(c.example.reference.shape[-2:]) == size]
    if not cases:
        section.add("base-not-checked", "note", "No caption of the examples contains the object of its row.",
                    "Whether the base model draws what captions say cannot be measured.",
                    "Fill the columns 'object' and 'source_caption'.")  # fmt: skip
        return section
    guidance = _guidance(subject)
    few = subject.recipe.trainer.steps
    made = {
        (steps, scale): _generate(subject, cases, steps, scale)
        for steps in (few, TEACHER_STEPS)
        for scale in dict.fromkeys((1.0, guidance))
    }
    _report_finite(section, made.values())
    critic = subject.parts.critic
    agreement: dict[tuple[int, float], float] = {}
    if critic is None:
        section.add("no-critic", "note", "The recipe has no critic to judge the base model's pictures: look at them.")
    else:
        with subject.parts.on_device("critic"):
            agreement = {key: _agreement(subject, critic, cases, pictures) for key, pictures in made.items()}
            _report_agreement(section, subject, critic, cases, agreement, guidance)
    _show(section, cases, made)
    return section


def captioned_objects(examples: Sequence[Example]) -> list[CaptionedObject]:
    """The examples with a caption that contains all words of the row's object: the source caption, or the target
    caption of an addition."""
    found = []
    for example in examples:
        is_source = example.edit_type != "add"
        caption = example.source_caption if is_source else example.target_caption
        words = content_words(example.object)
        if words and words <= content_words(caption):
            found.append(CaptionedObject(example, caption, example.object, is_source))
    return found


def _guidance(subject: Subject) -> float:
    """The teacher's guidance in the recipe; the model's own where no stage has a teacher."""
    stage = subject.editing_stage
    return float(getattr(stage.settings, "guidance", 0) if stage else 0) or sampling_guidance(subject.parts.family)


def _generate(subject: Subject, cases: Sequence[CaptionedObject], steps: int, guidance: float) -> Tensor:
    """The base model's pictures (n, 3, H, W) of the captions, on the CPU. Each has the same noise at every setting."""
    parts, done = subject.parts, []
    height, width = cases[0].example.reference.shape[-2:]
    family = parts.family
    times = few_step_times(steps, family.noise_shift(height, width)).tolist()
    stride = family.facts.stride
    shape = (family.facts.channels, height // stride, width // stride)
    generator = seeded_generator(subject.recipe.seed, "check base")
    noise = torch.randn((len(cases), *shape), generator=generator)
    count, tile = items_per_pass(height, width), parts.memory.decode_tile
    with parts.on_device("text", "vae"):
        for start in range(0, len(cases), count):
            captions = [c.caption for c in cases[start : start + count]]
            part = noise[start : start + count].to(parts.device)
            done.append(generate_images(family, captions, part, times, guidance, tile).cpu())
    return torch.cat(done)


def _report_finite(section: Section, made: Iterable[Tensor]) -> None:
    broken = [pictures for pictures in made if not bool(pictures.isfinite().all())]
    if broken:
        section.add("base-not-finite", "will not learn", "Pictures of the base model hold NaN or infinity.",
                    "Student, teacher and fake score start from these weights.",
                    "Use float32 or bfloat16, or another checkpoint.")  # fmt: skip


@torch.no_grad()
def _agreement(subject: Subject, critic: Critic, cases: Sequence[CaptionedObject], pictures: Iterable[Tensor]) -> float:
    """The mean P(Yes) of "does the image show the object?" over the cases."""
    total = 0.0
    for case, picture in zip(cases, pictures, strict=True):
        question = questions_for("remove", "", case.object, subject.parts.wording)[0]
        tokens = critic.encode_images(picture[None].to(critic.device))
        total += float(critic.margin([question.text], [[tokens[0]]]).sigmoid())
    return total / len(cases)


def _report_agreement(
    section: Section,
    subject: Subject,
    critic: Critic,
    cases: Sequence[CaptionedObject],
    agreement: dict[tuple[int, float], float],
    guidance: float,
) -> None:
    rows: list[Sequence[Cell]] = [
        (f"base model, {steps} steps, guidance {scale:g}", len(cases), value)
        for (steps, scale), value in agreement.items()
    ]
    shown = [c for c in cases if c.is_source]
    photos = _agreement(subject, critic, shown, [c.example.reference for c in shown]) if shown else None
    others = _other_photos(cases, subject.examples)
    floor = _agreement(subject, critic, cases, others)
    rows += [("photos of these captions", len(shown), photos), ("photos of other rows", len(others), floor)]
    section.add_table(
        "Does the picture show the object of its caption? Mean P(Yes) by the critic",
        ("pictures", "n", "mean P(Yes)"),
        rows,
    )
    best = agreement[TEACHER_STEPS, guidance]
    if photos is None or min(len(shown), len(others)) < LEAST_CASES or photos - floor < 0.3:
        section.add("base-agreement", "ok", f"P(Yes) for the base model's pictures is {best:.2f}; there are too few "
                    "photos, or the critic cannot tell them apart, so this is not judged.")  # fmt: skip
        return
    reached = (best - floor) / (photos - floor)
    fact = (
        f"The critic finds the caption's object with P {best:.2f} in the base model's pictures ({TEACHER_STEPS} steps, "
        f"guidance {guidance:g}), {photos:.2f} in photos that show it, {floor:.2f} in others."
    )
    if reached >= HARD_OF_HEARING:
        section.add("base-agreement", "ok", fact)
        return
    section.add(
        "base-agreement", "will not learn" if reached < DEAF and _has_teacher(subject) else "warning", fact,
        "The teacher does not draw what captions say, so distribution matching pulls edits to other pictures.",
        "Check family.weights, guidance and number types; use captions of the kind that the base model was trained on.",
    )  # fmt: skip


def _has_teacher(subject: Subject) -> bool:
    stage = subject.editing_stage
    return stage is not None and getattr(stage.settings, "dmd_weight", 0) > 0


def _other_photos(cases: Sequence[CaptionedObject], examples: Sequence[Example]) -> list[Tensor]:
    """For each case the photo of another row: what agreement is by chance."""
    ids = [e.id for e in examples]
    shift = max(1, len(examples) // 2)
    return [examples[(ids.index(case.example.id) + shift) % len(examples)].reference for case in cases]


def _show(section: Section, cases: Sequence[CaptionedObject], made: dict[tuple[int, float], Tensor]) -> None:
    rows = []
    for number, case in enumerate(cases[:SHOWN]):
        row = [(case.caption, case.example.reference)]
        row += [(f"{steps} steps, guidance {scale:g}", pictures[number]) for (steps, scale), pictures in made.items()]
        rows.append(row)
    caption = "A photo, its caption, and what the base model draws from the caption (for additions: from the target's)"
    section.pictures.append(ReportPicture(caption, draw_grid(rows)))
