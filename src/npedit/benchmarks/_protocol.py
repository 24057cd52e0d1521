"""Protocols: what a judge is asked, and how. Each protocol is one YAML file in protocols/.

The files of npedit's protocols hold the texts. The published texts of VIEScore and ImgEdit are not in this package.
They are read from an installed package that has them, or from a folder with the official files; no code is run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from npedit.benchmarks._answers import DIGITS
from npedit.errors import UserError, did_you_mean
from npedit.judges.base import RequestSettings
from npedit.judges.cache import hash_json

PROTOCOL_FOLDER = Path(__file__).parent / "protocols"
INSTRUCTION_PLACEHOLDERS = ("<instruction>", "<edit_prompt>")  # of npedit and VIEScore; of ImgEdit
VIESCORE = ("vie_prompts.py",)  # the file in VIEScore, GEdit-Bench and packages
IMGEDIT = ("prompts.json", "prompt.py")
PACKAGES = {
    VIESCORE: (
        ("evalscope", "benchmarks/image_edit/gedit/vie_prompts.py"),
        ("lmms_eval", "tasks/gedit_bench/viescore/vie_prompts.py"),
    ),
    IMGEDIT: (("lmms_eval", "tasks/imgedit/prompt.py"),),
}


@dataclass(frozen=True)
class Question:
    """One score of a protocol: the minimum or the mean (the benchmark decides) of `criteria` numbers for each text.
    `pictures` are "source" and "edited", in the order shown. `texts` and `swapped` (for the other order; may be empty)
    are by edit type, with "" for all types. Each text has one placeholder for the instruction if the source is
    shown."""

    name: str
    pictures: tuple[str, ...]
    criteria: int
    texts: Mapping[str, tuple[str, ...]]
    swapped: Mapping[str, tuple[str, ...]]

    def prompts(self, task: str, instruction: str, swapped: bool = False) -> list[str]:
        """The texts with the instruction filled in. A placeholder within the instruction is not replaced.

        Raises:
            UserError: the question has no text for this edit type.
        """
        found = self.swapped if swapped else self.texts
        texts = found.get(task, found.get(""))
        if texts is None:
            raise UserError(f"expected an edit type among {', '.join(found)}; got {task!r}; correct the data")
        return [_fill_instruction(text, instruction) for text in texts]


@dataclass(frozen=True)
class Protocol:
    """All settings of how a benchmark is judged. See the files in protocols/."""

    name: str
    answer: str  # format: json, lines or digits; see `_answers.parse_scores`
    low: float
    high: float
    overall: str  # the name of the overall score
    resize: str  # source: scale the edited picture to the source's size; none: show the edited picture as it is
    request_settings: RequestSettings
    tries: int  # attempts to get a readable answer
    reminder: str  # added to the text from the second attempt on
    questions: tuple[Question, ...]

    @classmethod
    def load(cls, name: str, prompts: Path | None = None) -> Self:
        """The protocol with this name. `prompts` is a folder or file with official texts, for protocols that need them.

        Raises:
            UserError: there is no such protocol, or its texts are not found or have no placeholder.
        """
        if name not in available_protocols():
            raise UserError(
                f"--protocol: expected one of {', '.join(available_protocols())}; got {name!r}."
                f"{did_you_mean(name, available_protocols())}"
            )
        raw = yaml.safe_load((PROTOCOL_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        needs_official = any("blocks" in q for q in raw["questions"].values())
        if prompts and not needs_official:
            raise UserError(
                f"--prompts: expected none, because {name} has its own texts; got {prompts}; leave the option out, or "
                "choose an official --protocol"
            )
        texts = _read_official_prompts(name, raw["answer"], prompts) if needs_official else {}
        criteria_by_type = raw.pop("criteria", {})
        questions = tuple(_parse_question(key, q, texts, criteria_by_type) for key, q in raw.pop("questions").items())
        choices = DIGITS if raw["answer"] == "digits" else ()
        how = {key: raw.pop(key) for key in ("temperature", "max_tokens", "text_first", "jpeg_quality")}
        return cls(**raw, request_settings=RequestSettings(**how, answer_choices=choices), questions=questions)

    @cached_property
    def hash(self) -> str:
        """A hash of the protocol with all texts. Results under different hashes are not comparable."""
        return hash_json(self._as_json())

    @cached_property
    def prompts_hash(self) -> str:
        """A hash of the texts alone, which shows whether two copies of the official texts are the same."""
        return hash_json([[q.name, q.texts, q.swapped] for q in self.questions])

    def to_record(self) -> dict[str, Any]:
        """The protocol for settings.json: all fields except the texts, and both hashes."""
        found = self._as_json()
        for question in found["questions"]:
            del question["texts"], question["swapped"]
        return {**found, "hash": self.hash, "prompts_hash": self.prompts_hash}

    def _as_json(self) -> dict[str, Any]:
        """All fields under their names on disk. These names must not change when a field is renamed."""
        found = asdict(self)
        request = found.pop("request_settings")
        request["options"] = request.pop("answer_choices")
        return {**found, "manner": request}


def available_protocols() -> list[str]:
    """The names of all protocols."""
    return sorted(p.stem for p in PROTOCOL_FOLDER.glob("*.yaml"))


def _fill_instruction(text: str, instruction: str) -> str:
    slot = next((s for s in INSTRUCTION_PLACEHOLDERS if s in text), None)
    return text.replace(slot, instruction) if slot else text


def _parse_question(
    name: str, raw: Mapping[str, Any], official: Mapping[str, str], criteria_by_type: Mapping[str, str]
) -> Question:
    """A question with its texts: the file's, one for each edit type if there are criteria by type, or the official
    ones."""
    if "blocks" not in raw:
        kinds = criteria_by_type or {"": ""}
        own, other = (
            {k: tuple(t.replace("<criteria>", v) for t in raw.get(key, ())) for k, v in kinds.items()}
            for key in ("texts", "swapped")
        )
        texts, swapped = own, {k: v for k, v in other.items() if v}
    elif raw["blocks"] == ["by edit type"]:
        texts, swapped = {k: (v,) for k, v in official.items()}, {}
    else:
        missing = [b for b in raw["blocks"] if b not in official]
        if missing:
            raise UserError(
                f"expected {', '.join(raw['blocks'])} in the official texts; got none of {missing}; give "
                "the benchmark's own files as --prompts"
            )
        texts, swapped = {"": ("\n".join(official[b] for b in raw["blocks"]),)}, {}
    bare = [k for k, group in texts.items() for t in group if sum(s in t for s in INSTRUCTION_PLACEHOLDERS) != 1]
    if bare and "source" in raw["pictures"]:
        placeholders = " or ".join(INSTRUCTION_PLACEHOLDERS)
        raise UserError(
            f"expected one placeholder for the instruction, {placeholders}, in the text {name} {bare}; "
            "correct the texts"
        )
    return Question(name, tuple(raw["pictures"]), raw["criteria"], texts, swapped)


def _read_official_prompts(name: str, answer_format: str, prompts: Path | None) -> dict[str, str]:
    """Name -> official text. The texts are constants of a Python file, which is parsed and not run, or entries of a
    JSON file."""
    wanted = IMGEDIT if answer_format == "lines" else VIESCORE
    found = list(_find_prompt_files(wanted, prompts))
    if not found:
        where = f"in {prompts}" if prompts else f"in an installed {' or '.join(p for p, _ in PACKAGES[wanted])}"
        raise UserError(
            f"--protocol {name} needs the official texts: expected {' or '.join(wanted)} {where}; found none. Give the "
            "folder of the official files as --prompts, or: pip install --no-deps lmms-eval"
        )
    path = found[0]
    try:
        text = path.read_text(encoding="utf-8")
        texts = json.loads(text) if path.suffix == ".json" else _parse_python_constants(text)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(
            f"expected official texts in {path}; got a file that cannot be read: {error}; fetch it again"
        ) from None
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _find_prompt_files(wanted: tuple[str, ...], prompts: Path | None) -> Iterator[Path]:
    if prompts is not None:
        inside = sorted(p for n in wanted for p in prompts.rglob(n)) if prompts.is_dir() else [prompts]
        yield from (p for p in inside if p.is_file())
        return
    for package, file in PACKAGES[wanted]:
        spec = importlib.util.find_spec(package)  # find_spec does not import the package
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                yield Path(folder) / file


def _parse_python_constants(text: str) -> dict[str, Any]:
    """Name -> value of the top-level constants of Python source. If one constant is a dictionary, as in lmms-eval, its
    entries are returned instead."""
    found: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    tables = [v for v in found.values() if isinstance(v, dict)]
    return tables[0] if len(tables) == 1 else found
