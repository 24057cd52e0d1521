"""The Yes/No questions that the critic is asked about an edit, by edit type, and the wanted answers.

Each edit gets two questions: was the instruction carried out, and is everything else unchanged? (NP-Edit, section 3,
"VLM editing loss"; the wording is ours.) Removal is checked on the edited image alone: "is the object there?", wanted
answer No. An identity edit ("do nothing") gets the identity question alone.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

IDENTITY_EDIT = "nothing"  # the instruction is to change nothing: "do nothing"
OTHER = "other"
EDIT_TYPES = (
    "add", "remove", "replace", "recolour", "pattern", "material", "background", "move", "resize", "style", "shape",
    "action", "text", "tone", OTHER, IDENTITY_EDIT,
)  # fmt: skip
ALIASES = {
    "insertion": "add", "removal": "remove", "color": "recolour", "colour": "recolour", "texture": "material",
    "stylisation": "style", "stylization": "style", "do_nothing": IDENTITY_EDIT, "": OTHER,
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
    },
    "short": {
        "edit": "was this edit done : {instruction} ?",
        "identity": "is all else the same : {instruction} ?",
        "presence": "is there a {object} ?",
        "identity_without": "is all else the same without the {object} ?",
        "same": "are both images the same ?",
    },
}


Picture = Literal["reference", "edited"]


@dataclass(frozen=True)
class Question:
    """One question. `kind` says which loss it belongs to. `looks_at` names the images that the critic sees, in order.
    `answer` is +1 if Yes is wanted, -1 if No is wanted."""

    kind: Literal["edit", "identity"]
    text: str
    looks_at: tuple[Picture, ...]
    answer: int


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


def questions_for(edit_type: str, instruction: str, object: str = "", wording: str = "plain") -> tuple[Question, ...]:
    """The questions about one edit, the edit question first. `object` is needed for removal only.

    Raises:
        ValueError: unknown edit type or wording, or a removal that names no object.
    """
    if wording not in WORDINGS:
        raise ValueError(f"expected a wording among {', '.join(WORDINGS)}; got {wording!r}")
    words = WORDINGS[wording]
    kind = normalise_edit_type(edit_type)
    pair: tuple[Picture, ...] = ("reference", "edited")
    if kind == IDENTITY_EDIT:
        return (Question("identity", words["same"], pair, +1),)
    if kind == "remove":
        if not object:
            raise ValueError(
                f"a removal needs the name of what is removed; got none for {instruction!r}. Fill 'object'."
            )
        return (
            Question("edit", words["presence"].format(object=object), ("edited",), -1),
            Question("identity", words["identity_without"].format(object=object), pair, +1),
        )
    return (
        Question("edit", words["edit"].format(instruction=instruction), pair, +1),
        Question("identity", words["identity"].format(instruction=instruction), pair, +1),
    )
