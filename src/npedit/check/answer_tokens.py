"""What the critic reads and says, as it is: chat template, answer tokens, and the tokens that it would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from npedit.check.findings import Section
from npedit.check.known_edits import KnownEdit
from npedit.critics.base import Critic
from npedit.questions import questions_for

ASKED = 12  # questions whose next token is looked at
FEW, VERY_FEW = 0.5, 0.05  # probability of Yes and No together
TOP = 5


def members_of(critic: Critic) -> list[Any]:
    """The members of an ensemble; the critic itself otherwise."""
    return list(getattr(critic, "members", [critic]))


def unknown_words(critic: Critic, text: str) -> int:
    """How many tokens of a text are unknown to the critic's tokenizer; of an ensemble, the most of its members."""
    counts = []
    for member in members_of(critic):
        unknown = member.tokenizer.unk_token_id
        ids = member.tokenizer(text, add_special_tokens=False).input_ids
        counts.append(0 if unknown is None else ids.count(unknown))
    return max(counts)


@torch.no_grad()
def report_answer_tokens(section: Section, critic: Critic, wording: str, edits: Sequence[KnownEdit]) -> None:
    """Add each member's prompt and answer tokens, and a finding if it would rather say something else."""
    for member in members_of(critic):
        name = type(member).__name__
        section.texts.append((f"{name}: a prompt as the model reads it", _prompt(member, edits, wording)))
        tokens = ", ".join(
            f"{word} is token {number} ({member.tokenizer.convert_ids_to_tokens(number)!r})"
            for word, number in (("Yes", member.yes), ("No", member.no))
        )
        section.texts.append((f"{name}: answer tokens", tokens))
        if edits:
            _report_mass(section, member, name, wording, edits[:ASKED])


def _first_question(edit: KnownEdit, wording: str) -> Any:
    example = edit.example
    return questions_for(example.edit_type, example.instruction, example.object, wording)[0]


def _prompt(member: Any, edits: Sequence[KnownEdit], wording: str) -> str:
    question = _first_question(edits[0], wording) if edits else None
    content: list[dict[str, str]] = [{"type": "image"}] * (len(question.looks_at) if question else 1)
    content.append({"type": "text", "text": question.text if question else "is it?"})
    turns = [{"role": "user", "content": content}]
    options = {"chat_template": member.template, "tokenize": False, "add_generation_prompt": True}
    return member.tokenizer.apply_chat_template(turns, **options)


def _report_mass(section: Section, member: Any, name: str, wording: str, edits: Sequence[KnownEdit]) -> None:
    """How probable Yes or No is as the next token, and which tokens are likelier."""
    masses, total = [], None
    for edit in edits:
        question = _first_question(edit, wording)
        pair = torch.stack([edit.example.reference, edit.edited]).to(member.device)
        seen = dict(zip(("reference", "edited"), member.encode_images(pair)))
        p = member.logits([question.text], [[seen[n] for n in question.looks_at]])[0].softmax(-1)
        masses.append(float(p[member.yes] + p[member.no]))
        total = p if total is None else total + p
    assert total is not None
    mass = sum(masses) / len(masses)
    likely = (total / len(masses)).topk(min(TOP, len(total)))
    rows = [
        (repr(member.tokenizer.convert_ids_to_tokens(int(number))), float(p))
        for p, number in zip(likely.values, likely.indices)
    ]
    section.add_table(f"{name}: the likeliest next tokens at the answer position", ("token", "mean p"), rows)
    fact = f"{name}: Yes and No together have a probability of {mass:.2f} at the answer position."
    if not mass < FEW:
        section.add("answer-tokens", "ok", fact)
        return
    section.add(
        "answer-tokens", "will not learn" if mass < VERY_FEW else "warning",
        f"{fact} The likeliest token is {rows[0][0]}.",
        "The model would say something else: template, tokenizer or answer tokens may be wrong for these weights.",
        "Compare the prompt in report.html with the model's own documentation.",
    )  # fmt: skip
