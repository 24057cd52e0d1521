"""The prompts of the passes: YAML data files with a version, replaceable by a folder of the user's own files.

`look.yaml`, `write.yaml`, `verify.yaml` and `caption.yaml` (for `npedit caption`) each hold `version`, `system`, `user`
(a template with $names), `temperature` and `max_tokens`. `write.yaml` also holds the edit types with their
descriptions, the ways of wording, examples, and the language of the instructions. A small YAML of the user's own can
add to these four (`--custom`).
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from npedit.errors import UserError, did_you_mean
from npedit.judges.cache import hash_json
from npedit.questions import EDIT_TYPES, IDENTITY_EDIT, OTHER
from npedit.recipe.config import Settings, validate_settings
from npedit.recipe.yaml_file import parse_yaml

PASSES = ("look", "write", "verify")
CAPTION = "caption"  # completes rows that have an instruction; a user's folder may leave it out
PACKAGED = Path(__file__).with_name("prompts")
LOCAL_TYPES = ("add", "remove", "replace", "shape", "action", "style", "text", "recolour", "material", "background")
TEMPLATE_NAMES = {
    "look": (),
    "write": ("photo", "wanted", "examples", "language"),
    CAPTION: ("edit_type", "instruction", "object", "source_caption"),
    "verify": ("edit_type", "instruction", "object", "source_caption", "target_caption", "questions"),
}


class EditTypeEntry(Settings):
    """An edit type in a file: a description, and the edit type of `questions.py` that its rows are trained as."""

    description: str = ""
    trained_as: str = ""


class CustomFile(Settings):
    """The keys of a user's own small file."""

    language: str | None = None
    edit_types: dict[str, str | EditTypeEntry | None] | None = None
    styles: list[str] | None = None
    examples: list[str | dict[str, Any]] | None = None


class PromptFile(CustomFile):
    """The keys of a prompt's file; those of `CustomFile` are for write.yaml."""

    version: str | int | float
    system: str
    user: str
    temperature: float = Field(ge=0)
    max_tokens: int = Field(ge=1)

    def prompt(self) -> Prompt:
        """The prompt in the file."""
        return Prompt(str(self.version), self.system, self.user, self.temperature, self.max_tokens)


@dataclass(frozen=True)
class Prompt:
    """One pass's prompt. `user` is a template with $names."""

    version: str
    system: str
    user: str
    temperature: float
    max_tokens: int

    def fill(self, **values: str) -> str:
        """The user's message with the template's names filled in."""
        return string.Template(self.user).substitute(values)


@dataclass(frozen=True)
class EditType:
    """An edit type that can be asked for: what it means, in words, and the type that its rows are trained as."""

    name: str
    description: str
    trained_as: str


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run. `hashes` holds a hash of each file as it is used."""

    look: Prompt
    write: Prompt
    verify: Prompt
    caption: Prompt
    edit_types: Mapping[str, EditType]
    styles: tuple[str, ...]
    examples: tuple[str, ...]
    language: str
    hashes: Mapping[str, str]

    def to_record(self, passes: Sequence[str] = PASSES) -> dict[str, Any]:
        """Version and hash of each prompt, for prepare.json and the data card."""
        return {name: {"version": getattr(self, name).version, "sha256": self.hashes[name]} for name in passes} | {
            "language": self.language
        }


def load_prompts(folder: Path | None = None, custom: Path | None = None, language: str = "") -> Prompts:
    """The prompts of the package, or of `folder`; `custom` is a YAML file that adds to `write.yaml`.

    Raises:
        UserError: a file is missing, a key is missing or unknown, or a template has an unknown name.
    """
    found = {name: _read_prompt(folder or PACKAGED, name) for name in PASSES}
    has_caption = folder is not None and (folder / f"{CAPTION}.yaml").is_file()
    found[CAPTION] = _read_prompt(folder if folder is not None and has_caption else PACKAGED, CAPTION)
    if custom is not None:
        found["write"] = _add_custom(found["write"], custom)
    if language:
        found["write"] = {**found["write"], "language": language}
    files = {name: PromptFile.model_validate(value) for name, value in found.items()}
    write = files["write"]
    return Prompts(
        **{name: file.prompt() for name, file in files.items()},
        edit_types={name: _edit_type(name, value) for name, value in (write.edit_types or {}).items()},
        styles=tuple(write.styles or ["one plain sentence"]),
        examples=tuple(map(_as_example, write.examples or [])),
        language=write.language or "English",
        hashes={name: hash_json(value) for name, value in found.items()},
    )


def _read_prompt(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.yaml"
    value = _read_mapping(path, "--prompts")
    _check(PromptFile, value, f"--prompts, {path}")
    template = string.Template(value["user"])
    names = set(template.get_identifiers())
    if not template.is_valid() or names != set(TEMPLATE_NAMES[name]):
        wanted = ", ".join("$" + n for n in TEMPLATE_NAMES[name]) or "no $names"
        got = ", ".join("$" + n for n in sorted(names)) or "none"
        raise UserError(f"expected {wanted} in the text 'user' of {path}; got {got}; write $$ for a dollar sign")
    return value


def _check(model: type[Settings], value: Mapping[str, Any], place: str) -> None:
    try:
        validate_settings(model, value, "")
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _add_custom(write: dict[str, Any], path: Path) -> dict[str, Any]:
    custom = _read_mapping(path, "--custom")
    _check(CustomFile, custom, f"--custom, {path}")
    types = {**(write.get("edit_types") or {}), **(custom.get("edit_types") or {})}
    examples = [*(write.get("examples") or []), *(custom.get("examples") or [])]
    return {**write, **custom, "edit_types": types, "examples": examples}


def _edit_type(name: str, value: str | EditTypeEntry | None) -> EditType:
    """An edit type of write.yaml: a description, or {description, trained_as}."""
    entry = value if isinstance(value, EditTypeEntry) else EditTypeEntry(description=value or "")
    trained_as = entry.trained_as or (name if name in EDIT_TYPES else OTHER)
    if trained_as not in EDIT_TYPES or IDENTITY_EDIT in (name, trained_as):
        raise UserError(
            f"edit_types.{name}: expected trained_as to be an edit type ({', '.join(EDIT_TYPES[:-1])}); got "
            f"{trained_as!r}.{did_you_mean(trained_as, EDIT_TYPES)} Correct trained_as"
        )
    return EditType(name, entry.description or name, trained_as)


def _as_example(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_mapping(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{option}: expected a file {path}; there is none; see docs/prepare.md")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: expected a text file in UTF-8; got {path} ({error}); correct it") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected keys and values in {path}; got {type(value).__name__}; correct it")
    return value


def parse_shares(text: str, known: Sequence[str]) -> dict[str, float]:
    """The wanted shares of `--types add=0.2,remove=0.3`, or of a list of types with equal shares; they sum to 1.

    Raises:
        UserError: an unknown type, a share that is no positive number, or a type twice.
    """
    shares: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, number = part.partition("=")
        name = name.strip()
        if name not in known or name in shares:
            raise UserError(
                f"--types: expected each of {', '.join(known)} at most once; got {name!r}."
                f"{did_you_mean(name, known)} --custom adds edit types of your own"
            )
        try:
            shares[name] = float(number) if equals else 1.0
        except ValueError:
            shares[name] = -1.0
        if not 0 < shares[name] < 1e9:
            raise UserError(f"--types: expected a positive share for {name}; got {number!r}; write {name}=0.2")
    if not shares:
        raise UserError(f"--types: expected at least one edit type ({', '.join(known)}); got {text!r}; name one")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}
