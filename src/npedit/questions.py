"""The Yes/No questions that the critic is asked about an edit, by edit type, and the wanted answers.

Each edit gets two questions: was the instruction carried out, and is everything else unchanged? (NP-Edit, section 3,
"VLM editing loss"; the wording is ours.) Removal is checked on the edited image alone: "is the object there?", wanted
answer No. An identity edit ("do nothing") gets the identity question alone.

A `scene` edit (the paper's customisation) shows the subject of the photo somewhere else, and everything but the
subject's identity is free. It gets three questions: is the requested scene there, is the subject the same, and is the
edited image the photo itself? The last one wants No. It is an edit question, because a returned photo is an edit that
was not carried out: the photo answers the identity question rightly, so the identity question cannot refuse it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

IDENTITY_EDIT = "nothing"  # the instruction is to change nothing: "do nothing"
IDENTITY_INSTRUCTIONS = ("do nothing", "leave it as it is", "keep the picture as it is", "change nothing")
OTHER = "other"
SCENE = "scene"  # the subject of the photo somewhere else, doing something else
EDIT_TYPES = (
    "add", "remove", "replace", "recolour", "pattern", "material", "background", "move", "resize", "style", "shape",
    "action", "text", "tone", SCENE, OTHER, IDENTITY_EDIT,
)  # fmt: skip
ALIASES = {
    "insertion": "add", "removal": "remove", "color": "recolour", "colour": "recolour", "texture": "material",
    "stylisation": "style", "stylization": "style", "do_nothing": IDENTITY_EDIT, "": OTHER,
    "customisation": SCENE, "customization": SCENE,
}  # fmt: skip

WORDINGS: dict[str, dict[str, str]] = {
    "plain": {
        "edit": "The first image is the original and the second image is an edit of it. The requested edit was: "
        '"{instruction}". Has the requested edit been carried out in the second image? If both images are the same, '
        "the answer is No. Answer Yes or No.",
        "identity": "The first image is the original and the second image is an edit of it. The requested edit was: "
        '"{instruction}". Leaving aside what this edit asks to change, is everything else in the second image exactly '
        "as in the first image? Answer Yes or No.",
        "presence": "Does this image show {object}? Answer Yes or No.",
        "identity_without": "Leaving aside whether {object} is there, is everything else in the second image, layout "
        "included, exactly as in the first image? Answer Yes or No.",
        "same": "Are these two images exactly the same? Answer Yes or No.",
        "scene": 'This was requested of a photo of {object}: "{instruction}". Does this image show what was requested? '
        "Answer Yes or No.",
        "subject": "Both images are meant to show the same subject: {object}. Leaving aside its place, its pose, the "
        "light and everything around it, is the subject of the second image the very same one as in the first image? "
        "If the subject is not in the second image, the answer is No. Answer Yes or No.",
        "returned": "Is the second image the same photo as the first image, unchanged or only slightly changed? Answer "
        "Yes or No.",
        "rubric": "{question} Answer Yes or No.",
        "grade": "The first image is the original and the second image is an edit of it. The requested edit was: "
        '"{instruction}". How far has the requested edit been carried out in the second image? 1 is not at all, as '
        "where both images are the same, and 5 is completely. Answer with one number from 1 to 5.",
    },
    "short": {
        "edit": "was this edit done : {instruction} ?",
        "identity": "is all else the same : {instruction} ?",
        "presence": "is there a {object} ?",
        "identity_without": "is all else the same without the {object} ?",
        "same": "are both images the same ?",
        "scene": "is this in the picture : {instruction} ?",
        "subject": "is the {object} the same ?",
        "returned": "is it the same picture ?",
        "rubric": "{question}",
        "grade": "what of this edit was done : {instruction} ?",
    },
}


Picture = Literal["reference", "edited", "other"]  # "other": another photo of the subject
Kind = Literal["edit", "identity", "rubric", "grade"]
PAIR: tuple[Picture, ...] = ("reference", "edited")
YES, NO = +1, -1
YES_NO = ("No", "Yes")  # a question's answers, the lowest first
GRADES = ("1", "2", "3", "4", "5")
OBJECT_OF = {"remove": "what is removed", SCENE: "the subject"}  # what the object is, where questions name it


@dataclass(frozen=True)
class Question:
    """One question. `kind` says which loss it belongs to. `looks_at` names the images that the critic sees, in order.
    `answer` is +1 if the highest of `answers` is wanted (Yes), -1 if the lowest is wanted (No). `name` is the
    question's key in `WORDINGS`."""

    kind: Kind
    text: str
    looks_at: tuple[Picture, ...]
    answer: int
    name: str = ""
    answers: tuple[str, ...] = YES_NO


def normalise_edit_type(name: str) -> str:
    """The edit type that a data set's word for it means.

    Raises:
        ValueError: there are no questions for this type; the message names the nearest known one.
    """
    word = name.strip().lower().replace(" ", "_")
    word = ALIASES.get(word, word)
    if word in EDIT_TYPES:
        return word
    near = difflib.get_close_matches(word, [*EDIT_TYPES, *ALIASES], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"no question is known for edit type {name!r}{hint or '.'} Expected one of: {', '.join(EDIT_TYPES)}. "
        f"Use {OTHER!r} for edits of another kind."
    )


def questions_for(
    edit_type: str, instruction: str, object: str = "", wording: str = "plain", has_other: bool = False
) -> tuple[Question, ...]:
    """The questions about one edit, the edit question first. `object` is needed for a removal and for a scene.

    With `has_other` there is another photo of the subject, and the identity question about a scene looks at that one.

    Raises:
        ValueError: unknown edit type or wording, or a removal or a scene that names no object.
    """
    if wording not in WORDINGS:
        raise ValueError(f"expected a wording among {', '.join(WORDINGS)}; got {wording!r}")
    kind = normalise_edit_type(edit_type)
    if kind in OBJECT_OF and not object:
        raise ValueError(f"{kind!r} needs the name of {OBJECT_OF[kind]}; got none for {instruction!r}. Fill 'object'.")
    return tuple(
        Question(loss, WORDINGS[wording][name].format(instruction=instruction, object=object), pictures, answer, name)
        for loss, name, pictures, answer in _plan(kind, has_other)
    )


def _plan(edit_type: str, has_other: bool) -> list[tuple[Kind, str, tuple[Picture, ...], int]]:
    """(kind, name, pictures, wanted answer) of each question about an edit type."""
    if edit_type == IDENTITY_EDIT:
        return [("identity", "same", PAIR, YES)]
    if edit_type == "remove":
        return [("edit", "presence", ("edited",), NO), ("identity", "identity_without", PAIR, YES)]
    if edit_type == SCENE:
        subject: tuple[Picture, ...] = ("other" if has_other else "reference", "edited")
        return [
            ("edit", "scene", ("edited",), YES),
            ("identity", "subject", subject, YES),
            ("edit", "returned", PAIR, NO),
        ]
    return [("edit", "edit", PAIR, YES), ("identity", "identity", PAIR, YES)]
