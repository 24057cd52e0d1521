"""The three passes over one photo: look, write, verify. Each is a function of a row and returns rows.

A photo is a dictionary with at least `id` and `path`, so that any engine can map these functions over a table. Two runs
with the same answers make the same rows.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from npedit.data._photos import BadImage, read_photo
from npedit.judges.base import TRANSPORT_ERROR
from npedit.prepare.answers import (
    look_schema,
    parse_look,
    parse_verify,
    parse_write,
    verify_schema,
    write_schema,
)
from npedit.prepare.asking import Asker, Unanswered
from npedit.prepare.prompts import EditType, Prompts
from npedit.prepare.writer import Request
from npedit.questions import SCENE

NEEDS_OBJECT = ("remove", "replace", "recolour", "pattern", "material", "move", "resize", "shape", "action", SCENE)
MAX_WORDS = 60  # of an instruction; longer ones are no instruction
MAX_QUESTIONS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Passes:
    """What the passes need beside a photo. `verifier` None leaves the third pass out. `side` is the longest side in
    pixels of the pictures that are sent."""

    prompts: Prompts
    writer: Asker
    verifier: Asker | None
    side: int
    seed: int
    max_pixels: int

    def stop_retrying(self) -> None:
        """End the retries of requests in other threads. Called when the run ends early."""
        for asker in (self.writer, self.verifier):
            if asker is not None:
                asker.writer.stop_retrying()


def prepare_photo(photo: Mapping[str, Any], wanted: Sequence[str], passes: Passes) -> dict[str, list[Row]]:
    """{"rows": [...], "rejected": [...]} of one photo: all passes. `wanted` are edit types, one for each edit that is
    asked for. A rejected row has `pass` and `reason`.

    Raises:
        CostCeiling, JudgeUnavailable: no further request is possible.
    """
    try:
        image = load_picture(Path(photo["path"]), passes.side, passes.max_pixels)
    except BadImage as error:
        return {"rows": [], "rejected": [_rejected({}, photo, "look", f"the photo cannot be read: {error}")]}
    try:
        seen = look(photo, image, passes)
    except Unanswered as error:
        return {"rows": [], "rejected": [_rejected({}, photo, "look", str(error))]}
    proposals, rejected = write(photo, image, seen, wanted, passes)
    rows = []
    for proposal in proposals:
        reason = verify(photo, image, proposal, passes)
        if reason:
            rejected.append(_rejected(proposal, photo, "verify", reason))
        else:
            rows.append({**proposal, "photo": photo["id"]})
    return {"rows": rows, "rejected": rejected}


def load_picture(path: Path, side: int, max_pixels: int) -> Image.Image:
    """A photo as it is sent: upright, sRGB, at most `side` pixels on its longer side, without EXIF and GPS data.

    Raises:
        BadImage: it cannot be read.
    """
    image = read_photo(path, max_pixels)
    scale = side / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.info = {}
    return image


def look(photo: Mapping[str, Any], image: Image.Image, passes: Passes) -> Row:
    """What is in a photo: {"objects", "caption"}.

    Raises:
        Unanswered: the model gives no usable answer.
    """
    prompt = passes.prompts.look
    request = Request(
        "look", prompt.system, prompt.fill(), look_schema(), image, prompt.temperature, prompt.max_tokens, passes.seed
    )
    return passes.writer.ask(request, parse_look)


# ------------------------------------------------------------------------------------------------------------- write


def write(
    photo: Mapping[str, Any], image: Image.Image, seen: Mapping[str, Any], wanted: Sequence[str], passes: Passes
) -> tuple[list[Row], list[Row]]:
    """(proposals that pass the checks that need no model, rejected ones) for a photo. `seen` is the answer of `look`.
    The id of a proposal is the photo's id and the edit type, with a number from the second of a type on."""
    request = write_request(photo, image, seen, wanted, passes)
    try:
        offered = passes.writer.ask(request, lambda text: parse_write(text, wanted))
    except Unanswered as error:
        return [], [_rejected({"edit_type": kind}, photo, "write", str(error)) for kind in wanted]
    left, numbers = Counter(wanted), Counter[str]()
    proposals, rejected = [], []
    for item in offered:
        kind = item["edit_type"]
        row = {**item, "source_caption": seen["caption"]}
        reason = item.get("unreadable") and f"unreadable: {item['unreadable']}"
        reason = reason or ("" if left[kind] else "this edit type was not asked for, or not so often")
        reason = reason or find_fault(row, passes.prompts.edit_types[kind])
        if left[kind]:
            left[kind] -= 1
            numbers[kind] += 1
            row["id"] = f"{photo['id']}-{kind}" + (f"-{numbers[kind]}" if numbers[kind] > 1 else "")
        if reason:
            rejected.append(_rejected(row, photo, "write", str(reason)))
        else:
            trained_as = passes.prompts.edit_types[kind].trained_as
            proposals.append({**row, "edit_type": trained_as, "asked_type": kind})
    rejected += [_rejected({"edit_type": kind}, photo, "write", "not offered") for kind in left.elements()]
    return proposals, rejected


def write_request(
    photo: Mapping[str, Any], image: Image.Image, seen: Mapping[str, Any], wanted: Sequence[str], passes: Passes
) -> Request:
    """The request of the second pass. The way of wording of each edit is drawn from the seed and the photo's id."""
    prompts = passes.prompts
    rng = random.Random(f"{passes.seed}/{photo['id']}/{','.join(wanted)}/wording")
    lines = [
        f"- {kind}: {prompts.edit_types[kind].description}. Wording: {rng.choice(prompts.styles)}." for kind in wanted
    ]
    examples = "Examples of good proposals:\n" + "\n".join(prompts.examples) if prompts.examples else ""
    text = prompts.write.fill(
        photo=json.dumps(seen, ensure_ascii=False),
        wanted="\n".join(lines),
        examples=examples,
        language=prompts.language,
    )
    prompt = prompts.write
    return Request(
        "write", prompt.system, text, write_schema(wanted), image, prompt.temperature, prompt.max_tokens, passes.seed
    )


def find_fault(row: Mapping[str, Any], kind: EditType) -> str:
    """What is wrong with a proposal as far as its words tell; "" if nothing is."""
    if len(row["instruction"].split()) > MAX_WORDS:
        return f"the instruction has more than {MAX_WORDS} words"
    return find_caption_fault(row, kind.trained_as)


def find_caption_fault(row: Mapping[str, Any], edit_type: str) -> str:
    """What is wrong with the captions, the object and the questions of a row, as far as its words tell; "" if nothing
    is. `edit_type` is the one that the row is trained as."""
    plain = {name: _plain(row[name]) for name in ("instruction", "object", "source_caption", "target_caption")}
    if plain["target_caption"] == plain["source_caption"]:
        return "the target caption repeats the source caption"
    if plain["instruction"] == plain["target_caption"]:
        return "the target caption repeats the instruction"
    if edit_type == "remove" and re.search(rf"\b{re.escape(plain['object'])}\b", plain["target_caption"]):
        return "the target caption mentions the object that is removed"
    if not 1 <= len(row["questions"]) <= MAX_QUESTIONS:
        return f"expected 1 to {MAX_QUESTIONS} questions; got {len(row['questions'])}"
    return ""


def _plain(text: str) -> str:
    """A text in lower case, without punctuation at its end and without an article at its beginning."""
    return re.sub(r"^(the|an|a) ", "", " ".join(text.lower().split()).rstrip(".!"))


# ------------------------------------------------------------------------------------------------------------ verify


def verify(photo: Mapping[str, Any], image: Image.Image, proposal: Mapping[str, Any], passes: Passes) -> str:
    """Why a proposal is rejected after the model has checked it against the photo; "" if it is right, or if there is no
    verifier."""
    if passes.verifier is None:
        return ""
    questions = proposal["questions"]
    prompt = passes.prompts.verify
    text = prompt.fill(
        edit_type=proposal["asked_type"],
        instruction=proposal["instruction"],
        object=proposal["object"],
        source_caption=proposal["source_caption"],
        target_caption=proposal["target_caption"],
        questions="\n".join(f"{n}. {q['question']}" for n, q in enumerate(questions, 1)),
    )
    request = Request(
        "verify", prompt.system, text, verify_schema(), image, prompt.temperature, prompt.max_tokens, passes.seed
    )
    try:
        found = passes.verifier.ask(request, lambda answer: parse_verify(answer, len(questions)))
    except Unanswered as error:
        return str(error)
    return _judge_verification(found, proposal)


def _judge_verification(found: Mapping[str, Any], proposal: Mapping[str, Any]) -> str:
    """The reason to reject a proposal, from the verifier's answer."""
    wanted = [question["answer"] for question in proposal["questions"]]
    said = f" ({found['reason']})" if found["reason"] else ""
    if proposal["edit_type"] in NEEDS_OBJECT and not found["object_present"]:
        return f"object not present{said}"
    if not found["edit_possible"]:
        return f"edit not possible{said}"
    if not found["caption_right"]:
        return f"caption wrong{said}"
    if found["answers"] == wanted:
        return f"no question tells the edited picture from the photo{said}"
    return ""


def _rejected(row: Mapping[str, Any], photo: Mapping[str, Any], name: str, reason: str) -> Row:
    return {**row, "photo": photo["id"], "pass": name, "reason": reason}


def unanswered_reason(rejected: Iterable[Mapping[str, Any]]) -> str:
    """Why a run is not finished although every photo was asked: some requests got no answer; "" if all did."""
    reasons = [row["reason"] for row in rejected if row["reason"].startswith(TRANSPORT_ERROR)]
    return f"{len(reasons)} edits or photos got no answer, the last one because of {reasons[-1]}" if reasons else ""


def short_reason(reason: str) -> str:
    """A reason without what is in brackets or behind a colon, for counts."""
    return re.split(r"[(:;]", reason, maxsplit=1)[0].strip()
