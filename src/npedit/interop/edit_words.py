"""Edit types and objects of other data sets, in the words of this package."""

from __future__ import annotations

import re

from npedit.questions import EDIT_TYPES, OTHER, normalise_edit_type

# Words of OmniEdit, UltraEdit, GPT-Image-Edit-1.5M and the reimplementation's merged list. A word that leaves the type
# open, such as "attribute_modification", means "other".
WORDS = {
    "addition": "add",
    "removal": "remove",
    "swap": "replace",
    "object_swap": "replace",
    "replacement": "replace",
    "turn": "replace",
    "background_swap": "background",
    "background_change": "background",
    "bg": "background",
    "env": "tone",
    "local_color_change": "recolour",
    "change_color": "recolour",
    "local_texture": "material",
    "shape_change": "shape",
    "adjust_(shape_change)": "shape",
    "relocation": "move",
    "text_replacement": "text",
    "text_translation": "text",
    "pose_change": "action",
    "local_expression_change": "action",
}
KEYWORDS = (  # for types written as sentences (pico-banana-400k); the first that matches decides
    (r"\b(text|font|sign|letter|translat\w*|uppercase)\b", "text"),
    (r"\bremov\w*|\bdelet\w*|\beras\w*", "remove"),
    (r"\bbackground\b", "background"),
    (r"\brelocat\w*|\bmove\b|\bposition\b", "move"),
    (r"\breplac\w*|\bswap\w*", "replace"),
    (r"\bstyl\w*|\bcartoon\w*|\banime\b|\bsketch\w*|\bpainting\b|\bpixar\b|\blego\b|\bsimpsons\b|\bcomic\b", "style"),
    (r"\badd\b|\baddition\b|\binsert\w*", "add"),
    (r"\b(light\w*|weather|season\w*|time of day|tone|brightness|contrast|saturation|exposure|filter|grain)\b", "tone"),
    (r"\bcolou?r\w*", "recolour"),
    (r"\bmaterials?\b|\btextures?\b", "material"),
    (r"\bsize\b|\bresiz\w*", "resize"),
    (r"\bshape\b", "shape"),
    (r"\b(pose|expression|gesture|action)\b", "action"),
)
REMOVED = re.compile(
    r"(?:please )?(?:remove|delete|erase|take away|get rid of|eliminate) (?:the |a |an |all (?:of )?(?:the )?|any )?"
    r"(?P<object>[\w' -]+?)"
    r"(?: (?:from|in|on|at|with|to|so|while|near|by|under|behind|that|which|located|completely|entirely)\b.*"
    r"|[.;:].*|)",
    re.IGNORECASE | re.DOTALL,
)
SEVERAL = re.compile(r"[^,.;:]*\b(?:and|or|then|plus)\b", re.IGNORECASE)  # before the first comma or full stop
OBJECT_WORDS = 5  # a longer name is no name
PRONOUNS = frozenset(
    ("it", "this", "that", "them", "these", "those", "one", "all", "everything", "everyone", "him", "her")
)


def read_edit_type(word: str) -> str:
    """The edit type that another data set's word or sentence means; "other" if it is none that is known."""
    key = word.strip().lower().replace(" ", "_")
    if key in WORDS:
        return WORDS[key]
    try:
        return normalise_edit_type(word)
    except ValueError:
        pass
    several = [w.strip() for w in re.split(r",| and ", word.lower()) if w.strip()]
    if len(several) > 1 and all(w.replace(" ", "_") in {*WORDS, *EDIT_TYPES} for w in several):
        return OTHER
    return next((kind for pattern, kind in KEYWORDS if re.search(pattern, word.lower())), OTHER)


def read_removed_object(instruction: str) -> str:
    """What an instruction such as "Remove the red flag from the sky" removes; "" if that is not plain: the instruction
    may name several objects or another edit."""
    text = instruction.strip()
    found = None if SEVERAL.match(text) else REMOVED.fullmatch(text)
    name = found["object"].strip() if found else ""
    words = name.lower().split()
    return name if words and len(words) <= OBJECT_WORDS and words[0] not in PRONOUNS else ""
