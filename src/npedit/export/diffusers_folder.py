"""Make of an editor's folder one that `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER,
trust_remote_code=True)` opens, on a computer without npedit.

`pipeline.py` is the family's file in `pipelines/`, joined to the files of npedit that this file imports. The parts that
training does not change (VAE, text encoders, tokenizers) are loaded from the base model by `base_part.py`; those of the
embedded base are copied. An adapter's transformer is the base's with `pytorch_lora_weights.safetensors`.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import safe_open

from npedit.errors import UserError
from npedit.families._published import find_published
from npedit.hub_access import hub_error_text, is_local_only
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe.config import EMBEDDED, embedded_weights, part_dtypes
from npedit.runs.editor_facts import FACTS_FILE, EditorFacts
from npedit.runs.files import write_text

PIPELINES = Path(__file__).parent / "pipelines"
PACKAGE = Path(__file__).parents[2]  # the folder that holds npedit
CLASS_NAME = "NPEditPipeline"  # of every family, see pipelines/few_step.py
PIPELINE_FILE = "pipeline.py"
PART_FILE = "base_part"
WIDENED_LAYER = "transformer.patch_embed.proj.lora_A.weight"
SCHEDULE_KEYS = (
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "time_shift_type",
)  # fmt: skip


def write_pipeline(folder: Path, read_base_from: str = "") -> None:
    """Add the pipeline to an editor's folder, which holds npedit.json, `scheduler/`, and `transformer/` or a LoRA file.

    `read_base_from` is where the base model's index is read, "" for the base in npedit.json.

    Raises:
        UserError: the base model's index cannot be read.
    """
    facts = EditorFacts.read(folder)
    source = read_base_from or facts.base
    index = _read_base_json(source, "model_index.json")
    parts = {name: value for name, value in index.items() if _is_part(value)}
    written = {name: _write_part(folder, facts.base, name, value) for name, value in parts.items()}
    settings = {name: value for name, value in index.items() if name not in parts and not name.startswith("_")}
    editor = {"sizes": facts.sizes, "steps": facts.steps, "schedule": _read_schedule(source)}
    known = find_published(facts.base)
    if known is not None and known.clips_attention:
        editor["clips_attention"] = True
    if facts.isolated_references:
        editor["isolated_references"] = True
    head = {"_class_name": ["pipeline", CLASS_NAME], "_diffusers_version": index["_diffusers_version"]}
    write_text(
        folder / "model_index.json", json.dumps({**head, **settings, "editor": editor, **written}, indent=2) + "\n"
    )
    write_text(folder / PIPELINE_FILE, pipeline_source(facts.family))


def dtype_source(facts: Mapping[str, Any]) -> str:
    """The argument `torch_dtype` with which diffusers opens an editor in the number types of its training, as Python
    source. `facts` are those of npedit.json.

    Raises:
        UserError: they name an unknown type.
    """
    names = [str(facts.get(key) or "") for key in ("dtype", "text_dtype", "vae_dtype")]
    try:
        types = part_dtypes(names[0] or "float32", *names[1:])
    except KeyError as error:
        raise UserError(
            f"expected float32, bfloat16 or float16 as the number types in {FACTS_FILE}; got {error}; correct the file"
        ) from None
    if len(set(types.values())) == 1:
        return str(types["transformer"])
    return "{" + ", ".join(f'"{part}": {kind}' for part, kind in types.items()) + "}"


def _is_part(value: Any) -> bool:
    """Whether an entry of model_index.json is a part: its library and class, or two nulls where the part is absent.
    Settings may be lists of two numbers."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)


def _write_part(folder: Path, base: str, name: str, declared: list[Any]) -> list[Any]:
    """Write one part of the pipeline into its folder; returns its entry in model_index.json."""
    if declared[1] is None:
        return declared
    if name == "scheduler":
        return ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    has_lora = name == "transformer" and (folder / LORA_FILE).is_file()
    if name == "transformer" and not has_lora:
        return declared
    facts = {"base": base, "subfolder": name, "library": declared[0], "class": declared[1]}
    if base == EMBEDDED:
        shutil.copytree(embedded_weights("base") / name, folder / name)
        if not has_lora:
            return declared
        facts["base"] = ""
    (folder / name).mkdir(exist_ok=True)
    more = {"lora": LORA_FILE, **_wider_input(folder / LORA_FILE)} if has_lora else {}
    write_text(folder / name / f"{PART_FILE}.json", json.dumps({**facts, **more}, indent=2) + "\n")
    shutil.copyfile(PIPELINES / f"{PART_FILE}.py", folder / name / f"{PART_FILE}.py")
    return [PART_FILE, "BasePart"]


def _wider_input(lora: Path) -> dict[str, int]:
    """{"in_channels": channels of the net's input} of an adapter for a net that may have more input channels than the
    base model (Sana), else {}."""
    with safe_open(lora, "pt") as file:
        if WIDENED_LAYER not in file.keys():  # noqa: SIM118 - not a dict
            return {}
        return {"in_channels": file.get_slice(WIDENED_LAYER).get_shape()[1]}


def _read_schedule(base: str) -> dict[str, Any]:
    """The settings of the base model's scheduler that its noise shift depends on."""
    found = _read_base_json(base, "scheduler/scheduler_config.json")
    if "flow_shift" in found:  # a DPM solver
        return {"shift": found["flow_shift"]}
    return {key: found[key] for key in SCHEDULE_KEYS if key in found}


def _read_base_json(base: str, name: str) -> dict[str, Any]:
    """A JSON file of the base model, in its folder or on the Hub."""
    folder = embedded_weights("base") if base == EMBEDDED else Path(base)
    try:
        if folder.is_dir():
            path = folder / name
        else:
            path = Path(hf_hub_download(base, name, local_files_only=is_local_only(base)))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected {name} of the base model {base!r}, which tells the parts of its pipeline; got: "
            f"{hub_error_text(error)}. Say with --base where the base model is: a Hub id or a folder."
        ) from None


def pipeline_source(family: str) -> str:
    """The text of a family's `pipeline.py`: one file that imports nothing of npedit."""
    files = _joined_files(PIPELINES / f"{family}.py")
    trees = [ast.parse(text) for text in files]
    imports = [ast.unparse(n) for tree in trees for n in tree.body if _is_outside_import(n)]
    ends = [max(n.end_lineno or 0 for n in t.body if isinstance(n, (ast.Import, ast.ImportFrom))) for t in trees]
    bodies = ["\n".join(text.splitlines()[end:]).strip("\n") for text, end in zip(files, ends)]
    head = f'"""{ast.get_docstring(trees[-1], clean=False)}"""\n\nfrom __future__ import annotations\n'
    lines = sorted(set(imports), key=lambda line: (line.split()[1].lower(), line))
    return "\n".join([head, *lines, *(f"\n\n{body}" for body in bodies)]) + "\n"


def _joined_files(path: Path) -> list[str]:
    """The texts of the files of npedit that this file imports, then its text."""
    text = path.read_text(encoding="utf-8")
    modules = [n.module or "" for n in ast.parse(text).body if isinstance(n, ast.ImportFrom)]
    ours = [
        PACKAGE.joinpath(*module.split(".")).with_suffix(".py") for module in modules if module.startswith("npedit")
    ]
    return [*dict.fromkeys(found for file in ours for found in _joined_files(file)), text]


def _is_outside_import(node: ast.stmt) -> bool:
    """Whether a statement is an import from another package; `__future__` is not counted."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] not in ("npedit", "__future__")
    return isinstance(node, ast.Import)
