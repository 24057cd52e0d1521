"""What the data section says of scenes: has the critic another photo of the subject to compare with?"""

from __future__ import annotations

from collections.abc import Sequence

from npedit.check.findings import Section
from npedit.data import Example
from npedit.questions import SCENE

FEW_OTHER_PHOTOS = 0.5  # share of scenes


def report_scenes(section: Section, examples: Sequence[Example]) -> None:
    """Report for how many scenes among the examples there is another photo of the subject."""
    scenes = [e for e in examples if e.edit_type == SCENE]
    if not scenes:
        return
    with_other = sum(e.other_photo is not None for e in scenes)
    fact = f"{with_other} of {len(scenes)} scenes have another photo of the subject."
    if with_other < FEW_OTHER_PHOTOS * len(scenes):
        section.add(
            "few-other-photos", "warning", fact,
            "The critic compares the subject with the reference, so pasting the reference into a scene satisfies it.",
            "Give all photos of a subject the same 'group'.",
        )  # fmt: skip
    else:
        section.add("other-photos", "ok", fact)
